"""What a finished case leaves behind for the run as a whole, on disk: so that runs can be stopped, split and continued.

`per_case.py` writes one record when all other files of a case are there; `run.py` gathers them. A record belongs to
what it was made of (`digest`): with other settings, another network or a changed input file it does not count.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hae_jax.errors import UserError
from hae_jax.evaluation.report import CaseResult
from hae_jax.evaluation.volumes import VolumeMetrics
from hae_jax.files import write_json, written_whole
from hae_jax.translation.masks import Masks

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
      host: the machine.
    """

    digest: str
    files: tuple[str, ...]
    row: CaseResult | None
    failed: str | None
    host: str


def digest(*parts: Any) -> str:
    """SHA-256 of values that are ready for JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def write(output: Path, case: str, record: Record, measured: Measured | None) -> None:
    """Writes a record; that it exists says that all is there, so it comes after everything else."""
    if measured is not None:
        with written_whole(_arrays(output, case)) as temporary:
            np.savez_compressed(temporary, truth=measured.truth, foreground=measured.foreground, **{
                f"{method}/{field}": value for method, answer in measured.answers.items()
                for field, value in answer.masks._asdict().items()})
    volumes = {} if measured is None else {
        method: dataclasses.asdict(answer.volume) for method, answer in measured.answers.items()}
    write_json(_facts(output, case), dataclasses.asdict(record) | {"volumes": volumes})


def read(output: Path, case: str) -> Record | None:
    """The record of a case whose files are all there, or None."""
    path = _facts(output, case)
    try:
        facts = json.loads(path.read_text())
        record = Record(facts["digest"], tuple(facts["files"]), _row(facts["row"]), facts["failed"], facts["host"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is damaged ({error}); delete it, and the case is done again") from error
    return record if all((output / name).is_file() for name in record.files) else None


def read_measured(output: Path, case: str) -> Measured | None:
    """What `write` was given to be measured; None for a case without a segmentation.

    Raises:
      UserError: if the file is damaged.
    """
    path, volumes = _arrays(output, case), json.loads(_facts(output, case).read_text())["volumes"]
    if not volumes:
        return None
    try:
        with np.load(path) as arrays:
            answers = {method: Answer(Masks(*(arrays[f"{method}/{field}"] for field in Masks._fields)),
                                      VolumeMetrics(**facts)) for method, facts in volumes.items()}
            return Measured(arrays["truth"], arrays["foreground"], answers)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: is damaged ({error}); delete it and {_facts(output, case).name} beside it, and the "
                        "case is done again") from error


def _row(fields: Mapping[str, Any] | None) -> CaseResult | None:
    return None if fields is None else CaseResult(**fields)


def _facts(output: Path, case: str) -> Path:
    return output / FOLDER / f"{case}.json"


def _arrays(output: Path, case: str) -> Path:
    return output / FOLDER / f"{case}.npz"
