"""AUROC and AUPRC of anomaly maps, from histograms of the maps' values.

The bins have a relative width of 0.05 %, so AUROC and AUPRC differ from the exact values in the fifth digit. For each
patient, a coarser histogram (0.8 %) is kept for the bootstrap over patients.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np
from scipy import sparse

from hae_jax.evaluation.bootstrap import numbers, share, with_interval

_SHIFT = 12  # bits of a float32's mantissa that are dropped; 11 of 23 remain, so the relative width is 2^-11
BINS = 1 << (32 - _SHIFT)
_FINE = 16  # bins per bin of a patient's histogram, which has a relative width of 2^-7
COARSE_BINS = BINS // _FINE


def score_histogram(
    hits: np.ndarray,  # [N] bool
    scores: np.ndarray,  # [N] float
) -> sparse.csr_array:  # [2, bins] int64: healthy pixels and lesion pixels
    """The histogram of scores. Most of its bins are empty.

    Raises:
      ValueError: if a score is not finite.
    """
    used, counts = np.unique(score_bins(scores) + np.where(hits, BINS, 0), return_counts=True)
    return sparse.coo_array((counts, np.divmod(used, BINS)), shape=(2, BINS)).tocsr()


def score_bins(
    scores: np.ndarray,  # [N] float
) -> np.ndarray:  # [N] int64
    """Bin numbers that increase with the scores, also for negative ones. They are the upper bits of the float32 values.

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


def dice_by_threshold(
    scores: np.ndarray,  # [N] float
    hits: np.ndarray,  # [N] bool
    lesion: int | np.integer,  # pixels of the lesion, including those outside of `scores`
) -> np.ndarray:  # [COARSE_BINS]
    """Dice of the mask of all scores in a coarse bin or above it, for each bin."""
    bins = score_bins(scores) // _FINE
    marked, found = (np.cumsum(np.bincount(own, minlength=COARSE_BINS)[::-1])[::-1] for own in (bins, bins[hits]))
    return 2 * found / np.maximum(marked + lesion, 1)


def ranking(
    histogram: sparse.csr_array,  # [2, bins] of `score_histogram`
) -> tuple[float | None, float | None]:
    """AUROC and AUPRC of all pixels in a histogram; None if all or none of them are lesion."""
    from sklearn.metrics import average_precision_score, roc_auc_score  # slow to import, and not always needed

    if not histogram.sum(axis=1).all():
        return None, None
    found = histogram.tocoo()
    (truth, score), weight = found.coords, found.data
    return (float(roc_auc_score(truth, score, sample_weight=weight)),
            float(average_precision_score(truth, score, sample_weight=weight)))


def auroc(
    histograms: np.ndarray,  # [..., 2, bins], healthy and lesion pixels
) -> np.ndarray:  # [...]
    """Area under the ROC curve of each histogram; NaN if all or none of its pixels are lesion."""
    healthy, lesion = histograms[..., 0, :], histograms[..., 1, :]
    below = np.cumsum(healthy, axis=-1) - healthy / 2  # equal scores count half
    return share((lesion * below).sum(axis=-1), lesion.sum(axis=-1) * healthy.sum(axis=-1))


def auprc(
    histograms: np.ndarray,  # [..., 2, bins], healthy and lesion pixels
    correction: np.ndarray | float = 1.0,  # [bins], factors of the precision at a bin
) -> np.ndarray:  # [...]
    """Average precision of each histogram; NaN if all or none of its pixels are lesion."""
    healthy, lesion = histograms[..., 0, :], histograms[..., 1, :]
    found = lesion * np.minimum(_precision(histograms) * correction, 1)
    both = healthy.any(axis=-1) & lesion.any(axis=-1)
    return share(found.sum(axis=-1), lesion.sum(axis=-1) * both)


def _precision(
    histograms: np.ndarray,  # [..., 2, bins]
) -> np.ndarray:  # [..., bins]
    """The share of lesion pixels among the pixels of a bin and all higher bins."""
    above = np.cumsum(histograms[..., ::-1], axis=-1)[..., ::-1]
    return above[..., 1, :] / np.maximum(above.sum(axis=-2), 1)


def coarse(
    histogram: sparse.csr_array,  # [2, bins] of `score_histogram`
) -> sparse.csr_array:  # [2, bins / 16]
    """A coarser histogram, small enough to keep one per patient."""
    fine = histogram.tocoo()
    return sparse.coo_array((fine.data, (fine.coords[0], fine.coords[1] // _FINE)), shape=(2, COARSE_BINS)).tocsr()


def rankings(
    histogram: sparse.csr_array,  # [2, bins] of all patients
    cases: Sequence[sparse.csr_array],  # [2, bins / 16] of each, `coarse`
    patients: Sequence[str],  # of each case
    seed: int = 0,
) -> dict[str, dict[str, float | int | None]]:
    """"auroc" and "auprc" of all patients together, with intervals from draws of patients (`bootstrap.with_interval`).

    In a coarse bin, all lesion pixels have the precision at its lower edge. The resulting error of the AUPRC of all
    patients is corrected bin by bin, also in draws. Otherwise, the error would be larger than the interval of many
    patients.
    """
    used = np.unique(histogram.indices)
    columns, inverse = np.unique(used // _FINE, return_inverse=True)
    drawn_from = np.zeros((len(set(patients)), 2 * len(columns)), np.int64)
    for number, case in zip(numbers(patients), cases, strict=True):
        drawn_from[number] += case[:, columns].toarray().reshape(-1)
    fine_histogram = histogram[:, used].toarray()
    fine = np.bincount(inverse, fine_histogram[1] * _precision(fine_histogram))
    rough_histogram = coarse(histogram)[:, columns].toarray()
    rough = rough_histogram[1] * _precision(rough_histogram)
    correction = np.divide(fine, rough, out=np.ones_like(rough), where=rough > 0)

    def statistic(of: Callable[[np.ndarray], np.ndarray]) -> Callable[..., np.ndarray]:
        def of_drawn(drawn: np.ndarray, axis: int) -> np.ndarray:
            draws = np.sort(drawn.astype(int).reshape(-1, len(drawn_from)))
            different, which = np.unique(draws, axis=0, return_inverse=True)  # few patients have few different draws
            times = np.apply_along_axis(np.bincount, -1, different, minlength=len(drawn_from))
            return of((times @ drawn_from).reshape(-1, 2, len(columns)))[which].reshape(drawn.shape[:-1])
        return of_drawn

    drawn = {"auroc": statistic(auroc), "auprc": statistic(functools.partial(auprc, correction=correction))}
    return {name: with_interval([np.arange(len(drawn_from))], of, seed) | {"mean": mean, "cases": len(cases)}
            for (name, of), mean in zip(drawn.items(), ranking(histogram), strict=True)}
