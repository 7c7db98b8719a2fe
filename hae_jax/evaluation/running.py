"""The figures of `metrics.slice_metrics` from one group of slices after the other, in memory that no pixel stays in.

A slice leaves counts behind. A map joins a histogram whose bins are as many as its values need in a relative precision
of 0.05 %, so counts are exact, and AUROC and AUPRC differ from the exact ones in the fifth digit.
"""

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score

from hae_jax.evaluation import metrics

_SHIFT = 12  # bits of a float32's mantissa that are left out: 11 of 23 stay, a relative width of 2^-11
_BINS = 1 << (32 - _SHIFT)


class SliceSums:
    """What groups of slices add up to; `results` is what `metrics.slice_metrics` finds in all of them together."""

    def __init__(self):
        self._counts: list[np.ndarray] = []  # [2, 3, S]: "mixed" and "unhealthy", of `metrics.counts`
        self._labels: list[np.ndarray] = []  # [2, S] bool: predicted and true
        self._scores = np.zeros((2, 2, _BINS), np.int64)  # foreground pixels by label of the slice, truth and score

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
        """Adds slices; see `metrics.slice_metrics` for the arguments.

        Raises:
          TypeError: for a soft mask.
          ValueError: if a map is not finite in the foreground.
        """
        truth, sick = metrics.as_bool(truth), np.asarray(labels) > 0
        self._counts.append(np.stack([metrics.counts(mask, truth), metrics.counts(mask_all, truth)]))
        self._labels.append(np.stack([metrics.as_bool(lesion), sick]))
        for label in (0, 1):
            rows = sick == bool(label)
            kept = foreground[rows]
            self._scores[label] += score_histogram(truth[rows][kept], map[rows][kept])

    def results(self) -> dict[str, dict[str, float | int | None]]:
        """The figures, ready for JSON.

        Raises:
          ValueError: if nothing was added.
        """
        mixed, unhealthy = np.concatenate(self._counts, axis=-1)
        lesion, sick = np.concatenate(self._labels, axis=-1)
        return {
            "mixed": metrics.pixel_metrics(mixed, ranking(self._scores.sum(axis=0))),
            "unhealthy": metrics.pixel_metrics(unhealthy[:, sick], ranking(self._scores[1])),
            **metrics.label_metrics(lesion, sick),
        }


def score_histogram(
    hits: np.ndarray,  # [N] bool
    scores: np.ndarray,  # [N] float
) -> np.ndarray:  # [2, bins] int64: healthy pixels and lesion pixels
    """How many pixels have which score.

    Raises:
      ValueError: if a score is not finite.
    """
    found = np.bincount(score_bins(scores) + np.where(hits, _BINS, 0), minlength=2 * _BINS)
    return found.reshape(2, _BINS)


def score_bins(
    scores: np.ndarray,  # [N] float
) -> np.ndarray:  # [N] int64
    """Numbers that rise with the scores, negative ones included: the upper bits of their float32.

    Positive floats have the order of their bits as integers; of negative ones it is the other way round.

    Raises:
      ValueError: if a score is not finite.
    """
    scores = np.asarray(scores, np.float32) + np.float32(0)  # -0 becomes 0
    if not np.isfinite(scores).all():
        raise ValueError("map: not finite, so that its values have no order")
    bits = scores.view(np.uint32)
    ordered = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
    return (ordered >> _SHIFT).astype(np.int64)


def ranking(
    histogram: np.ndarray,  # [2, bins] of `score_histogram`
) -> tuple[float | None, float | None]:
    """AUROC and AUPRC of all pixels in a histogram; None where all of them are lesion, or none is."""
    if not histogram.any(axis=1).all():
        return None, None
    truth, score = np.nonzero(histogram)
    weight = histogram[truth, score]
    return (float(roc_auc_score(truth, score, sample_weight=weight)),
            float(average_precision_score(truth, score, sample_weight=weight)))
