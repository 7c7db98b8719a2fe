"""What a run will do: method, data and cases, checked before anything is computed or written."""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from flax import nnx

from hae_jax.data.cases import CaseFiles, find_cases
from hae_jax.data.store import MANIFEST, Store, open_store
from hae_jax.errors import UserError
from hae_jax.localization.calibration import PRESETS, Calibration, preset
from hae_jax.localization.methods import IntensityThreshold, Method, make_method
from hae_jax.localization.validation import calibration_path
from hae_jax.model.config import FORM_FIELDS
from hae_jax.phantom import cohort as phantom
from hae_jax.pipeline.records import FOLDER, digest

_NOT_IN_CALIBRATION = ("components", "filter_dimensions", "median_mm", "smallest_ml", "save_healthy", "batch_size",
                       "max_memory_gb", "calibration", "ema")
_OWN = {  # settings that one method alone, or those with this beginning, look at
    "residual": ("timesteps", "draws", "weights", "smoothing", "rectify"),
    "hae": ("forward_steps", "reference", "d_reverse", "inversion", "maps", "t_e_ratio", "last_step_only", "every"),
    "ddib": ("ddib_steps", "ddib_start"),
    "anoddpm": ("anoddpm_steps",),
    "classifier": ("classifier_steps", "classifier_scale"),
}
_WITHOUT_INFLUENCE = ("batch_size", "max_memory_gb")  # on any result


class Plan(NamedTuple):
    """The fixed parts of a run."""

    config: ml_collections.ConfigDict
    method: Method
    baseline: IntensityThreshold | None  # measured beside the method, where there is validation data for it
    calibration: Calibration | None  # given by the user; None: to be made on validation slices
    store: Store | None  # the prepared dataset, where there is one
    cases: list[CaseFiles]  # of this shard
    everyone: list[CaseFiles]  # of all shards
    missing: dict[str, str]  # cases that should be there, and why they are not
    phantom: bool  # whether a case is a phantom's
    output: Path


def make_plan(
    config: ml_collections.ConfigDict, output: Path, source: str | Path | None, shard: int = 0, num_shards: int = 1
) -> Plan:
    """Checks everything that can be checked before the network runs, and makes the output folder.

    Args:
      config: the config tree, with `model` and `diffusion` as the network was trained.
      output: folder for the results.
      source: folder of cases; None: the test split of the prepared dataset.
      shard: which part of the cases to work on.
      num_shards: how many parts there are; cases are dealt out one by one.

    Raises:
      UserError: for settings or data that do not fit.
    """
    if not 0 <= shard < num_shards:
        raise UserError(f"--shard {shard} of --num-shards {num_shards}: shards are counted from 0 to "
                        f"{max(num_shards - 1, 0)}")
    _check_numbers(config)
    method = make_method(config)
    if len(config.data.modalities) != config.model.in_channels:
        raise UserError(f"data.modalities names {len(config.data.modalities)} channels "
                        f"({', '.join(config.data.modalities)}), the network has {config.model.in_channels}")
    calibration = _given_calibration(config, method)
    store = _store(config, needed=source is None)
    if source is None:
        everyone, missing = _test_cases(store, config)
    else:
        everyone, missing = find_cases(source, config.data.modalities), {}
    if source is not None and output.resolve() == Path(source).resolve():
        raise UserError(f"{output}: is the folder of the cases themselves; give another one with --output")
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: is a file; give a folder for the results with --output")
    try:
        (output / FOLDER).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise UserError(f"{output}: cannot be made or written to ({error.strerror}: {error.filename}); give another "
                        "folder with --output") from error
    if config.translation.save_healthy and not method.network:
        print(f"save_healthy: the method {method.name} makes no pseudo-healthy reconstructions, so none are written")
    baseline = IntensityThreshold.of(config) if store and method.network and _has_lesions(store) else None
    return Plan(config, method, baseline, calibration, store, everyone[shard::num_shards], everyone, missing,
                any(map(of_phantom, everyone)), output)


def of_phantom(case: CaseFiles) -> bool:
    """Whether a case is a phantom's, as the manifest of its phantom says."""
    folder = case.folder.resolve()
    # Unlike Path.is_file, isfile is also False where a folder is closed to us.
    return any(os.path.isfile(parent / phantom.MANIFEST) for parent in (folder, *list(folder.parents)[:2]))


