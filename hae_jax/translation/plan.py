"""What a run will do: settings, data and cases, checked before anything is computed or written."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from flax import nnx

from hae_jax.data import phantom
from hae_jax.data.cases import CaseFiles, find_cases
from hae_jax.data.store import MANIFEST, Store, open_store
from hae_jax.diffusion.process import Process
from hae_jax.diffusion.schedule import make_schedule
from hae_jax.errors import UserError
from hae_jax.translation.forward_process import ForwardSettings

_CURVE_FIELDS = ("forward_steps", "respacing", "guidance", "reference", "d_reverse", "modality", "clipping")


class Plan(NamedTuple):
    """The fixed parts of a run."""

    config: ml_collections.ConfigDict
    process: Process
    settings: ForwardSettings
    store: Store
    cases: list[CaseFiles]
    missing: dict[str, str]  # cases that should be there, and why they are not
    phantom: bool  # whether the cases are a phantom's
    output: Path


def make_plan(config: ml_collections.ConfigDict, output: Path, source: str | Path | None) -> Plan:
    """Checks everything that can be checked before the network runs, and makes the output folder.

    Args:
      config: the config tree, with `model` and `diffusion` as the network was trained.
      output: folder for the results.
      source: folder of cases; None: the test split of the prepared dataset.

    Raises:
      UserError: for settings or data that do not fit.
    """
    process, settings = forward_setup(config)
    store = open_store(config.data.root)
    _check_slices(store, config)
    cases, missing = _test_cases(store) if source is None else (find_cases(source), {})
    folder = cases[0].images[0].parent
    is_phantom = any((parent / phantom.MANIFEST).is_file() for parent in (folder, folder.parent))
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: is a file; give a folder for the results with --output")
    output.mkdir(parents=True, exist_ok=True)
    return Plan(config, process, settings, store, cases, missing, is_phantom, output)


def forward_setup(config: ml_collections.ConfigDict) -> tuple[Process, ForwardSettings]:
    """The diffusion process, respaced for translation, and the walk along it.

    `translation.forward_steps` counts original steps: of a respaced schedule, those retained below it are walked.

    Raises:
      UserError: for values that do not fit.
    """
    diffusion, wanted = config.diffusion, config.translation
    if not 1 <= wanted.forward_steps <= diffusion.steps:
        raise UserError(f"translation.forward_steps is {wanted.forward_steps}: it must be in 1..{diffusion.steps} "
                        "(diffusion.steps)")
    schedule = make_schedule(diffusion.schedule, diffusion.steps, wanted.respacing)
    steps = int(np.count_nonzero(schedule.timesteps < wanted.forward_steps))
    settings = ForwardSettings(steps, wanted.guidance, wanted.reference, wanted.d_reverse, tuple(wanted.modality))
    if max(settings.modality) >= config.model.in_channels:
        raise UserError(f"translation.modality is {settings.modality}: the network has only {config.model.in_channels} "
                        f"channels, 0 to {config.model.in_channels - 1}")
    return Process(schedule, diffusion.predicts, diffusion.variance, wanted.clipping), settings


def fingerprint(model: nnx.Module) -> str:
    """SHA-256 of a network's parameters: a folder can be trained anew, its name says little."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.state(model, nnx.Param)):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def calibration_inputs(plan: Plan, identity: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that a calibration depends on, ready for JSON.

    Args:
      plan: the run.
      identity: the network's.
    """
    manifest = (plan.store.root / MANIFEST).read_bytes()
    return {
        "checkpoint": dict(identity),
        "settings": {name: plan.config.translation[name] for name in _CURVE_FIELDS},
        "seed": plan.config.seed,
        "data": {"root": str(plan.store.root), "manifest_sha256": hashlib.sha256(manifest).hexdigest()},
    }


def run_inputs(plan: Plan, identity: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that a run's results depend on, ready for JSON: a run that finds it unchanged has nothing to do."""
    files = {str(path): [path.stat().st_size, path.stat().st_mtime_ns]
             for case in plan.cases for path in (*case.images, case.segmentation) if path is not None and path.exists()}
    inputs = calibration_inputs(plan, identity) | {
        "translation": plan.config.translation.to_dict(), "evaluation": plan.config.evaluation.to_dict(),
        "files": files, "missing": plan.missing}
    return json.loads(json.dumps(inputs))  # as it will be read back: tuples become lists


def _check_slices(store: Store, config: ml_collections.ConfigDict) -> None:
    found, size = store.manifest["slice_shape"], config.model.image_size
    if found != [size, size, config.model.in_channels]:
        raise UserError(f"{store.root}: its slices are {found} (H, W, channels), the network takes "
                        f"{[size, size, config.model.in_channels]}; name the data that it was trained on with "
                        "--config.data.root")


def _test_cases(store: Store) -> tuple[list[CaseFiles], dict[str, str]]:
    """The cases of the test split on their own grid, and those that have gone from the folder they were read from."""
    names, folder = store.manifest["split"]["test"], store.manifest["source"]
    if not names:
        raise UserError(f"{store.root}: its test split is empty; give cases with --input FOLDER")
    try:
        found = {case.name: case for case in find_cases(folder)}
    except UserError as error:
        raise UserError(f"{store.root}: the cases that it was prepared from are not there ({error}); give cases with "
                        "--input FOLDER") from error
    missing = {name: f"{folder}: the case is not there any more" for name in names if name not in found}
    if len(missing) == len(names):
        raise UserError(f"{folder}: none of the test cases of {store.root} are there; give cases with --input FOLDER")
    return [found[name] for name in sorted(names) if name in found], missing
