"""The figures of `metrics.slice_metrics` from one patient after the other, in memory that no pixel stays in.

A slice leaves counts behind, which are exact, and its map joins the histograms of `ranking.py`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import sparse

from hae_jax.evaluation import metrics, ranking
from hae_jax.evaluation.bootstrap import figure, share_of_sums


class SliceSums:
    """What patients' slices add up to; `results` is what `metrics.slice_metrics` finds in all of them together."""

    def __init__(self):
        self._counts: list[np.ndarray] = []  # of each patient [2, 3, S]: "mixed" and "unhealthy", of `metrics.counts`
        self._labels: list[np.ndarray] = []  # of each patient [2, S] bool: predicted and true
        self._scores = np.zeros((2, 2, ranking.BINS), np.int64)  # pixels by label of the slice, truth and score
        self._coarse: list[sparse.csr_array] = []  # of each patient the same, [4, coarse bins]

    def add(
        self,
        *,
        mask: np.ndarray,  # [S, H, W] bool
        mask_all: np.ndarray,  # [S, H, W] bool
        map: np.ndarray,  # [S, H, W] float
        lesion: np.ndarray,  # [S] bool
        truth: np.ndarray,  # [S, H, W] bool or 0/1 integers
        labels: np.ndarray,  # [S] 0 healthy, 1 lesion
        foreground: np.ndarray,  # [S, H, W] bool
    ) -> None:
        """Adds all slices of one patient; see `metrics.slice_metrics` for the arguments.

        Raises:
          TypeError: for a soft mask.
          ValueError: if a map is not finite in the foreground.
        """
        truth, sick = metrics.as_bool(truth), np.asarray(labels) > 0
        scores = np.stack([ranking.score_histogram(truth[rows][foreground[rows]], map[rows][foreground[rows]])
                           for rows in (~sick, sick)])
        self._counts.append(np.stack([metrics.counts(mask, truth), metrics.counts(mask_all, truth)]))
        self._labels.append(np.stack([metrics.as_bool(lesion), sick]))
        self._scores += scores
        self._coarse.append(ranking.coarse(scores))

    def results(self, seed: int = 0) -> dict[str, dict[str, Any]]:
        """The figures with their intervals over patients (`bootstrap.figure`), ready for JSON; "shares" has none.

        Patients without slices of a kind, as healthy ones in "unhealthy", are not drawn for its figures.

        Raises:
          ValueError: if nothing was added.
        """
        mixed = [counts[0] for counts in self._counts]
        unhealthy = [counts[1][:, sick] for counts, (_, sick) in zip(self._counts, self._labels, strict=True)]
        of_all, of_sick = zip(*((coarse[:2] + coarse[2:], coarse[2:]) for coarse in self._coarse), strict=True)
        return {
            "mixed": _figures(metrics.pixel_shares, mixed, seed)
                     | ranking.figures(self._scores.sum(axis=0), _with_slices(of_all, mixed), seed),
            "unhealthy": _figures(metrics.pixel_shares, unhealthy, seed)
                         | ranking.figures(self._scores[1], _with_slices(of_sick, unhealthy), seed),
            "slice_level": _figures(metrics.label_shares, self._labels, seed),
            "shares": metrics.slice_shares(np.concatenate(self._labels, axis=-1)),
        }


def _figures(
    shares: Callable[[np.ndarray], dict[str, tuple[float, int]]],
    patients: Sequence[np.ndarray],  # of each what `shares` takes, slices along the last axis
    seed: int,
) -> dict[str, dict[str, Any]]:
    """Each share of all patients together, with its interval."""
    found = [shares(patient) for patient in _with_slices(patients, patients)]
    return {name: figure(np.array([own[name] for own in found]).reshape(-1, 2).T, share_of_sums, seed)
            for name in shares(patients[0][:, :0])}


def _with_slices(values: Sequence[Any], patients: Sequence[np.ndarray]) -> list[Any]:
    return [value for value, patient in zip(values, patients, strict=True) if patient.shape[-1]]