def _check_numbers(config: ml_collections.ConfigDict) -> None:
    wanted = config.translation
    if wanted.components < 0:
        raise UserError(f"translation.components is {wanted.components}: it must not be negative; 0 removes nothing")
    if wanted.batch_size < 1:
        raise UserError(f"translation.batch_size is {wanted.batch_size}: it must be at least 1")
    if wanted.filter_dimensions not in (2, 3):
        raise UserError(f"translation.filter_dimensions is {wanted.filter_dimensions}: choose 2, each slice "
                        "alone, or 3")
    if config.evaluation.overlay_slices < 0:
        raise UserError(f"evaluation.overlay_slices is {config.evaluation.overlay_slices}: it must not be negative; 0 "
                        "draws nothing")
    if wanted.max_memory_gb is not None and not 0 < wanted.max_memory_gb < math.inf:
        raise UserError(f"--max-memory {wanted.max_memory_gb:g}: give the gigabytes that a device may use, more than 0")


def fingerprint(model: nnx.Module, config: ml_collections.ConfigDict) -> str:
    """SHA-256 of a network's parameters and of how they are used, since a folder's name says little.

    A folder can be trained anew, and the same weights can be imported with another schedule or number of heads.
    """
    network = {name: value for name, value in config.model.to_dict().items() if name not in FORM_FIELDS}
    used = [network, config.diffusion.to_dict(), config.data.scaling]
    sha = hashlib.sha256(json.dumps(used, sort_keys=True).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.state(model, nnx.Param)):
        sha.update(jax.tree_util.keystr(path).encode())
        sha.update(np.ascontiguousarray(leaf).tobytes())
    return sha.hexdigest()


def identified(
    identity: Mapping[str, Any], model: nnx.Module | None, config: ml_collections.ConfigDict
) -> dict[str, Any]:
    """A checkpoint's identity with its network's fingerprint, if there is a network."""
    return {**identity, **({} if model is None else {"sha256": fingerprint(model, config)})}


