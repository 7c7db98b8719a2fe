"""What the finished cases of a run add up to, for several methods side by side.

Filled case by case in `run.py`; `evaluation` does the measuring. Everything is kept at network resolution, so that
thousands of slices fit into memory.
"""

from typing import Any

import numpy as np

from hae_jax.evaluation import metrics, volumes
from hae_jax.translation.masks import Masks
from hae_jax.translation.records import Measured


class Tally:
    """Collects the cases that have a segmentation; the others have nothing to be measured against."""

    def __init__(self):
        self._cases: list[Measured] = []

    @property
    def cases(self) -> int:
        """Number of cases that count."""
        return len(self._cases)

    @property
    def slices(self) -> int:
        """Number of their slices."""
        return sum(len(case.truth) for case in self._cases)

    def add(self, case: Measured | None) -> None:
        """Adds a case with every method's answer; None, a case without a segmentation, is passed over."""
        if case is not None:
            self._cases.append(case)

    def results(self) -> dict[str, dict[str, Any]]:
        """For each method that answered for every case: `metrics.slice_metrics`, and "volumes". Empty without cases."""
        if not self._cases:
            return {}
        truth = np.concatenate([case.truth for case in self._cases])
        foreground = np.concatenate([case.foreground for case in self._cases])
        labels = truth.any(axis=(1, 2)).astype(int)  # as in a prepared dataset
        found = {}
        for method in self._cases[0].answers:
            if not all(method in case.answers for case in self._cases):
                continue
            answers = [case.answers[method] for case in self._cases]
            masks = Masks(*map(np.concatenate, zip(*(answer.masks for answer in answers), strict=True)))
            found[method] = metrics.slice_metrics(
                mask=masks.mask, mask_all=masks.mask_all, map=masks.map, lesion=masks.lesion, truth=truth,
                labels=labels, foreground=foreground) | {
                    "volumes": volumes.summarise([answer.volume for answer in answers])}
        return found
