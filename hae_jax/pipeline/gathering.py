"""From the records of finished cases to what a run says of them all: tables, metrics, manifest, summary.

`run.py` calls it before cases are worked on, to know what is there already, and when they are done.
"""

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hae_jax import provenance
from hae_jax.data.cases import CaseFiles
from hae_jax.data.slices import patient_of
from hae_jax.evaluation import report
from hae_jax.files import write_json
from hae_jax.localization.methods import IntensityThreshold
from hae_jax.localization.rules import LABELS
from hae_jax.pipeline import records
from hae_jax.pipeline.plan import Plan, case_digest
from hae_jax.pipeline.tally import Tally
from hae_jax.report.write import PAGE

MANIFEST = "manifest.json"
CALIBRATION = "calibration.json"
BASELINE = f"calibration_{IntensityThreshold.name}.json"
METRICS = "metrics.json"
CASES = "cases.csv"
_SHOWN = 5  # names in a line
_CHANGED = "its files were changed while it was translated; give the command again"


@dataclasses.dataclass(frozen=True)
class Report:
    """What a run did.

    Attributes:
      output: the folder that holds it.
      finished: number of cases with results, of this run and of those before it.
      translated: how many of them this run has worked on.
      wanted: number of cases in all shards.
      failed: why others have none, by name.
      results: the metrics by method; empty where no case has a segmentation.
      table: the same as text under a headline; None where there are none.
      pictures: the overlays.
      seconds: duration of this run.
      seconds_per_slice: of all finished cases, reading and writing included, compilation not.
      phantom: whether a case among them is a phantom's.
      unflagged: names of finished cases in which no slice was called a lesion slice.
      elsewhere: those of the failed that are other shards' cases.
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
            f"{self._how()}; look at",
            *(f"  {path}" for path in (*self.pictures, self.output / CASES, self.output / METRICS)),
            provenance.RESEARCH_USE,
            str(self.output / PAGE),
        ]

    def _empty(self) -> str:
        more = ", ..." if len(self.unflagged) > _SHOWN else ""
        return (f"{len(self.unflagged)} of {self.finished} cases: no slice was called a lesion slice, so the mask is "
                f"empty ({', '.join(self.unflagged[:_SHOWN])}{more})")

    def _how(self) -> str:
        again = self.finished - self.translated
        parts = [f"{self.translated} cases translated in {self.seconds:.0f} s"] if self.translated or not again else []
        if again:
            parts.append(f"{again} cases were there already, made from the same network, files and settings "
                         "(--overwrite makes them anew)")
        if left := self.wanted - self.finished - len(self.failed):
            parts.append(f"{left} are left to other shards")
        return ", ".join(parts)


def record_of(plan: Plan, inputs: Mapping[str, Any], case: CaseFiles) -> records.Record | None:
    """What is there of a case, if it was made of the same."""
    record = records.read(plan.output, case.name)
    return record if record is not None and record.digest == case_digest(inputs, case) else None


def withdraw_tables(plan: Plan, inputs: dict[str, Any], cases: Sequence[CaseFiles]) -> None:
    """Takes back what the tables say of results that are about to be replaced: a run may be stopped before its end.

    Shards that begin with cases of their own leave the tables of the others alone.
    """
    if made_with(plan.output / MANIFEST) in (None, inputs) and not any(
            records.has_results(plan.output, case.name) for case in cases):
        return
    replaced = {case.name for case in cases}
    stay = [record.row for name, record in _found(plan, inputs).items() if record.row and name not in replaced]
    report.write_cases(plan.output / CASES, stay)
    for name in (METRICS, MANIFEST, CALIBRATION, BASELINE):
        (plan.output / name).unlink(missing_ok=True)


def made_with(manifest: Path) -> dict[str, Any] | None:
    """The inputs of the run that wrote a manifest; None where there is none, or a damaged one."""
    try:
        return json.loads(manifest.read_text()).get("inputs")
    except (OSError, ValueError, AttributeError):
        return None


def _found(plan: Plan, inputs: Mapping[str, Any]) -> dict[str, records.Record]:
    """The records of all cases that belong to these inputs."""
    return {case.name: record for case in plan.everyone
            if (record := record_of(plan, inputs, case))} | _of_other_inputs(plan, inputs)


def _of_other_inputs(plan: Plan, inputs: Mapping[str, Any]) -> dict[str, records.Record]:
    """Cases that the same network and settings have translated into this folder from elsewhere."""
    own = {case.name for case in plan.everyone}
    others = {name: records.read(plan.output, name) for name in records.names(plan.output) if name not in own}
    return {name: record for name, record in others.items()
            if record is not None and record.row is not None and record.run == records.digest(inputs)}


def gathered(
    plan: Plan, inputs: dict[str, Any], origin: dict[str, Any], worked_on: Sequence[CaseFiles],
    unrecorded: Mapping[str, str], clock: float,
) -> Report:
    """Writes what the cases of all shards have in common, from the records that are there.

    Shards may end at the same time; the one that writes last looks once more, so nothing stays out.
    """
    while True:
        tally = Tally()
        # What has failed now does not count as finished, though older results of the same may lie there.
        found = {name: record for name, record in _found(plan, inputs).items() if name not in unrecorded}
        for name in [name for name, record in found.items() if record.row]:
            measured = records.read_measured(plan.output, name)
            if records.has_results(plan.output, name):
                tally.add(patient_of(name), measured)
            else:  # another process has begun it anew
                del found[name]
        phantom = plan.phantom or any(record.phantom for record in found.values())
        own = {case.name for case in plan.everyone}
        failed = (plan.missing | {name: record.failed for name, record in found.items() if record.failed}
                  | {case.name: _CHANGED for case in worked_on if case.name not in found} | dict(unrecorded))
        finished = [record.row for record in found.values() if record.row]
        results = tally.results()
        pictures = [plan.output / name for record in found.values() for name in record.files if name.endswith(".png")]
        wanted = len(plan.everyone) + len(plan.missing) + len(found.keys() - own)
        done = Report(plan.output, len(finished), sum(case.name not in failed for case in worked_on), wanted, failed,
                      results, _table(plan, tally, results, phantom), pictures, time.monotonic() - clock,
                      _seconds_per_slice(finished), phantom,
                      tuple(row.case for row in finished if not row.lesion_slices),
                      frozenset(own - {case.name for case in plan.cases}))
        _write(plan, found, finished, done, origin)
        others = [case for case in plan.everyone if case.name not in {*found, *unrecorded}]
        if all(record_of(plan, inputs, case) is None for case in others):
            return done


def _seconds_per_slice(finished: Sequence[report.CaseResult]) -> float | None:
    slices = sum(row.slices for row in finished)
    return sum(row.seconds for row in finished) / slices if slices else None


def _write(
    plan: Plan, found: dict[str, records.Record], finished: list[report.CaseResult], done: Report,
    origin: dict[str, Any],
) -> None:
    report.write_cases(plan.output / CASES, finished)
    own = done.results.get(plan.method.name, {})
    report.write_metrics(
        plan.output / METRICS, own,
        baselines={name: result for name, result in done.results.items() if name != plan.method.name},
        method=plan.method.name, rule=plan.method.rule, labels=LABELS[plan.method.rule],
        cases=len(finished), seconds_per_slice=done.seconds_per_slice,
        phantom=done.phantom, image_size=plan.config.model.image_size,
        **origin, settings=plan.config.translation.to_dict(), seed=plan.config.seed)
    if not done.translated and not done.failed and made_with(plan.output / MANIFEST) == origin["inputs"]:
        return  # it tells of the run that has made the results
    write_json(plan.output / MANIFEST, {
        **provenance.record(), **origin, "seed": plan.config.seed, "seconds": done.seconds, "phantom": done.phantom,
        "table": done.table, "failed": done.failed,
        "cases": {name: {"folder": record.folder, "files": record.files, "made_by": record.made_by}
                  for name, record in found.items()},
        "config": plan.config.to_dict()})


def _table(plan: Plan, tally: Tally, results: dict[str, dict[str, Any]], phantom: bool) -> str | None:
    if not results:
        return None
    size = plan.config.model.image_size
    healthy = next(iter(results.values()))["shares"]["healthy"]
    headline = (f"{'PHANTOM figures' if phantom else 'figures'} from {tally.cases} cases, {tally.slices} slices "
                f"of {size} x {size} px, {healthy:.0%} of them healthy (where an empty mask scores 1 over all slices); "
                "in brackets the 95% interval over patients")
    return f"{headline}\n{report.metrics_table(results)}"