def calibration_inputs(
    config: ml_collections.ConfigDict, store: Store | None, method: Method, identity: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything that a calibration of a method depends on, ready for JSON.

    Args:
      config: the config tree.
      store: the prepared dataset, where there is one.
      method: the run's, or its baseline.
      identity: the network's; a method without network has none.
    """
    data = {"root": config.data.root}
    if store is not None:
        data["manifest_sha256"] = hashlib.sha256((store.root / MANIFEST).read_bytes()).hexdigest()
    wanted = {name: value for name, value in config.translation.to_dict().items()
              if name not in _NOT_IN_CALIBRATION and not _is_of_another_method(name, method.name)}
    wanted["rule"] = method.rule
    if method.rule != "healthy_fpr":
        del wanted["healthy_fpr"]
    if method.name == "hae" and method.rule == "quantile":  # curves alone, which no filter changes
        for name in ("filters", "median", "across_mm", "head_erosion_mm"):
            del wanted[name]
    if not method.network:
        looked_at = ("rule", "healthy_fpr", "filters", "across_mm", "head_erosion_mm", "weights")
        settings = {name: wanted[name] for name in looked_at if name in wanted}
        return {"settings": {"method": method.name, **settings}, "data": data}
    return {"checkpoint": _without_path(identity), "settings": wanted, "seed": config.seed, "data": data}


def run_inputs(plan: Plan, identity: Mapping[str, Any], kept: Path) -> dict[str, Any]:
    """Everything but its own files that a case's results depend on, ready for JSON.

    Args:
      plan: the run.
      identity: the network's.
      kept: folder of calibrations; without a prepared dataset, what lies there decides.
    """
    config = plan.config
    calibration = plan.calibration or calibration_inputs(config, plan.store, plan.method, identity)
    if plan.calibration is None and plan.store is None:
        with contextlib.suppress(UserError):  # there is none: said when one is needed
            calibration["used"] = hashlib.sha256(
                calibration_path(plan.method, None, kept, calibration).read_bytes()).hexdigest()
    return json.loads(json.dumps({
        "checkpoint": _without_path(identity), "seed": config.seed, "image_size": config.model.image_size,
        "modalities": config.data.modalities, "evaluation": config.evaluation.to_dict(),
        "translation": {name: value for name, value in config.translation.to_dict().items()
                        if name not in _WITHOUT_INFLUENCE},
        "calibration": dataclasses.asdict(calibration) if dataclasses.is_dataclass(calibration) else calibration,
        "baseline": plan.baseline is not None}))


def case_digest(inputs: Mapping[str, Any], case: CaseFiles) -> str:
    """What a case's record is recognised by: the run's inputs and the case's files as they are now."""
    channels = [[image.modality, image.path.name, image.volume, image.volumes] for image in case.images]
    return digest(inputs, case.name, channels, [_state(path) for path in case.paths],
                  *([case.problem] if case.problem else []))


def _state(path: Path) -> list[Any]:
    """Name, size and time of a file; the name alone of one that is not there, or that cannot be looked at."""
    try:
        found = path.stat()
    except OSError:
        return [path.name]
    return [path.name, found.st_size, found.st_mtime_ns]


def _is_of_another_method(field: str, method: str) -> bool:
    """Whether a field of `config.translation` is looked at by another method alone."""
    return any(field in own and not method.startswith(name) for name, own in _OWN.items())


def _without_path(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Runs are moved and copied; their parameters stay the same."""
    return {name: value for name, value in identity.items() if name != "path"}


def _given_calibration(config: ml_collections.ConfigDict, method: Method) -> Calibration | None:
    name = config.translation.calibration
    if name is None:
        return None
    published = method.name == "hae" and method.rule == "quantile"
    of_published = name in PRESETS or _is_published(Path(name))
    if of_published != published and (name in PRESETS or Path(name).is_file()):
        of_this = "--method hae and its own rule" if of_published else "another method or rule"
        raise UserError(f"--calibration {name}: is for {of_this}, and this run has the method {method.name} with the "
                        f"rule {method.rule}; leave it out, or take one that this method has made")
    found = preset(name) if name in PRESETS else _users_calibration(name, method)
    if published and found.modality != tuple(config.translation.modality):
        raise UserError(f"--calibration {name}: made for the modalities {found.modality}, but translation.modality is "
                        f"{tuple(config.translation.modality)}")
    made_with = found.made_with.get("settings", found.made_with)
    for field, value in made_with.items():
        if field in config.translation and json.dumps(value) != json.dumps(config.translation[field]):
            print(f"calibration: {name} was made with {field} {value}, this run has {config.translation[field]}; its "
                  "threshold may not fit")
    return found


def _users_calibration(name: str, method: Method) -> Calibration:
    try:
        return method.load_calibration(name)
    except UserError as error:
        # What follows the last semicolon is advice for files of our own, such as to delete them.
        what = str(error).rpartition("; ")[0]
        presets = f" (a file, or {', '.join(PRESETS)})" if method.name == "hae" else ""
        raise UserError(f"--calibration {what}; give another{presets}, or leave --calibration out") from error


def _is_published(path: Path) -> bool:
    """Whether a calibration's file is the forward process's own; what cannot be read is for `load` to complain of."""
    try:
        fields = json.loads(path.read_text())
    except (OSError, ValueError):
        return True
    return not isinstance(fields, dict) or "method" not in fields


def _store(config: ml_collections.ConfigDict, needed: bool) -> Store | None:
    root = Path(config.data.root)
    if not needed and not (root / MANIFEST).is_file():
        return None
    store = open_store(root)
    found, size = store.manifest["slice_shape"], config.model.image_size
    if found != [size, size, config.model.in_channels]:
        raise UserError(f"{store.root}: its slices are {found} (H, W, channels), the network takes "
                        f"{[size, size, config.model.in_channels]}; name the data that it was trained on with "
                        "--config.data.root")
    if store.modalities not in (None, tuple(config.data.modalities)):
        raise UserError(f"{store.root}: its channels are {', '.join(store.modalities)}, data.modalities says "
                        f"{', '.join(config.data.modalities)}; give --config.data.modalities in the store's order")
    return store


def _has_lesions(store: Store) -> bool:
    return bool(store.split("val").rows["labels"].any())


def _test_cases(store: Store, config: ml_collections.ConfigDict) -> tuple[list[CaseFiles], dict[str, str]]:
    """The cases of the test split on their own grid, and those that have gone from the folder they were read from."""
    names, folder = store.manifest["split"]["test"], store.manifest["source"]
    if not names:
        raise UserError(f"{store.root}: its test split is empty; give cases with --input FOLDER")
    try:
        found = {case.name: case for case in find_cases(folder, config.data.modalities)}
    except UserError as error:
        raise UserError(f"{store.root}: the cases that it was prepared from are not there ({error}); give cases with "
                        "--input FOLDER") from error
    missing = {name: f"{folder}: the case is not there any more" for name in names if name not in found}
    if len(missing) == len(names):
        raise UserError(f"{folder}: none of the test cases of {store.root} are there; give cases with --input FOLDER")
    return [found[name] for name in sorted(names) if name in found], missing
