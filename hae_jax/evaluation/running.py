"""The metrics of slices, summed case by case, so that no pixels stay in memory.

The counts of each slice are kept, and they are exact. The maps are added to the histograms of `ranking.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import sparse

from hae_jax.evaluation import metrics, ranking
from hae_jax.evaluation.bootstrap import share_of_sums


class SliceSums:
    """Sums over the slices of cases."""

    def __init__(self):
        self._patients: list[str] = []  # of each case
        self._counts: list[np.ndarray] = []  # of each case [2, 3, S]: `metrics.counts` of `mask` and `mask_all`
        self._labels: list[np.ndarray] = []  # of each case [2, S] bool: predicted and true
        self._scores = np.zeros((2, 2, ranking.BINS), np.int64)  # pixels by label of the slice, truth and score
        self._coarse: list[sparse.csr_array] = []  # of each case the same values, [4, coarse bins]
        self._dice = np.zeros(ranking.COARSE_BINS)  # summed Dice of the lesion slices, by threshold on the map

    def add(
        self,
        patient: str,
        *,
        mask: np.ndarray,  # [S, H, W] bool
        mask_all: np.ndarray,  # [S, H, W] bool
        map: np.ndarray,  # [S, H, W] float
        lesion: np.ndarray,  # [S] bool
        truth: np.ndarray,  # [S, H, W] bool or 0/1 integers
        labels: np.ndarray,  # [S] 0 healthy, 1 lesion
        foreground: np.ndarray,  # [S, H, W] bool
    ) -> None:
        """Adds all slices of a case.

        Args:
          patient: whose case it is; cases of one patient are drawn together.
          mask: masks that are empty where `lesion` is False, for all slices.
          mask_all: masks of every slice, for the lesion slices.
          map: continuous anomaly maps.
          labels: true labels, as the training saw them.
          foreground: the pixels that AUROC and AUPRC count.

        Raises:
          TypeError: for a soft mask.
          ValueError: if a map is not finite in the foreground.
        """
        truth, sick = metrics.as_bool(truth), np.asarray(labels) > 0
        scores = [ranking.score_histogram(truth[rows][foreground[rows]], map[rows][foreground[rows]])
                  for rows in (~sick, sick)]
        self._patients.append(patient)
        self._counts.append(np.stack([metrics.counts(mask, truth), metrics.counts(mask_all, truth)]))
        self._labels.append(np.stack([metrics.as_bool(lesion), sick]))
        for total, own in zip(self._scores, scores, strict=True):
            used = own.tocoo()
            total[used.coords] += used.data
        self._coarse.append(sparse.vstack([ranking.coarse(own) for own in scores]).tocsr())
        for own, true, inside in zip(map[sick], truth[sick], foreground[sick], strict=True):
            self._dice += ranking.dice_by_threshold(own[inside], true[inside], np.count_nonzero(true))

    def results(self, seed: int = 0) -> dict[str, dict[str, Any]]:
        """The metrics, ready for JSON, with intervals over patients (`bootstrap.with_interval`), except "shares".

        Cases without slices of a kind, as healthy ones in "lesion_slices", do not count for its metrics.

        Raises:
          ValueError: if nothing was added.
        """
        every = [counts[0] for counts in self._counts]
        of_lesion = [counts[1][:, sick] for counts, (_, sick) in zip(self._counts, self._labels, strict=True)]
        of_all, of_sick = zip(*((coarse[:2] + coarse[2:], coarse[2:]) for coarse in self._coarse), strict=True)
        return {
            "all_slices": self._shares(metrics.pixel_shares, every, seed)
                     | self._rankings(self._scores.sum(axis=0), of_all, every, seed),
            "lesion_slices": self._shares(metrics.pixel_shares, of_lesion, seed)
                         | self._rankings(self._scores[1], of_sick, of_lesion, seed),
            "slice_level": self._shares(metrics.label_shares, self._labels, seed),
            "shares": metrics.slice_shares(np.concatenate(self._labels, axis=-1)),
            "upper_bound": {"lesion_slice_dice": self._upper_bound()},
        }

    def paired_dice(self, other: "SliceSums", seed: int = 0) -> dict[str, float | int | None]:
        """The mean Dice of the lesion slices minus that of another method on the same cases."""
        own, others = ([metrics.pixel_shares(counts[1][:, sick])["dice"] for counts, (_, sick)
                        in zip(sums._counts, sums._labels, strict=True)] for sums in (self, other))
        return share_of_sums([a - b for (a, _), (b, _) in zip(own, others, strict=True)], [n for _, n in own],
                             self._patients, seed)

    def _upper_bound(self) -> float | None:
        slices = sum(int(sick.sum()) for _, sick in self._labels)
        return float(self._dice.max() / slices) if slices else None

    def _shares(
        self,
        shares: Callable[[np.ndarray], Mapping[str, tuple[float, int]]],
        cases: Sequence[np.ndarray],  # input of `shares` for each case, slices along the last axis
        seed: int,
    ) -> dict[str, dict[str, Any]]:
        """Each share over all slices, with its interval."""
        kept = _with_slices(cases)
        found, patients = [shares(cases[k]) for k in kept], [self._patients[k] for k in kept]
        return {name: share_of_sums([own[name][0] for own in found], [own[name][1] for own in found], patients, seed)
                for name in shares(cases[0][:, :0])}

    def _rankings(
        self,
        scores: np.ndarray,  # [2, bins]
        coarse: Sequence[sparse.csr_array],  # [2, coarse bins] of each case
        cases: Sequence[np.ndarray],  # slices along the last axis
        seed: int,
    ) -> dict[str, dict[str, Any]]:
        kept = _with_slices(cases)
        patients = [self._patients[k] for k in kept]
        return ranking.rankings(sparse.csr_array(scores), [coarse[k] for k in kept], patients, seed)


def _with_slices(cases: Sequence[np.ndarray]) -> list[int]:
    return [k for k, case in enumerate(cases) if case.shape[-1]]
