"""A run: a folder of cases through calibration, translation and masks to volumes, pictures and metrics.

Joins the other files of this room in the order of the data; `hae_jax.commands.translate` calls it with a network.
"""

import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_collections
from flax import nnx
from jax.sharding import Mesh

from hae_jax import provenance
from hae_jax.evaluation import report
from hae_jax.files import write_json
from hae_jax.translation.batched import SliceTranslator
from hae_jax.translation.calibration import Calibration
from hae_jax.translation.methods import FlairThreshold
from hae_jax.translation.per_case import FLAIR, NETWORK, Outcome, process_cases
from hae_jax.translation.plan import Plan, calibration_inputs, fingerprint, make_plan, run_inputs
from hae_jax.translation.tally import VOLUMES
from hae_jax.translation.validation import calibrated

MANIFEST = "manifest.json"


@dataclasses.dataclass(frozen=True)
class Report:
    """What a run did.

    Attributes:
      output: the folder that holds it.
      finished: number of cases with results.
      failed: why the others have none, by name.
      table: the metrics of network and competitor under a headline; None where no case has a segmentation.
      pictures: the overlays.
      seconds: duration.
      again: whether everything was there already, made from the same, so that nothing was computed.
    """

    output: Path
    finished: int
    failed: dict[str, str]
    table: str | None
    pictures: list[Path]
    seconds: float
    again: bool = False

    def lines(self) -> list[str]:
        """The summary that the command prints."""
        return [
            *(f"failed {name}: {reason}" for name, reason in self.failed.items()),
            self.table or "no case has a segmentation, so there are no metrics",
            f"{self.finished} cases {self._how()}; look at",
            *(f"  {path}" for path in (*self.pictures, self.output / "cases.csv", self.output / "metrics.json")),
            provenance.RESEARCH_USE,
        ]

    def _how(self) -> str:
        if self.again:
            return "are there already, made from the same network, cases and settings (--overwrite makes them anew)"
        return f"translated in {self.seconds:.0f} s"


def translate(
    model: nnx.Module,
    identity: Mapping[str, Any],
    config: ml_collections.ConfigDict,
    mesh: Mesh,
    *,
    output: str | Path,
    source: str | Path | None = None,
    overwrite: bool = False,
) -> Report:
    """Calibrates a network on the validation slices and translates cases.

    Writes <case>_mask.nii.gz (the mask of the "mixed" setting), <case>_map.nii.gz and <case>_overlay.png for each case,
    and calibration.json, cases.csv, metrics.json, manifest.json. A case that fails is reported, the others go on.

    Args:
      model: the network.
      identity: where it comes from, ready for JSON.
      config: the config tree; `model` and `diffusion` are those of the network's training.
      mesh: the devices.
      output: folder for the results, made if absent.
      source: folder of cases; None: the test split of `data.root`, from the folder that it was prepared from.
      overwrite: work again where the same was done already.

    Raises:
      UserError: for settings or data that do not fit.
    """
    clock = time.monotonic()
    plan = make_plan(config, Path(output), source)
    identity = dict(identity) | {"sha256": fingerprint(model)}
    inputs = run_inputs(plan, identity)
    if not overwrite and (report_of_before := _finished(plan, inputs)):
        return report_of_before
    translator = SliceTranslator(model, plan.process, plan.settings, batch_size=config.translation.batch_size,
                                 seed=config.seed, mesh=mesh)
    calibration = calibrated(translator, plan.store, plan.settings.modality, plan.output / "calibration.json",
                             calibration_inputs(plan, identity))
    competitor = FlairThreshold.chosen_on(plan.store.split("val"))
    outcome = process_cases(plan, translator, calibration, competitor)
    results = outcome.tally.results()
    done = Report(plan.output, len(outcome.finished), outcome.failed, _table(plan, outcome, results, competitor),
                  outcome.pictures, time.monotonic() - clock)
    _write(plan, outcome, results, calibration, competitor, done,
           {"checkpoint": identity, "devices": [str(device) for device in mesh.devices.flat], "inputs": inputs})
    return done


def _finished(plan: Plan, inputs: dict[str, Any]) -> Report | None:
    """The report of an earlier run with the same inputs, if all its files are still there."""
    path = plan.output / MANIFEST
    if not path.is_file():
        return None
    before = json.loads(path.read_text())
    if before.get("inputs") != inputs or before["failed"]:
        return None
    pictures = [plan.output / name for name in before["pictures"]]
    volumes = [plan.output / f"{case.name}_{kind}.nii.gz" for case in plan.cases for kind in ("mask", "map")]
    tables = [plan.output / name for name in ("cases.csv", "metrics.json")]
    if not all(file.is_file() for file in pictures + volumes + tables):
        return None
    return Report(plan.output, len(plan.cases), {}, before["table"], pictures, before["seconds"], again=True)


def _write(
    plan: Plan, outcome: Outcome, results: dict[str, dict[str, Any]], calibration: Calibration,
    competitor: FlairThreshold, done: Report, origin: dict[str, Any],
) -> None:
    """Writes what the cases have in common: cases.csv, metrics.json, manifest.json."""
    report.write_cases(plan.output / "cases.csv", outcome.finished)
    report.write_metrics(
        plan.output / "metrics.json", results.get(NETWORK, {}),
        competitors={FLAIR: results.get(FLAIR, {}) | dataclasses.asdict(competitor)},
        volumes=VOLUMES, phantom=plan.phantom, image_size=plan.config.model.image_size, **origin,
        settings=plan.config.translation.to_dict(), seed=plan.config.seed,
        calibration=dataclasses.asdict(calibration))
    write_json(plan.output / MANIFEST, {
        **provenance.record(), **origin, "seed": plan.config.seed, "seconds": done.seconds, "phantom": plan.phantom,
        "table": done.table, "pictures": [path.name for path in done.pictures],
        "cases": {case.name: str(case.images[0].parent) for case in plan.cases}, "failed": outcome.failed,
        "config": plan.config.to_dict()})


def _table(
    plan: Plan, outcome: Outcome, results: dict[str, dict[str, Any]], competitor: FlairThreshold
) -> str | None:
    if not results:
        return None
    size = plan.config.model.image_size
    headline = (f"{'PHANTOM figures' if plan.phantom else 'figures'} from {outcome.tally.cases} cases, "
                f"{outcome.tally.slices} slices of {size} x {size} px (flair threshold {competitor.threshold:.2f}, "
                "chosen on the validation slices by their masks)")
    return f"{headline}\n{report.metrics_table(results)}"
