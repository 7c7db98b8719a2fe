"""The choice of a run's calibration: the user's, the one beside the weights, a stored one, or a new one.

Calibrations are stored under their key (`cache_key.calibration_key`), so that none is used for another network or
other settings.
"""

import collections
import contextlib
import dataclasses
import json
import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
from tqdm import tqdm

from hae_jax.data.slices import to_model_range
from hae_jax.data.store import Store
from hae_jax.errors import UserError
from hae_jax.files import one_at_a_time, read_json, write_json, written_whole
from hae_jax.localization.batched import Slice, Translator
from hae_jax.localization.calibration import PRESETS, Calibration
from hae_jax.localization.map_threshold import ValidationSlice
from hae_jax.localization.methods import Method
from hae_jax.localization.validation import describe_slices, heights_in_head
from hae_jax.pipeline.cache_key import calibration_key, digest

_LOG = logging.getLogger(__name__)
_READ_AT_ONCE = 64  # slices


def available(
    config: ml_collections.ConfigDict, store: Store | None, method: Method, identity: Mapping[str, Any], folder: Path,
    shipped: str | Path | None = None,
) -> Any | None:
    """The calibration of a method, if it exists without computation.

    In this order: that of `translation.calibration`; that which came with the weights; without a prepared dataset, the
    newest one in `folder` that was made with this network and these settings.

    Args:
      identity: the network's.
      folder: where calibrations are kept.
      shipped: the file of the calibration that came with the weights; it need not exist.

    Returns:
      None: `calibrated` makes it on the validation slices, or finds it in `folder`.

    Raises:
      UserError: if the user's calibration does not fit, or there is neither a calibration nor validation data.
    """
    key = calibration_key(config, store, method, identity)
    found = given(config, method, identity) or _shipped(shipped, method, key)
    if found is not None:
        return found
    if store is None:
        path = newest_for_other_data(method, folder, key)
        _LOG.info("calibration: using %s", path)
        return load_calibration(method, path)
    if not kept_file(method, folder, key).exists() and len(store.split("val")) == 0:
        raise UserError(f"{store.root}: its validation split is empty, and calibration needs slices with labels; "
                        "prepare the data with a larger --val-fraction")
    return None


def calibrated(
    translator: Translator, method: Method, store: Store, folder: Path, key: Mapping[str, Any], scaling: str = "slice"
) -> Any:
    """The calibration with this key: the stored one, else a new one from validation slices, which is then stored.

    If several processes need the same one, the first makes it and the others wait.

    Args:
      translator: the running method, a `SliceTranslator` or an `IntensityReader`.
      store: the prepared dataset. Its validation slices are used, with the labels and masks that the method needs.
      folder: folder of stored calibrations, made if absent.
      key: the result of `cache_key.calibration_key`.
      scaling: the network's scaling of slices (`to_model_range`).

    Raises:
      UserError: a class of slices is missing, or the file is damaged.
    """
    path = kept_file(method, folder, key)
    if path.exists():
        _LOG.info("calibration: using %s", path)
        return _said(load_calibration(method, path))
    with one_at_a_time(path.with_name(f".{path.name}.lock"), lambda: _LOG.info(
            "calibration: another process is making %s; waiting for it", path)):
        if not path.exists():
            made = method.calibrate(validation_results(translator, store, scaling), key)
            write_json(path, dataclasses.asdict(made))
            return _said(made)
    return _said(load_calibration(method, path))


def validation_results(
    translator: Translator, store: Store, scaling: str, chosen: np.ndarray | None = None, doing: str = "calibrating"
) -> Iterator[tuple[Any, ValidationSlice]]:
    """Yields the method's result for each validation slice, with the slice's description, in stored order.

    Args:
      chosen: rows of the split, increasing; None: all.
      doing: text of the progress bar.
    """
    known, reader = collections.deque(), store.split("val")
    chosen = np.arange(len(reader)) if chosen is None else chosen
    heights = heights_in_head(reader.rows["cases"], reader.rows["slices"])

    def slices() -> Iterator[Slice]:
        for start in range(0, len(chosen), _READ_AT_ONCE):
            own = chosen[start:start + _READ_AT_ONCE]
            rows = reader.read(own)
            images = to_model_range(rows["image"], scaling)
            described = describe_slices(store.cases, rows, heights[own])
            known.extend(described)
            for image, intensity, item in zip(images, rows["image"], described, strict=True):
                yield Slice(image, item.case, item.position, intensity)

    with tqdm(total=len(chosen), desc=doing, unit="slice") as bar:
        for _, result in translator(slices()):
            yield result, known.popleft()
            bar.update()


def load_calibration(method: Method, path: str | Path) -> Any:
    """Reads a calibration of a method.

    Raises:
      UserError: the file does not exist, is damaged, or belongs to another method or rule.
    """
    try:
        return method.read_calibration(read_json(path))
    except UserError as error:
        raise UserError(f"{error}; calibrate again") from error
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: {error}; delete it and calibrate again") from error


