"""Cache keys: all that a calibration, a run or a case's results depend on, as values for JSON.

If the key of existing results differs from the current one, they are computed again. Only this module defines keys.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from flax import nnx

from hae_jax.data.cases import CaseFiles
from hae_jax.data.store import MANIFEST, Store
from hae_jax.localization.calibration import Calibration, MapThreshold
from hae_jax.localization.methods import Method
from hae_jax.model.config import FORM_FIELDS

_NOT_IN_CALIBRATION = ("components", "filter_dimensions", "median_mm", "smallest_ml", "save_healthy",
                       "save_probability", "batch_size", "max_memory_gb", "calibration", "ema")
_OWN = {  # settings that only the method with this name, or with a name that begins so, uses
    "residual": ("timesteps", "draws", "rounds", "weights", "smoothing", "rectify"),
    "hae": ("forward_steps", "reference", "d_reverse", "inversion", "maps", "t_e_ratio", "last_step_only", "every"),
    "ddib": ("ddib_steps", "ddib_start"),
    "anoddpm": ("anoddpm_steps",),
    "classifier": ("classifier_steps", "classifier_scale"),
}
_WITHOUT_INFLUENCE = ("batch_size", "max_memory_gb")  # no result depends on them


def digest(*parts: Any) -> str:
    """SHA-256 of values that JSON can store."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def weights_hash(model: nnx.Module, config: ml_collections.ConfigDict) -> str:
    """SHA-256 of a network's parameters and of the settings with which they are used.

    A folder can be trained anew, and the same weights can be imported with another schedule or number of heads.
    """
    network = {name: value for name, value in config.model.to_dict().items() if name not in FORM_FIELDS}
    used = [network, config.diffusion.to_dict(), config.data.scaling]
    sha = hashlib.sha256(json.dumps(used, sort_keys=True).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.state(model, nnx.Param)):
        sha.update(jax.tree_util.keystr(path).encode())
        sha.update(np.ascontiguousarray(leaf).tobytes())
    return sha.hexdigest()


def calibration_key(
    config: ml_collections.ConfigDict, store: Store | None, method: Method, identity: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything that a calibration of a method depends on.

    Args:
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
    if method.name == "hae" and method.rule == "quantile":  # uses only curves, which filters do not change
        for name in ("filters", "median", "across_mm", "head_erosion_mm"):
            del wanted[name]
    if not method.network:
        looked_at = ("rule", "healthy_fpr", "filters", "across_mm", "head_erosion_mm", "weights")
        settings = {name: wanted[name] for name in looked_at if name in wanted}
        return _as_read({"settings": {"method": method.name, **settings}, "data": data})
    return _as_read({"checkpoint": _without_path(identity), "settings": wanted, "seed": config.seed, "data": data})


def run_key(
    config: ml_collections.ConfigDict, identity: Mapping[str, Any],
    calibration: Calibration | MapThreshold | Mapping[str, Any], baseline: bool,
) -> dict[str, Any]:
    """Everything that a case's results depend on, except for the case's own files.

    Args:
      identity: the network's.
      calibration: the method's; where it is made on validation slices, its `calibration_key`.
      baseline: whether the intensity threshold is measured beside the method.
    """
    return _as_read({
        "checkpoint": _without_path(identity), "seed": config.seed, "image_size": config.model.image_size,
        "modalities": config.data.modalities, "overlay_slices": config.evaluation.overlay_slices,
        "translation": {name: value for name, value in config.translation.to_dict().items()
                        if name not in _WITHOUT_INFLUENCE},
        "calibration": calibration if isinstance(calibration, Mapping) else dataclasses.asdict(calibration),
        "baseline": baseline})


def case_key(run: Mapping[str, Any], case: CaseFiles) -> str:
    """The key of a case's results, from the run's key, the patient and the current state of the case's files."""
    channels = [[image.modality, image.path.name, image.volume, image.volumes] for image in case.images]
    return digest(run, case.name, case.patient, channels, [_state(path) for path in case.paths],
                  *([case.problem] if case.problem else []))


def _state(path: Path) -> list[Any]:
    """Name, size and modification time of a file; only the name if it is missing or inaccessible."""
    try:
        found = path.stat()
    except OSError:
        return [path.name]
    return [path.name, found.st_size, found.st_mtime_ns]


def _is_of_another_method(field: str, method: str) -> bool:
    """Whether only other methods use a field of `config.translation`."""
    return any(field in own and not method.startswith(name) for name, own in _OWN.items())


def _without_path(identity: Mapping[str, Any]) -> dict[str, Any]:
    """The identity without the path, since a moved or copied run has the same parameters."""
    return {name: value for name, value in identity.items() if name != "path"}


def _as_read(value: dict[str, Any]) -> dict[str, Any]:
    """The value in the form that is read back from JSON, with lists in place of tuples."""
    return json.loads(json.dumps(value))
