"""A run: a folder of cases through calibration, translation and masks to volumes, pictures and metrics.

Joins the other files of this room in the order of the data; `hae_jax.commands.translate` calls it with a network.
"""

import contextlib
import dataclasses
import json
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections
from flax import nnx
from jax.sharding import Mesh

from hae_jax import provenance
from hae_jax.data.cases import CaseFiles
from hae_jax.data.slices import patient_of
from hae_jax.errors import UserError
from hae_jax.evaluation import report
from hae_jax.files import one_at_a_time, write_json, written_whole
from hae_jax.translation import records
from hae_jax.translation.batched import IntensityReader, SliceTranslator
from hae_jax.translation.methods import IntensityThreshold
from hae_jax.translation.per_case import Calibrations, process_cases
from hae_jax.translation.plan import Plan, calibration_inputs, case_digest, fingerprint, make_plan, run_inputs
from hae_jax.translation.tally import Tally
from hae_jax.translation.validation import calibrated

MANIFEST = "manifest.json"
CALIBRATION = "calibration.json"
COMPETITOR = f"calibration_{IntensityThreshold.name}.json"
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
        ]

    def _empty(self) -> str:
        more = ", ..." if len(self.unflagged) > _SHOWN else ""
        return (f"{len(self.unflagged)} of {self.finished} cases: no slice was called a lesion slice, so the mask is "
                f"empty ({', '.join(self.unflagged[:_SHOWN])}{more})")

    def _how(self) -> str:
        again = max(self.finished - self.translated, 0)
        parts = [f"{self.translated} cases translated in {self.seconds:.0f} s"] if self.translated or not again else []
        if again:
            parts.append(f"{again} cases were there already, made from the same network, files and settings "
                         "(--overwrite makes them anew)")
        if left := max(self.wanted - self.finished - len(self.failed), 0):
            parts.append(f"{left} are left to other shards")
        return ", ".join(parts)


def translate(
    model: nnx.Module | None,
    identity: Mapping[str, Any],
    config: ml_collections.ConfigDict,
    mesh: Mesh,
    *,
    output: str | Path,
    source: str | Path | None = None,
    overwrite: bool = False,
    shard: int = 0,
    num_shards: int = 1,
    calibrations: str | Path | None = None,
) -> Report:
    """Calibrates a method on the validation slices and translates cases.

    Writes <case>_mask.nii.gz (the mask of the "mixed" setting), <case>_map.nii.gz, <case>_overlay.png and, if asked
    for, <case>_healthy_<modality>.nii.gz for each case, and calibration.json, cases.csv, metrics.json, manifest.json.
    Cases that are finished are not done again; one that fails is reported, the others go on.

    Args:
      model: the network; None for a method that needs none.
      identity: where it comes from, ready for JSON.
      config: the config tree; `model` and `diffusion` are those of the network's training.
      mesh: the devices.
      output: folder for the results, made if absent; several shards may share it.
      source: folder of cases; None: the test split of `data.root`, from the folder that it was prepared from.
      overwrite: work again on cases that are finished.
      shard: which part of the cases to work on.
      num_shards: how many parts there are.
      calibrations: folder in which calibrations are kept from run to run; None, or one that cannot be written: output.

    Raises:
      UserError: for settings or data that do not fit.
    """
    clock = time.monotonic()
    plan = make_plan(config, Path(output), source, shard, num_shards)
    identity = dict(identity) | ({} if model is None else {"sha256": fingerprint(model, config)})
    _check_network(plan, identity)
    kept = _writable(calibrations, plan.output)
    # Two runs that write the same case's files at once could mix them.
    with one_at_a_time(plan.output / records.FOLDER / f".{shard}-of-{num_shards}.lock", lambda: print(
            f"{plan.output}: another run is at work there; waiting for its end", flush=True)):
        return _run(plan, model, identity, mesh, overwrite, kept, clock)