def kept_file(method: Method, folder: Path, key: Mapping[str, Any]) -> Path:
    """The file that stores the calibration with this key."""
    return folder / f"{method.name}_{digest(key)[:12]}.json"


def newest_for_other_data(method: Method, folder: Path, key: Mapping[str, Any]) -> Path:
    """The newest calibration in `folder` whose key differs from `key` only in the data.

    Raises:
      UserError: if there is none.
    """
    for path in sorted(folder.glob(f"{method.name}_*.json"), key=lambda path: path.stat().st_mtime, reverse=True):
        with contextlib.suppress(UserError):  # of another rule, or damaged
            if fits(load_calibration(method, path), key):
                return path
    fitting = _fitting_presets(method, key)
    raise UserError(
        f"calibration: a calibration is needed. data.root ({key['data']['root']}) has no prepared dataset "
        f"with validation slices, and {folder} has no calibration of this network with these settings; prepare data, "
        f"or give a calibration.json{f' or a preset ({fitting})' if fitting else ''} with --calibration")


def given(config: ml_collections.ConfigDict, method: Method, identity: Mapping[str, Any]) -> Any | None:
    """The calibration of `translation.calibration`; None where that is None. Differences from the run are logged.

    Raises:
      UserError: it does not exist, is damaged, or belongs to another method, rule or choice of channels.
    """
    name = config.translation.calibration
    if name is None:
        return None
    published = method.name == "hae" and method.rule == "quantile"
    of_published = name in PRESETS or _is_published(Path(name))
    if of_published is not None and of_published != published:
        of_this = "--method hae and its own rule" if of_published else "another method or rule"
        raise UserError(f"--calibration {name}: is for {of_this}, but this run has the method {method.name} with "
                        f"the rule {method.rule}; leave it out, or give one of this method")
    found = PRESETS[name] if name in PRESETS else _from_file(name, method)
    if published and found.modality != tuple(config.translation.modality):
        raise UserError(f"--calibration {name}: was made for the modalities {found.modality}, but translation.modality "
                        f"is {tuple(config.translation.modality)}")
    made = dict(found.made_with.get("settings", found.made_with))
    made.pop("rule", None)  # another rule is refused before
    for field, value in made.items():
        if field in config.translation and json.dumps(value) != json.dumps(config.translation[field]):
            _LOG.info("calibration: %s was made with %s %s, but this run has %s; the threshold may not fit", name,
                      field, value, config.translation[field])
    if found.made_with.get("checkpoint", {}).get("sha256") not in (None, identity.get("sha256")):
        _LOG.info("calibration: %s belongs to another network; the threshold may not fit", name)
    return found


def fits(calibration: Any, key: Mapping[str, Any]) -> bool:
    """Whether a calibration was made with this network and these settings, on any data."""
    found, wanted = ({name: value for name, value in own.items() if name != "data"}
                     for own in (json.loads(json.dumps(calibration.made_with)), key))
    return found == wanted


def writable(folder: str | Path | None, otherwise: Path) -> Path:
    """`folder`, made if absent; `otherwise` where it is None or can only be read.

    The calibrations in a folder that can only be read are copied to `otherwise`.
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
                    shutil.copy2(path, temporary)  # keeps its time, by which the newest is found
    return otherwise


def _said(made: Any) -> Any:
    if hasattr(made, "described"):
        _LOG.info("calibration: %s, %s", made.method, made.described())
    return made


def _fitting_presets(method: Method, key: Mapping[str, Any]) -> str:
    """The names of the presets that fit these settings. Only the forward process has presets."""
    if method.name != "hae":
        return ""
    modality = tuple(key["settings"]["modality"])
    return ", ".join(name for name, preset in PRESETS.items() if preset.modality == modality)


def _shipped(path: str | Path | None, method: Method, key: Mapping[str, Any]) -> Any | None:
    """The calibration beside the weights, if it was made with this network, method and settings."""
    if path is None or not Path(path).is_file():
        return None
    try:
        found = load_calibration(method, path)
    except UserError:  # of another method or rule
        return None
    if not fits(found, key):
        return None
    _LOG.info("calibration: using %s, which came with the weights", path)
    return found


def _from_file(name: str, method: Method) -> Calibration:
    try:
        return load_calibration(method, name)
    except UserError as error:
        # The advice after the last semicolon, such as to delete the file, is not meant for files of the user.
        what = str(error).rpartition("; ")[0]
        presets = f" (a file, or {', '.join(PRESETS)})" if method.name == "hae" else ""
        raise UserError(f"--calibration {what}; give another{presets}, or leave --calibration out") from error


def _is_published(path: Path) -> bool | None:
    """Whether a file has the published form of a calibration. None if it is no calibration at all."""
    try:
        fields = read_json(path)
    except UserError:
        return None
    if not isinstance(fields, dict) or not {"method", "diff_max"} & fields.keys():
        return None
    return "method" not in fields
