"""Labels, ground truth and position of the validation slices of a prepared dataset, for calibrations."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hae_jax.data.slices import slice_spacing
from hae_jax.data.splits import patient_of
from hae_jax.localization.map_threshold import ValidationSlice


def describe_slices(
    cases: Sequence[Mapping[str, Any]],  # of `Store.cases`
    rows: dict[str, np.ndarray],  # of `SplitReader.read`
    heights: np.ndarray,  # [S] of `heights_in_head`
) -> list[ValidationSlice]:
    """Describes slices that were read from a store."""
    found = []
    for i, number in enumerate(rows["case"]):
        case = cases[number]
        found.append(ValidationSlice(
            int(rows["label"][i]), rows["mask"][i] > 0, rows["image"][i].any(axis=-1), float(heights[i]),
            case.get("patient") or patient_of(case["name"]), case["name"], int(rows["slice"][i]),
            slice_spacing(case["affine"], case["shape"], rows["image"].shape[1])))
    return found


def heights_in_head(
    cases: np.ndarray,  # [N] number of each slice's case
    slices: np.ndarray,  # [N] its position in the volume
) -> np.ndarray:  # [N]
    """The height of each slice in its head, from 0 for the lowest slice of a case to 1 for the highest."""
    heights = np.zeros(len(cases))
    for case in np.unique(cases):
        own = cases == case
        low, high = slices[own].min(), slices[own].max()
        heights[own] = (slices[own] - low) / max(high - low, 1)
    return heights