def _run(
    plan: Plan, model: nnx.Module | None, identity: dict[str, Any], mesh: Mesh, overwrite: bool, kept: Path,
    clock: float,
) -> Report:
    """What `translate` does, once it is alone; `kept` is where calibrations are."""
    inputs = run_inputs(plan, identity, kept)
    if not (plan.output / CASES).exists():
        report.write_cases(plan.output / CASES, [])  # with the records, what lies here is no longer taken for cases
    cases = [case for case in plan.cases
             if overwrite or (record := _record(plan, inputs, case)) is None or record.failed is not None]
    if not overwrite:
        _check_namesakes(plan, cases)
    unrecorded = {}
    # Without cases to do, what lies here may still be another run's, that has added its cases with other settings.
    if cases or (plan.cases and _made_with(plan.output / MANIFEST) != inputs):
        translator = _translator(plan, model, mesh)
        made = _calibrations(plan, translator, identity, kept)
        _withdraw_tables(plan, inputs, cases)
        _save(made, plan.output)
    if cases:
        model_config = plan.config.model
        translator.prepare((model_config.image_size, model_config.image_size, model_config.in_channels))
        unrecorded = process_cases(plan, cases, translator, made, inputs)
    origin = {"checkpoint": identity, "devices": [str(device) for device in mesh.devices.flat], "inputs": inputs}
    return _gathered(plan, inputs, origin, cases, unrecorded, clock)


def _check_namesakes(plan: Plan, cases: Sequence[CaseFiles]) -> None:
    """Refuses to replace the results of another patient whose case has the same name.

    Raises:
      UserError: if the results that are there were made from a case in another folder.
    """
    for case in cases:
        folder, own = records.folder_of_results(plan.output, case.name), str(case.folder.resolve())
        if folder not in ("", own):
            raise UserError(f"{plan.output}: holds results of another case {case.name}, from {folder}; give another "
                            f"folder with --output, or --overwrite to replace them by those of {own}")


def _check_network(plan: Plan, identity: Mapping[str, Any]) -> None:
    """Says aloud when a calibration that the user names belongs to another network."""
    of = {} if plan.calibration is None else plan.calibration.made_with.get("checkpoint", {})
    if of.get("sha256") not in (None, identity.get("sha256")):
        print(f"calibration: {plan.config.translation.calibration} belongs to another network; its threshold may not "
              "fit")


def _translator(plan: Plan, model: nnx.Module | None, mesh: Mesh) -> SliceTranslator | IntensityReader:
    if not plan.method.network:
        return IntensityReader(plan.method.intensity)
    wanted = plan.config.translation
    return SliceTranslator(model, plan.method, batch_size=wanted.batch_size, seed=plan.config.seed, mesh=mesh,
                           conditional=plan.config.model.num_classes is not None, max_memory_gb=wanted.max_memory_gb)


def _calibrations(
    plan: Plan, translator: SliceTranslator | IntensityReader, identity: Mapping[str, Any], folder: Path
) -> Calibrations:
    """Those of the method and its competitor: given, or kept in `folder`, or made and kept there."""
    rival = plan.competitor
    return Calibrations(
        plan.calibration or calibrated(translator, plan.method, plan.store, folder,
                                       calibration_inputs(plan, plan.method, identity)),
        rival and calibrated(IntensityReader(rival.intensity), rival, plan.store, folder,
                             calibration_inputs(plan, rival, identity)))


def _save(made: Calibrations, output: Path) -> None:
    made.method.save(output / CALIBRATION)
    if made.competitor is None:
        (output / COMPETITOR).unlink(missing_ok=True)
    else:
        made.competitor.save(output / COMPETITOR)


def _record(plan: Plan, inputs: Mapping[str, Any], case: CaseFiles) -> records.Record | None:
    """What is there of a case, if it was made of the same."""
    record = records.read(plan.output, case.name)
    return record if record is not None and record.digest == case_digest(inputs, case) else None


