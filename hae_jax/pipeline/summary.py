"""The record of a case, and the summary of a run: tables, metrics, manifest and the printed summary."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections
import numpy as np

from hae_jax import provenance
from hae_jax.evaluation import report, volumes
from hae_jax.evaluation.report import CaseResult
from hae_jax.evaluation.running import SliceSums
from hae_jax.evaluation.volumes import VolumeMetrics
from hae_jax.files import write_json
from hae_jax.localization.map_threshold import Masks
from hae_jax.localization.methods import IntensityThreshold, Method
from hae_jax.localization.rules import LABELS
from hae_jax.report.write import PAGE

CASES, METRICS, MANIFEST = "cases.csv", "metrics.json", "manifest.json"
_SHOWN = 5  # names in a line


class Answer(NamedTuple):
    """The result of one method for a case."""

    masks: Masks  # at network resolution
    volume: VolumeMetrics  # on the case's own grid


class Measured(NamedTuple):
    """The data for the metrics of a case with a segmentation, at network resolution."""

    truth: np.ndarray  # [S, H, W] bool
    foreground: np.ndarray  # [S, H, W] bool
    answers: dict[str, Answer]  # by method


@dataclasses.dataclass(frozen=True)
class Record:
    """A case that was processed.

    Attributes:
      key: its cache key.
      files: names of its files in the folder of results.
      row: its row of cases.csv; None if it failed.
      failed: why it failed; None if it did not.
      run_key: digest of the run's key, without the case's files.
      made_by: host, time, git revision and command.
      folder: folder of the case, absolute and without links. It identifies the case that the results belong to.
      patient: patient of the case.
      phantom: whether the case belongs to a phantom.
    """

    key: str
    files: tuple[str, ...]
    row: CaseResult | None
    failed: str | None
    run_key: str
    made_by: dict[str, Any]
    folder: str
    patient: str
    phantom: bool


class Context(NamedTuple):
    """Facts about a run, besides its cases, for the tables.

    Attributes:
      config: the config tree.
      method: the method.
      origin: "checkpoint" and "devices", ready for JSON.
      own: names of this shard's cases.
      missing: cases that no longer exist, with the reason.
      phantom: whether a case of any shard belongs to a phantom.
      start: start of the run, by `time.monotonic`.
    """

    config: ml_collections.ConfigDict
    method: Method
    origin: dict[str, Any]
    own: frozenset[str]
    missing: dict[str, str]
    phantom: bool
    start: float


@dataclasses.dataclass(frozen=True)
class Summary:
    """The outcome of a run.

    Attributes:
      output: the folder of results.
      finished: number of cases with results, of this run and of earlier runs.
      translated: number of cases that this run has translated.
      wanted: number of cases in all shards.
      failed: reason of each failed case, by name.
      results: the metrics by method; empty if no case has a segmentation.
      table: the metrics as text below a headline; None without metrics.
      pictures: the overlays.
      seconds: duration of this run.
      seconds_per_slice: mean over all finished cases, with reading and writing, without compilation.
      phantom: whether a case belongs to a phantom.
      unflagged: names of finished cases in which no slice was called a lesion slice.
      elsewhere: names of cases of other shards.
    """

    output: Path
    finished: int
    translated: int
    wanted: int
    failed: dict[str, str]
    results: dict[str, dict[str, Any]]
    table: str | None
    pictures: list[Path]
    seconds: float
    seconds_per_slice: float | None
    phantom: bool = False
    unflagged: tuple[str, ...] = ()
    elsewhere: frozenset[str] = frozenset()

    @property
    def failed_here(self) -> bool:
        """Whether a case of this shard has failed."""
        return bool(self.failed.keys() - self.elsewhere)

    def lines(self) -> list[str]:
        """The summary that the command prints."""
        return [
            self.table or "no finished case has a segmentation, so there are no metrics",
            *([self._empty()] if self.unflagged else []),
            *(f"failed {name}{' (of another shard)' if name in self.elsewhere else ''}: {reason}"
              for name, reason in self.failed.items()),
            f"{self._how()}; results:",
            *(f"  {path}" for path in (*self.pictures, self.output / CASES, self.output / METRICS)),
            provenance.RESEARCH_USE,
            *([str(page)] if (page := self.output / PAGE).is_file() else []),
        ]

    def _empty(self) -> str:
        more = ", ..." if len(self.unflagged) > _SHOWN else ""
        return (f"{len(self.unflagged)} of {self.finished} cases: no slice was called a lesion slice, so the mask is "
                f"empty ({', '.join(self.unflagged[:_SHOWN])}{more})")

    def _how(self) -> str:
        again = self.finished - self.translated
        parts = []
        if self.translated or not again:
            parts.append(f"{self.translated} case{'s' * (self.translated != 1)} translated in {self.seconds:.0f} s")
        if again:
            parts.append(f"{again} cases were finished before, with the same network, files and settings "
                         "(--overwrite processes them again)")
        if left := self.wanted - self.finished - len(self.failed):
            parts.append(f"{left} belong to other shards")
        return ", ".join(parts)


class Tally:
    """Sums over the cases with a segmentation, for several methods.

    Only sums and counts of a case are kept, so that memory does not grow with the number of pixels.

    Attributes:
      cases: number of cases in the sums.
      slices: number of their slices.
    """

    def __init__(self):
        self.cases = 0
        self.slices = 0
        self._methods: dict[str, _Sums] = {}

    def add(self, patient: str, case: Measured | None) -> None:
        """Adds a case with the result of every method. None, for a case without a segmentation, is ignored.

        Args:
          patient: patient of the case. A patient is drawn with all cases.
          case: the data for the metrics.

        Raises:
          ValueError: a map is not finite.
        """
        if case is None:
            return
        self.cases += 1
        self.slices += len(case.truth)
        labels = case.truth.any(axis=(1, 2)).astype(int)  # as in a prepared dataset
        for name, (masks, volume) in case.answers.items():
            sums = self._methods.setdefault(name, _Sums(SliceSums(), [], []))
            sums.slices.add(patient, mask=masks.mask, mask_all=masks.mask_all, map=masks.map, lesion=masks.lesion,
                            truth=case.truth, labels=labels, foreground=case.foreground)
            sums.volumes.append(volume)
            sums.patients.append(patient)

    def results(self) -> dict[str, dict[str, Any]]:
        """The results of `running.SliceSums` and "volumes", for each method with results for every case. May be empty.

        If there are results of the intensity threshold, the other methods have "above_threshold".
        """
        complete = {name: sums for name, sums in self._methods.items() if len(sums.volumes) == self.cases}
        baseline = complete.get(IntensityThreshold.name)
        return {name: sums.slices.results() | {"volumes": volumes.summarise(sums.volumes, sums.patients)}
                | ({} if baseline in (None, sums) else {"above_threshold": {
                    "lesion_slice_dice": sums.slices.paired_dice(baseline.slices),
                    "volume_dice": volumes.paired_dice(sums.volumes, baseline.volumes, sums.patients)}})
                for name, sums in complete.items()}


class _Sums(NamedTuple):
    """The sums of one method."""

    slices: SliceSums
    volumes: list[VolumeMetrics]  # of each of its cases
    patients: list[str]  # of each of its cases


def write_tables(output: Path, key: Mapping[str, Any], context: Context, records: Mapping[str, Record],
                 done: Summary, rewrite_manifest: bool) -> None:
    """Writes cases.csv, metrics.json and, with `rewrite_manifest`, manifest.json."""
    config, method = context.config, context.method
    report.write_cases(output / CASES, _finished(records))
    report.write_metrics(
        output / METRICS, done.results.get(method.name, {}),
        baselines={name: result for name, result in done.results.items() if name != method.name},
        method=method.name, rule=method.rule, labels=LABELS[method.rule], cases=done.finished,
        seconds_per_slice=done.seconds_per_slice, phantom=done.phantom, image_size=config.model.image_size,
        **context.origin, inputs=key, settings=config.translation.to_dict(), seed=config.seed)
    if rewrite_manifest:
        write_json(output / MANIFEST, {
            **provenance.record(), **context.origin, "inputs": key, "seed": config.seed, "seconds": done.seconds,
            "phantom": done.phantom, "table": done.table, "failed": done.failed,
            "cases": {name: {"folder": record.folder, "files": record.files, "made_by": record.made_by}
                      for name, record in records.items()},
            "config": config.to_dict()})


def summarise(output: Path, context: Context, cases: Sequence[str], records: Mapping[str, Record], tally: Tally,
              worked_on: Sequence[str], changed: dict[str, str]) -> Summary:
    """Summarises a run.

    Args:
      output: the folder of results.
      cases: names of the cases of all shards.
      records: records with the run's key, by case name.
      tally: sums of the finished cases.
      worked_on: names of the cases that this run has processed.
      changed: cases among them whose files were changed meanwhile, with a message.
    """
    finished, results = _finished(records), tally.results()
    phantom = context.phantom or any(record.phantom for record in records.values())
    failed = context.missing | {name: record.failed for name, record in records.items() if record.failed} | changed
    slices = sum(row.slices for row in finished)
    return Summary(
        output, len(finished), sum(name not in failed for name in worked_on),
        len(cases) + len(context.missing) + len(records.keys() - set(cases)), failed, results,
        _table(context.config.model.image_size, tally, results, phantom),
        [output / name for record in records.values() for name in record.files if name.endswith(".png")],
        time.monotonic() - context.start, sum(row.seconds for row in finished) / slices if slices else None, phantom,
        tuple(row.case for row in finished if not row.lesion_slices), frozenset(set(cases) - context.own))


def _finished(records: Mapping[str, Record]) -> list[CaseResult]:
    return [record.row for record in records.values() if record.row]


def _table(size: int, tally: Tally, results: dict[str, dict[str, Any]], phantom: bool) -> str | None:
    if not results:
        return None
    healthy = next(iter(results.values()))["shares"]["healthy"]
    headline = (f"{'PHANTOM metrics' if phantom else 'metrics'} from {tally.cases} case{'s' * (tally.cases != 1)}, "
                f"{tally.slices} slices of {size} x {size} px, {healthy:.0%} of them healthy (an empty mask without a "
                "lesion scores 1 in all-slice metrics); brackets: 95% interval over patients")
    return f"{headline}\n{report.metrics_table(results)}"
