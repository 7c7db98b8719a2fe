"""A run: a folder of cases through calibration, translation and masks to volumes, pictures and metrics.

Joins the other files of this room in the order of the data; `hae_jax.commands.translate` calls it with a network.
"""

import contextlib
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections
from flax import nnx
from jax.sharding import Mesh

from hae_jax.data.cases import CaseFiles
from hae_jax.errors import UserError
from hae_jax.evaluation import report
from hae_jax.files import one_at_a_time, remove_leftovers, written_whole
from hae_jax.localization.batched import IntensityReader, SliceTranslator
from hae_jax.localization.validation import calibrated, fits
from hae_jax.pipeline import records
from hae_jax.pipeline.gathering import (
    BASELINE,
    CALIBRATION,
    CASES,
    MANIFEST,
    Report,
    gathered,
    made_with,
    record_of,
    withdraw_tables,
)
from hae_jax.pipeline.per_case import Calibrations, process_cases
from hae_jax.pipeline.plan import Plan, calibration_inputs, identified, make_plan, run_inputs


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
    shipped: str | Path | None = None,
) -> Report:
    """Calibrates a method on the validation slices and translates cases.

    Writes <case>_mask.nii.gz (empty in slices that are called healthy), <case>_map.nii.gz, <case>_overlay.png and, if
    asked for, <case>_healthy_<modality>.nii.gz for each case, and calibration.json, cases.csv, metrics.json,
    manifest.json.
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
      shipped: the file of a calibration that came with the weights, used if it was made with this network, method and
        settings; it need not exist.

    Raises:
      UserError: for settings or data that do not fit.
    """
    clock = time.monotonic()
    plan = make_plan(config, Path(output), source, shard, num_shards)
    identity = identified(identity, model, config)
    plan = plan._replace(calibration=plan.calibration or shipped_calibration(plan, identity, shipped))
    if plan.method.name == "classifier" and not hasattr(model, "classifier"):
        raise UserError("translation.method is 'classifier': it needs a classifier; name its run with --classifier")
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
    for folder in (plan.output, plan.output / records.FOLDER, kept):
        remove_leftovers(folder)
    inputs = run_inputs(plan, identity, kept)
    if not (plan.output / CASES).exists():
        report.write_cases(plan.output / CASES, [])  # with the records, what lies here is no longer taken for cases
    cases = [case for case in plan.cases
             if overwrite or (record := record_of(plan, inputs, case)) is None or record.failed is not None]
    if not overwrite:
        _check_namesakes(plan, cases)
    unrecorded = {}
    # Without cases to do, what lies here may still be another run's, that has added its cases with other settings.
    if cases or (plan.cases and made_with(plan.output / MANIFEST) != inputs):
        translator = _translator(plan, model, mesh)
        made = _calibrations(plan, translator, identity, kept)
        withdraw_tables(plan, inputs, cases)
        _save(made, plan.output)
    if cases:
        model_config = plan.config.model
        translator.prepare((model_config.image_size, model_config.image_size, model_config.in_channels))
        unrecorded = process_cases(plan, cases, translator, made, inputs)
    origin = {"checkpoint": identity, "devices": [str(device) for device in mesh.devices.flat], "inputs": inputs}
    return gathered(plan, inputs, origin, cases, unrecorded, clock)


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


def shipped_calibration(plan: Plan, identity: Mapping[str, Any], path: str | Path | None) -> Any | None:
    """The calibration that came with the weights, if it was made with this network, method and settings."""
    if path is None or not Path(path).is_file():
        return None
    try:
        found = plan.method.load_calibration(path)
    except UserError:  # of another method or rule
        return None
    if not fits(found, calibration_inputs(plan.config, plan.store, plan.method, identity)):
        return None
    print(f"calibration: {path} came with the weights")
    return found


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
    """Those of the method and its baseline: given, or kept in `folder`, or made and kept there."""
    baseline = plan.baseline
    inputs = calibration_inputs(plan.config, plan.store, plan.method, identity)
    return Calibrations(
        plan.calibration or calibrated(translator, plan.method, plan.store, folder, inputs, plan.config.data.scaling),
        baseline and calibrated(IntensityReader(baseline.intensity), baseline, plan.store, folder,
                             calibration_inputs(plan.config, plan.store, baseline, identity)))


def _save(made: Calibrations, output: Path) -> None:
    made.method.save(output / CALIBRATION)
    if made.baseline is None:
        (output / BASELINE).unlink(missing_ok=True)
    else:
        made.baseline.save(output / BASELINE)


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
