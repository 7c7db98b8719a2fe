"""The validation slices of a prepared dataset, and a method's results for them: what a calibration is made from."""

import collections
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from tqdm import tqdm

from hae_jax.data.slices import slice_spacing, to_model_range
from hae_jax.data.splits import patient_of
from hae_jax.data.store import Store
from hae_jax.localization.batched import Slice
from hae_jax.localization.map_threshold import ValidationSlice

_SPLIT = "val"
_READ_AT_ONCE = 64  # slices

Translator = Callable[[Iterable[Slice]], Iterator[tuple[Slice, Any]]]


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
