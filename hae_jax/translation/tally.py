"""What the finished cases of a run add up to, for several methods side by side.

Filled case by case in `run.py`; `evaluation` does the measuring. Everything is kept at network resolution, so that
thousands of slices fit into memory.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from hae_jax.evaluation import metrics
from hae_jax.translation.masks import Masks
from hae_jax.translation.volume import SlicedCase, mask_volume

VOLUMES = ("on each case's own grid; lesion_dice: mean volume Dice over the cases with a lesion; healthy_ml: mean "
           "volume of the mask in the cases without one")


class Tally:
    """Collects the cases that have a segmentation; the others have nothing to be measured against."""

    def __init__(self):
        self._truth: list[np.ndarray] = []  # per case [S, H, W] bool
        self._foreground: list[np.ndarray] = []
        self._masks: dict[str, list[Masks]] = {}
        self._volumes: dict[str, list[tuple[bool, float]]] = {}  # per case: has a lesion; its Dice, or the mask's ml

    @property
    def cases(self) -> int:
        """Number of cases that count."""
        return len(self._truth)

    @property
    def slices(self) -> int:
        """Number of their slices."""
        return sum(map(len, self._truth))

    def add(self, case: SlicedCase, answers: Mapping[str, Masks]) -> None:
        """Adds a case with every method's answer. The methods must be the same each time."""
        if case.truth is None:
            return
        self._truth.append(case.slice_truth)
        self._foreground.append(metrics.foreground(case.inputs))
        for method, masks in answers.items():
            self._masks.setdefault(method, []).append(masks)
            self._volumes.setdefault(method, []).append(_volume_score(case, masks))

    def results(self) -> dict[str, dict[str, Any]]:
        """For each method `metrics.slice_metrics`, and "volumes" (see `VOLUMES`). Empty without cases."""
        if not self._truth:
            return {}
        truth, foreground = np.concatenate(self._truth), np.concatenate(self._foreground)
        labels = truth.any(axis=(1, 2)).astype(int)  # as in a prepared dataset
        found = {}
        for method, parts in self._masks.items():
            masks = Masks(*map(np.concatenate, zip(*parts, strict=True)))
            found[method] = metrics.slice_metrics(
                mask=masks.mask, mask_all=masks.mask_all, map=masks.map, lesion=masks.lesion, truth=truth,
                labels=labels, foreground=foreground) | {"volumes": _summary(self._volumes[method])}
        return found


def _volume_score(case: SlicedCase, masks: Masks) -> tuple[bool, float]:
    predicted = mask_volume(masks.mask, case.slices)
    if case.truth.any():
        return True, metrics.volume_dice(predicted, case.truth)
    return False, metrics.volume_ml(predicted, case.affine)


def _summary(scores: list[tuple[bool, float]]) -> dict[str, float | int | None]:
    dice, millilitres = ([value for lesion, value in scores if lesion == kind] for kind in (True, False))
    return {
        "lesion_cases": len(dice),
        "lesion_dice": float(np.mean(dice)) if dice else None,
        "healthy_cases": len(millilitres),
        "healthy_ml": float(np.mean(millilitres)) if millilitres else None,
    }
