"""From the validation slices of a prepared dataset to a calibration, which is kept and used again.

Stands between `batched.py`, which translates the slices, and the methods, which do the arithmetic.
"""

import collections
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from hae_jax.data.slices import patient_of, slice_spacing, to_model_range
from hae_jax.data.store import Store
from hae_jax.errors import UserError
from hae_jax.files import one_at_a_time
from hae_jax.localization.batched import Slice
from hae_jax.localization.calibration import PRESETS
from hae_jax.localization.map_threshold import ValidationSlice
from hae_jax.pipeline.records import digest

_SPLIT = "val"
_READ_AT_ONCE = 64  # slices

Translator = Callable[[Iterable[Slice]], Iterator[tuple[Slice, Any]]]


def calibrated(
    translator: Translator, method: Any, store: Store | None, folder: Path, made_with: Mapping[str, Any],
    scaling: str = "slice",
) -> Any:
    """The calibration of a method: that in `folder` which was made with exactly the same, else a new one, saved there.

    Without a prepared dataset, one that was made with the same network and settings will do: that of a run which was
    calibrated elsewhere. Of several processes that want the same one, the first makes it and the others wait.

    Args:
      translator: the method at work, a `SliceTranslator` or an `IntensityReader`.
      method: see `hae_jax.localization.methods`.
      store: the prepared dataset, of which the validation slices are used, with what of their labels and masks the
        method asks for.
      folder: where calibrations are kept, made if absent.
      made_with: everything that the result depends on, ready for JSON: "checkpoint", "settings", "seed", "data".
      scaling: of the slices, the network's (`to_model_range`).

    Raises:
      UserError: if there is no validation data, not both kinds of slices in it, or the file is damaged.
    """
    made_with = json.loads(json.dumps(made_with))  # as it is read back: tuples become lists
    path = calibration_path(method, store, folder, made_with)
    if not path.exists():
        with one_at_a_time(path.with_name(f".{path.name}.lock"), lambda: print(
                f"calibration: another process is making {path}; waiting for it", flush=True)):
            if not path.exists():
                made = method.calibrate(validation_results(translator, store, scaling), made_with)
                made.save(path)
                return _said(made)
    print(f"calibration: {path} is used again")
    return _said(method.load_calibration(path))


def _said(made: Any) -> Any:
    if hasattr(made, "described"):
        print(f"calibration: {made.method}, {made.described()}")
    return made


def calibration_path(method: Any, store: Store | None, folder: Path, made_with: Mapping[str, Any]) -> Path:
    """The file that `calibrated` reads, or makes; nothing is computed. The arguments are the same.

    Raises:
      UserError: if there is neither a fitting calibration nor validation data to make one.
    """
    made_with = json.loads(json.dumps(made_with))
    if store is None:
        return same_but_for_data(method, folder, made_with)
    path = folder / f"{method.name}_{digest(made_with)[:12]}.json"
    if not path.exists() and len(store.split(_SPLIT)) == 0:
        raise UserError(f"{store.root}: its validation split is empty, and calibration needs slices with labels; "
                        "prepare the data with a larger --val-fraction")
    return path


def same_but_for_data(method: Any, folder: Path, made_with: Mapping[str, Any]) -> Path:
    """The newest calibration in `folder` that differs from the wanted one in its data alone."""
    for path in sorted(folder.glob(f"{method.name}_*.json"), key=lambda path: path.stat().st_mtime, reverse=True):
        if fits(method.load_calibration(path), made_with):
            return path
    fitting = _fitting_presets(method, made_with)
    raise UserError(
        f"calibration: neither data.root ({made_with['data']['root']}) holds a prepared dataset, whose validation "
        f"slices would be needed, nor {folder} a calibration of this network with these settings; prepare data, or "
        f"name a calibration.json{f' or a preset ({fitting})' if fitting else ''} with --calibration")


def fits(calibration: Any, made_with: Mapping[str, Any]) -> bool:
    """Whether a calibration was made with this network and these settings, on whatever data."""
    found, wanted = ({name: value for name, value in json.loads(json.dumps(own)).items() if name != "data"}
                     for own in (calibration.made_with, made_with))
    return found == wanted


def _fitting_presets(method: Any, made_with: Mapping[str, Any]) -> str:
    """The published calibrations that a run with these settings could take: they are the forward process's own."""
    if method.name != "hae":
        return ""
    modality = tuple(made_with["settings"]["modality"])
    return ", ".join(name for name, preset in PRESETS.items() if preset.modality == modality)


def validation_results(
    translator: Translator, store: Store, scaling: str, chosen: np.ndarray | None = None, doing: str = "calibrating"
) -> Iterator[tuple[Any, ValidationSlice]]:
    """The method's result of each validation slice, and what is known of the slice, in stored order.

    Args:
      chosen: rows of the split, rising; None: all.
      doing: what the progress bar says.
    """
    known, reader = collections.deque(), store.split(_SPLIT)
    chosen = np.arange(len(reader)) if chosen is None else chosen
    heights = heights_in_head(reader.rows["cases"], reader.rows["slices"])

    def slices() -> Iterator[Slice]:
        for start in range(0, len(chosen), _READ_AT_ONCE):
            own = chosen[start:start + _READ_AT_ONCE]
            rows = reader.read(own)
            images = to_model_range(rows["image"], scaling)
            described = describe_slices(store, rows, heights[own])
            known.extend(described)
            for image, intensity, item in zip(images, rows["image"], described, strict=True):
                yield Slice(image, item.case, item.position, intensity)

    with tqdm(total=len(chosen), desc=doing, unit="slice") as bar:
        for _, result in translator(slices()):
            yield result, known.popleft()
            bar.update()


def describe_slices(
    store: Store,
    rows: dict[str, np.ndarray],  # of `SplitReader.read`
    heights: np.ndarray,  # [S] of `heights_in_head`
) -> list[ValidationSlice]:
    """What is known of slices that were read from a store."""
    found = []
    for i, number in enumerate(rows["case"]):
        case = store.cases[number]
        found.append(ValidationSlice(
            int(rows["label"][i]), rows["mask"][i] > 0, rows["image"][i].any(axis=-1), float(heights[i]),
            case.get("patient") or patient_of(case["name"]), case["name"], int(rows["slice"][i]),
            slice_spacing(case["affine"], case["shape"], rows["image"].shape[1])))
    return found


def heights_in_head(
    cases: np.ndarray,  # [N] number of each slice's case
    slices: np.ndarray,  # [N] its position in the volume
) -> np.ndarray:  # [N]
    """Where slices lie in their heads: 0 the lowest one of a case, 1 the highest."""
    heights = np.zeros(len(cases))
    for case in np.unique(cases):
        own = cases == case
        low, high = slices[own].min(), slices[own].max()
        heights[own] = (slices[own] - low) / max(high - low, 1)
    return heights
