"""What a finished case leaves behind for the run as a whole, on disk: so that runs can be stopped, split and continued.

`per_case.py` writes one record when all other files of a case are there; `gathering.py` reads them. A record belongs to
what it was made of (`digest`): with other settings, another network or a changed input file it does not count.
"""

import dataclasses
import hashlib
import json
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hae_jax.errors import UserError
from hae_jax.evaluation.report import CaseResult
from hae_jax.evaluation.volumes import VolumeMetrics
from hae_jax.files import write_json, written_whole
from hae_jax.localization.masks import Masks

FOLDER = "records"


class Answer(NamedTuple):
    """What one method says about a case."""

    masks: Masks  # at network resolution
    volume: VolumeMetrics  # on the case's own grid


class Measured(NamedTuple):
    """What the metrics need of a case that has a segmentation, at network resolution."""

    truth: np.ndarray  # [S, H, W] bool
    foreground: np.ndarray  # [S, H, W] bool
    answers: dict[str, Answer]  # by method


@dataclasses.dataclass(frozen=True)
class Record:
    """A case that was worked on.

    Attributes:
      digest: of everything that it was made of.
      files: names of the files it wrote, in the output folder.
      row: its row of cases.csv; None where it failed.
      failed: why it failed; None where it did not.
      run: digest of the run's inputs alone, without the case's files.
      made_by: host, time, git revision and command.
      folder: where the case lies, absolute and without links: whose results these are.
      phantom: whether the case is a phantom's.
    """

    digest: str
    files: tuple[str, ...]
    row: CaseResult | None
    failed: str | None
    run: str
    made_by: dict[str, Any]
    folder: str = ""  # of records that do not say
    phantom: bool = False


def digest(*parts: Any) -> str:
    """SHA-256 of values that are ready for JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def begin(output: Path, case: str, files: tuple[str, ...]) -> None:
    """Says that a case's files are about to be written: until `write`, what lies there counts for no settings.

    Args:
      output: the folder of results.
      case: its name.
      files: names of the files that will be written; those of an earlier record stay known, to be deleted by `write`.
    """
    before = _read(output, case)
    there = files if before is None else tuple(dict.fromkeys((*before.files, *files)))
    write_json(_facts(output, case), dataclasses.asdict(Record("", there, None, None, "", {})))


def folder_of_results(output: Path, case: str) -> str:
    """The folder of the case whose results are there; empty where there are none, or their record does not say."""
    record = _read(output, case)
    return record.folder if record is not None and record.row is not None else ""


def has_results(output: Path, case: str) -> bool:
    """Whether a case was finished at some time, with whatever settings."""
    record = _read(output, case)
    return record is not None and record.row is not None


def write(output: Path, case: str, record: Record, measured: Measured | None) -> None:
    """Writes a record; that it exists says that all is there, so it comes after everything else.

    What an earlier record of the case names and this one does not is deleted: results of other settings must not pass
    for these.
    """
    before = _read(output, case)
    for name in () if before is None else set(before.files) - set(record.files):
        (output / name).unlink(missing_ok=True)
    if measured is not None:
        with written_whole(_arrays(output, case)) as temporary:
            np.savez_compressed(temporary, truth=measured.truth, foreground=measured.foreground, **{
                f"{method}/{field}": value for method, answer in measured.answers.items()
                for field, value in answer.masks._asdict().items()})
    volumes = {} if measured is None else {
        method: dataclasses.asdict(answer.volume) for method, answer in measured.answers.items()}
    write_json(_facts(output, case), dataclasses.asdict(record) | {"volumes": volumes})


def read(output: Path, case: str) -> Record | None:
    """The record of a case whose files are all there, or None; a damaged one is said aloud and does not count."""
    record = _read(output, case)
    return record if record and all((output / name).is_file() for name in record.files) else None


def names(output: Path) -> list[str]:
    """The cases that have records in a folder of results."""
    return sorted(path.stem for path in (output / FOLDER).glob("*.json") if not path.name.startswith("."))


def read_measured(output: Path, case: str) -> Measured | None:
    """What `write` was given to be measured; None for a case without a segmentation, or one that has begun anew.

    Raises:
      UserError: if the file is damaged.
    """
    path, volumes = _arrays(output, case), json.loads(_facts(output, case).read_text()).get("volumes")
    if not volumes:
        return None
    try:
        with np.load(path) as arrays:
            answers = {method: Answer(Masks(*(arrays[f"{method}/{field}"] for field in Masks._fields)),
                                      VolumeMetrics(**facts)) for method, facts in volumes.items()}
            return Measured(arrays["truth"], arrays["foreground"], answers)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path}: is damaged ({error}); delete it and {_facts(output, case).name} beside it, and the "
                        "case is done again") from error


def _read(output: Path, case: str) -> Record | None:
    path = _facts(output, case)
    try:
        facts = json.loads(path.read_text())
        if facts.get("volumes") and not zipfile.is_zipfile(_arrays(output, case)):
            raise ValueError(f"{_arrays(output, case).name} beside it is not whole")
        return Record(facts["digest"], tuple(facts["files"]), _row(facts["row"]), facts["failed"], facts["run"],
                      facts["made_by"], facts.get("folder", ""), facts.get("phantom", False))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"{path}: is damaged ({error}), the case counts as not done")
        return None


def _row(fields: Mapping[str, Any] | None) -> CaseResult | None:
    return None if fields is None else CaseResult(**fields)


def _facts(output: Path, case: str) -> Path:
    return output / FOLDER / f"{case}.json"


def _arrays(output: Path, case: str) -> Path:
    return output / FOLDER / f"{case}.npz"