def _withdraw_tables(plan: Plan, inputs: dict[str, Any], cases: Sequence[CaseFiles]) -> None:
    """Takes back what the tables say of results that are about to be replaced: a run may be stopped before its end.

    Shards that begin with cases of their own leave the tables of the others alone.
    """
    if _made_with(plan.output / MANIFEST) in (None, inputs) and not any(
            records.has_results(plan.output, case.name) for case in cases):
        return
    replaced = {case.name for case in cases}
    stay = [record.row for name, record in _found(plan, inputs).items() if record.row and name not in replaced]
    report.write_cases(plan.output / CASES, stay)
    for name in (METRICS, MANIFEST, CALIBRATION, COMPETITOR):
        (plan.output / name).unlink(missing_ok=True)


def _made_with(manifest: Path) -> dict[str, Any] | None:
    """The inputs of the run that wrote a manifest; None where there is none, or a damaged one."""
    try:
        return json.loads(manifest.read_text()).get("inputs")
    except (OSError, ValueError, AttributeError):
        return None


def _found(plan: Plan, inputs: Mapping[str, Any]) -> dict[str, records.Record]:
    """The records of all cases that belong to these inputs."""
    return {case.name: record for case in plan.everyone
            if (record := _record(plan, inputs, case))} | _of_other_inputs(plan, inputs)


def _of_other_inputs(plan: Plan, inputs: Mapping[str, Any]) -> dict[str, records.Record]:
    """Cases that the same network and settings have translated into this folder from elsewhere."""
    own = {case.name for case in plan.everyone}
    others = {name: records.read(plan.output, name) for name in records.names(plan.output) if name not in own}
    return {name: record for name, record in others.items()
            if record is not None and record.row is not None and record.run == records.digest(inputs)}


def _writable(folder: str | Path | None, otherwise: Path) -> Path:
    """`folder`, made if absent, or the results' own where networks lie in a place that is only to be read.

    What lies there is used all the same: it is copied.
    """
    if folder is None:
        return otherwise
    with contextlib.suppress(OSError):
        Path(folder).mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return Path(folder)
    with contextlib.suppress(OSError):
        for path in Path(folder).glob("*_????????????.json"):
            if not (otherwise / path.name).exists():
                with written_whole(otherwise / path.name) as temporary:
                    shutil.copy2(path, temporary)  # with its time, by which the newest is found
    return otherwise


def _gathered(
    plan: Plan, inputs: dict[str, Any], origin: dict[str, Any], worked_on: Sequence[CaseFiles],
    unrecorded: Mapping[str, str], clock: float,
) -> Report:
    """Writes what the cases of all shards have in common, from the records that are there.

    Shards may end at the same time; the one that writes last looks once more, so nothing stays out.
    """
    while True:
        found, tally = _found(plan, inputs), Tally()
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
        if all(_record(plan, inputs, case) is None for case in plan.everyone if case.name not in {*found, *unrecorded}):
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
        competitors={name: result for name, result in done.results.items() if name != plan.method.name},
        method=plan.method.name, cases=len(finished), seconds_per_slice=done.seconds_per_slice,
        phantom=done.phantom, image_size=plan.config.model.image_size,
        **origin, settings=plan.config.translation.to_dict(), seed=plan.config.seed)
    if not done.translated and not done.failed and _made_with(plan.output / MANIFEST) == origin["inputs"]:
        return  # it tells of the run that has made the results
    write_json(plan.output / MANIFEST, {
        **provenance.record(), **origin, "seed": plan.config.seed, "seconds": done.seconds, "phantom": done.phantom,
        "table": done.table, "failed": done.failed,
        "folders": {case.name: str(case.folder) for case in plan.everyone if case.name in found},
        "cases": {name: {"files": record.files, "made_by": record.made_by} for name, record in found.items()},
        "config": plan.config.to_dict()})


def _table(plan: Plan, tally: Tally, results: dict[str, dict[str, Any]], phantom: bool) -> str | None:
    if not results:
        return None
    size = plan.config.model.image_size
    healthy = next(iter(results.values()))["shares"]["healthy"]
    headline = (f"{'PHANTOM figures' if phantom else 'figures'} from {tally.cases} cases, {tally.slices} slices "
                f"of {size} x {size} px, {healthy:.0%} of them healthy (where an empty mask scores 1 in 'mixed'); in "
                "brackets the 95% interval over patients")
    return f"{headline}\n{report.metrics_table(results)}"
