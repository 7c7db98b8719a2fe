"""A folder of results and its finished cases. A run can be stopped and continued, or split into shards.

Each case has a record, which is written after all its other files. A record is valid for its cache key only. With
other settings, another network or a changed input file, the case is processed again.
"""

import dataclasses
import logging
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hae_jax import provenance
from hae_jax.data.cases import CaseFiles
from hae_jax.data.splits import patient_of
from hae_jax.errors import UserError
from hae_jax.evaluation import report
from hae_jax.evaluation.report import CaseResult
from hae_jax.evaluation.volumes import VolumeMetrics
from hae_jax.files import read_json, write_json, written_whole
from hae_jax.localization.map_threshold import Masks
from hae_jax.localization.methods import IntensityThreshold
from hae_jax.pipeline import cache_key
from hae_jax.pipeline.checks import of_phantom
from hae_jax.pipeline.summary import (
    CASES,
    MANIFEST,
    METRICS,
    Answer,
    Context,
    Measured,
    Record,
    Summary,
    Tally,
    summarise,
    write_tables,
)
from hae_jax.report.write import PAGE

_LOG = logging.getLogger(__name__)

RECORDS = "records"
CALIBRATION, BASELINE = "calibration.json", f"calibration_{IntensityThreshold.name}.json"
_CHANGED = "its files were changed while it was translated; run the command again"


class ResultsFolder:
    """The results of a run, and of earlier ones with the same key.

    Attributes:
      path: the folder.
      key: key of the run (`cache_key.run_key`).
      cases: cases of all shards.
    """

    def __init__(self, path: Path, key: dict[str, Any], cases: Sequence[CaseFiles], only_cases: bool = False):
        """Takes a folder that exists.

        Args:
          only_cases: leave other cases with the same key, of earlier runs, out of the tables.
        """
        self.path, self.key, self.cases = path, key, list(cases)
        self._only_cases = only_cases
        self._begun: dict[str, Record] = {}  # by the case's name; these records have no files yet
        (path / RECORDS).mkdir(exist_ok=True)
        if not (path / CASES).exists():
            report.write_cases(path / CASES, [])  # marks the folder as one of results, with the records

    def lock(self, shard: int, num_shards: int) -> Path:
        """The lock file of this shard. Without a lock, two simultaneous runs could mix the files of a case."""
        return self.path / RECORDS / f".{shard}-of-{num_shards}.lock"

    def finished(self, case: CaseFiles) -> bool:
        """Whether a case's results exist and were made with this key and the current files of the case."""
        record = self._record(case)
        return record is not None and record.failed is None

    def check_namesakes(self, cases: Sequence[CaseFiles]) -> None:
        """Refuses to replace the results of another patient whose case has the same name.

        Raises:
          UserError: existing results were made from a case in another folder.
        """
        for case in cases:
            record, own = self._any_record(case.name), str(case.folder.resolve())
            if record is not None and record.row is not None and record.folder != own:
                raise UserError(f"{self.path}: has results of another case {case.name}, from {record.folder}; give "
                                f"another folder with --output, or --overwrite to replace them by those of {own}")

    def begin(self, case: CaseFiles) -> None:
        """Notes the state of a case's files before they are read, so that a later change is detected."""
        self._begun[case.name] = Record(
            cache_key.case_key(self.key, case), (), None, None, cache_key.digest(self.key), {},
            str(case.folder.resolve()), case.patient or patient_of(case.name), of_phantom(case))

    def phantom(self, case: str) -> bool:
        """Whether a case, for which `begin` was called, belongs to a phantom."""
        return self._begun[case].phantom

    def writing(self, case: str, files: Sequence[str]) -> None:
        """Marks a case's files as incomplete before they are written. Until `commit`, they are valid for no key.

        The record keeps the files of earlier results, so that `commit` can delete them.
        """
        before = self._any_record(case)
        there = tuple(dict.fromkeys((*(() if before is None else before.files), *files)))
        self._write(case, Record("", there, None, None, "", {}, "", "", False))

    def commit(self, case: str, files: Sequence[str], row: CaseResult, measured: Measured | None) -> None:
        """Writes the record of a case whose files are complete, and deletes other files of earlier results.

        Args:
          files: the names of its files.
          measured: the data for the metrics; None without a segmentation.
        """
        self._replace(case, dataclasses.replace(self._begun[case], files=tuple(files), row=row), measured)

    def fail(self, case: str, reason: str) -> None:
        """Writes the record of a case that failed, with the reason."""
        self._replace(case, dataclasses.replace(self._begun[case], failed=reason), None)

    def invalidate(self, cases: Sequence[CaseFiles]) -> None:
        """Removes results that will be replaced from the tables, since the run may be stopped before its end.

        A shard that starts with new cases does not change the tables of other shards.
        """
        if self.key_of_tables() in (None, self.key) and not any(self._has_results(case.name) for case in cases):
            return
        replaced = {case.name for case in cases}
        stay = [record.row for name, record in self.records().items() if record.row and name not in replaced]
        report.write_cases(self.path / CASES, stay)
        for name in (METRICS, MANIFEST, CALIBRATION, BASELINE, PAGE):
            (self.path / name).unlink(missing_ok=True)

    def key_of_tables(self) -> dict[str, Any] | None:
        """The key of the run that wrote the tables; None if there are none or the manifest is damaged."""
        try:
            return read_json(self.path / MANIFEST).get("inputs")
        except (UserError, AttributeError):
            return None

    def save_calibrations(self, method: Any, baseline: Any | None) -> None:
        """Writes the calibrations of the method and the baseline to the folder."""
        write_json(self.path / CALIBRATION, dataclasses.asdict(method))
        if baseline is None:
            (self.path / BASELINE).unlink(missing_ok=True)
        else:
            write_json(self.path / BASELINE, dataclasses.asdict(baseline))

    def summary(self, context: Context, worked_on: Sequence[CaseFiles]) -> Summary:
        """Writes the tables of all cases with this key, including those of other shards.

        Shards may end at the same time. The tables are written again if new records have appeared meanwhile, so that no
        case is left out.

        Args:
          worked_on: the cases that this run has processed.
        """
        while True:
            records, tally = self.records(), Tally()
            for name in [name for name, record in records.items() if record.row]:
                measured = self.measured(name)
                if self._has_results(name):
                    tally.add(records[name].patient, measured)
                else:  # another process has started to replace it
                    del records[name]
            names = [case.name for case in worked_on]
            changed = {name: _CHANGED for name in names if name not in records}
            done = summarise(self.path, context, [case.name for case in self.cases], records, tally, names, changed)
            # If this run has processed no case, the manifest remains that of the run that made the results.
            write_tables(self.path, self.key, context, records, done,
                         rewrite_manifest=bool(done.translated or done.failed) or self.key_of_tables() != self.key)
            if all(self._record(case) is None for case in self.cases if case.name not in records):
                return done

    def records(self) -> dict[str, Record]:
        """The records with this key by case name, of this run's cases and, without `only_cases`, of other runs'."""
        own = {case.name for case in self.cases}
        others = {} if self._only_cases else {
            name: self._whole_record(name) for name in self._names() if name not in own}
        return {case.name: record for case in self.cases if (record := self._record(case))} | {
            name: record for name, record in others.items()
            if record is not None and record.row is not None and record.run_key == cache_key.digest(self.key)}

    def measured(self, case: str) -> Measured | None:
        """The value of `measured` that was given to `commit`.

        Raises:
          UserError: if the file is damaged.
        """
        path = self._arrays(case)
        try:
            volumes = read_json(self._facts(case)).get("volumes")
            return _read_measured(path, volumes) if volumes else None
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{path}: is damaged ({error}); delete it and {self._facts(case).name} beside it, then run "
                            "the command again") from error

    def _record(self, case: CaseFiles) -> Record | None:
        """The record of a case, if it has this key and all its files exist."""
        record = self._whole_record(case.name)
        return record if record is not None and record.key == cache_key.case_key(self.key, case) else None

    def _whole_record(self, case: str) -> Record | None:
        record = self._any_record(case)
        return record if record and all((self.path / name).is_file() for name in record.files) else None

    def _any_record(self, case: str) -> Record | None:
        """The record of a case with any key. A damaged record is logged and ignored."""
        path = self._facts(case)
        if not path.exists():
            return None
        try:
            facts = read_json(path)
            _check_record(facts)
            if facts.pop("volumes", None) and not zipfile.is_zipfile(self._arrays(case)):
                raise ValueError(f"{self._arrays(case).name} beside it is not whole")
            row = facts["row"] and CaseResult(**facts["row"])
            return Record(**facts | {"row": row, "files": tuple(facts["files"])})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            _LOG.info("%s: is damaged (%s); the case is processed again", path, error)
            return None

    def _has_results(self, case: str) -> bool:
        record = self._any_record(case)
        return record is not None and record.row is not None

    def _names(self) -> list[str]:
        return sorted(path.stem for path in (self.path / RECORDS).glob("*.json") if not path.name.startswith("."))

    def _replace(self, case: str, record: Record, measured: Measured | None) -> None:
        before = self._any_record(case)
        for name in () if before is None else set(before.files) - set(record.files):
            (self.path / name).unlink(missing_ok=True)
        if measured is not None:
            with written_whole(self._arrays(case)) as temporary:
                np.savez_compressed(temporary, truth=measured.truth, foreground=measured.foreground, **{
                    f"{method}/{field}": value for method, answer in measured.answers.items()
                    for field, value in answer.masks._asdict().items()})
        made_by = {name: value for name, value in provenance.record().items() if name not in ("notice", "versions")}
        self._write(case, dataclasses.replace(record, made_by=made_by), {
            method: dataclasses.asdict(answer.volume) for method, answer in measured.answers.items()}
            if measured else {})

    def _write(self, case: str, record: Record, volumes: Mapping[str, Any] | None = None) -> None:
        write_json(self._facts(case), dataclasses.asdict(record) | {"volumes": volumes or {}})

    def _facts(self, case: str) -> Path:
        return self.path / RECORDS / f"{case}.json"

    def _arrays(self, case: str) -> Path:
        return self.path / RECORDS / f"{case}.npz"


def _check_record(facts: Mapping[str, Any]) -> None:
    """Raises a ValueError for a record that this program did not write, such as one with files outside the folder."""
    texts = [facts[name] for name in ("key", "run_key", "folder", "patient")] + list(facts["files"])
    volumes = facts.get("volumes", {})
    if not (all(isinstance(text, str) for text in texts) and all(map(_is_inside, facts["files"]))
            and isinstance(facts["made_by"], dict) and isinstance(facts["failed"], str | None)
            and isinstance(volumes, dict) and all(isinstance(found, dict) for found in volumes.values())):
        raise ValueError("a field is not what this program writes")


def _is_inside(name: str) -> bool:
    parts = Path(name).parts
    return bool(parts) and not Path(name).is_absolute() and ".." not in parts


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished run, with the cases and modalities that exports to other formats need.

    Raises:
      UserError: it is missing, damaged, or lacks cases or modalities.
    """
    path = folder / MANIFEST
    try:
        found = read_json(path)
        texts = [*found["config"]["data"]["modalities"], *(
            text for facts in found["cases"].values() for text in (facts["folder"], *facts["files"]))]
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("folders, files or modalities are no text")
    except (UserError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); give a folder that translate.py has finished") from error
    return found


def _read_measured(path: Path, volumes: Mapping[str, Mapping[str, Any]]) -> Measured:
    with np.load(path) as arrays:
        answers = {method: Answer(Masks(*(arrays[f"{method}/{field}"] for field in Masks._fields)),
                                  VolumeMetrics(**facts)) for method, facts in volumes.items()}
        return Measured(arrays["truth"], arrays["foreground"], answers)
