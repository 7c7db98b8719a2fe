"""Metrics of masks and maps: per slice, over pixels, of slice labels, per volume.

It computes counts and shares of slices, which `running.py` sums over cases. The functions take arrays only; `report.py`
writes the results. S: slices. An undefined value is None, so that it is null in JSON and not part of a mean.
"""

import numpy as np

from hae_jax.evaluation.bootstrap import RESAMPLES

_SMOOTH = 1e-6

DEFINITIONS = {
    "mean, low, high": "mean: the metric over the slices of the group; low, high: its 95% interval (percentile "
                       f"bootstrap over patients, {RESAMPLES} resamples; a patient is drawn with all slices of all "
                       "visits), null for fewer than two patients; cases: number of cases that contribute",
    "all_slices": "all slices; the mask of a slice that is called healthy is empty",
    "lesion_slices": "only slices with a lesion in the ground truth; every slice keeps its mask",
    "dice": "mean over slices of (2 I + s) / (P + Q + s), with I the overlap, P the mask, Q the lesion in "
            "pixels, s = 1e-6; an empty mask without a lesion scores 1",
    "iou": "mean over slices of (I + s) / (P + Q - I + s), symbols as for dice; an empty mask without a lesion "
           "scores 1",
    "precision": "share of the mask's pixels that are lesion, pooled over the pixels of all slices",
    "recall": "share of the lesion's pixels that are in the mask, pooled over the pixels of all slices",
    "foreground": "pixels whose mean of all channels is above -0.95 in the network's range of [-1, 1]",
    "auroc": "area under the ROC curve of the anomaly map, pooled over the foreground pixels of all slices; values "
             "that differ by less than 0.05 % may count as equal",
    "auprc": "average precision of the anomaly map, pooled over the foreground pixels of all slices; values that "
             "differ by less than 0.05 % may count as equal",
    "slice_level": "predicted against true labels of slices; precision and recall refer to lesion slices",
    "shares": "slices: number of slices; healthy: share of healthy slices (in 'all_slices' an empty mask scores 1 "
              "there); called_lesion: share of slices that are called lesion slices",
    "upper_bound": "mean Dice of the lesion slices at the best single threshold on the map, chosen with the ground "
                   "truth of the same slices; without filters, no rule for a single threshold can exceed it",
    "above_threshold": "difference of Dice between the method and the intensity threshold on the same slices or "
                       "volumes, with its paired 95% interval over patients",
}


def dice(
    predicted: np.ndarray,  # [S, ...] bool
    truth: np.ndarray,  # [S, ...] bool
) -> np.ndarray:  # [S]
    """(2 I + s) / (P + Q + s) for each entry of the first axis; 1 where both are empty."""
    return _dice(*counts(predicted, truth))


def iou(
    predicted: np.ndarray,  # [S, ...] bool
    truth: np.ndarray,  # [S, ...] bool
) -> np.ndarray:  # [S]
    """(I + s) / (P + Q - I + s) for each entry of the first axis; 1 where both are empty."""
    return _iou(*counts(predicted, truth))


def foreground(
    images: np.ndarray,  # [S, H, W, C] in [-1, 1]
) -> np.ndarray:  # [S, H, W] bool
    """The pixels over which AUROC and AUPRC are computed: the mean of all input channels is above -0.95."""
    return images.mean(axis=-1) > -0.95


def counts(
    predicted: np.ndarray,  # [S, ...] bool
    truth: np.ndarray,  # [S, ...] bool
) -> np.ndarray:  # [3, S] int
    """Number of pixels in both masks, in the first and in the second, for each entry of the first axis."""
    predicted, truth = as_bool(predicted), as_bool(truth)
    axes = tuple(range(1, predicted.ndim))
    return np.stack([(predicted & truth).sum(axis=axes), predicted.sum(axis=axes), truth.sum(axis=axes)])


def pixel_shares(
    counted: np.ndarray,  # [3, S] of `counts`
) -> dict[str, tuple[float, int]]:
    """The metrics of "all_slices" and "lesion_slices", except AUROC and AUPRC, as part and whole.

    Parts and wholes of several groups of slices add up to those of all slices together.
    """
    overlap, p, q = (int(count.sum()) for count in counted)
    slices = counted.shape[1]
    return {"dice": (float(_dice(*counted).sum()), slices), "iou": (float(_iou(*counted).sum()), slices),
            "precision": (overlap, p), "recall": (overlap, q)}


def label_shares(
    labels: np.ndarray,  # [2, S] bool: predicted and true
) -> dict[str, tuple[int, int]]:
    """The metrics of "slice_level" as part and whole, which can be summed like those of `pixel_shares`."""
    predicted, true = labels
    hits, called, sick = (int(np.count_nonzero(rows)) for rows in (predicted & true, predicted, true))
    return {"accuracy": (int(np.count_nonzero(predicted == true)), len(true)), "precision": (hits, called),
            "recall": (hits, sick)}


def slice_shares(
    labels: np.ndarray,  # [2, S] bool: predicted and true
) -> dict[str, float | int | None]:
    """The values of "shares"."""
    predicted, true = labels
    return {"slices": len(true), "healthy": _mean(~true), "called_lesion": _mean(predicted)}


def volume_dice(
    predicted: np.ndarray,  # [X, Y, Z] bool
    truth: np.ndarray,  # [X, Y, Z] bool
) -> float:
    """Dice of one whole volume; 1 where both are empty."""
    return float(dice(predicted[None], truth[None])[0])


def volume_ml(
    mask: np.ndarray,  # [X, Y, Z] bool
    affine: np.ndarray,  # [4, 4] voxels to mm
) -> float:
    """The volume of a mask in millilitres."""
    return float(np.count_nonzero(mask) * abs(np.linalg.det(affine[:3, :3])) / 1000)


def as_bool(mask: np.ndarray) -> np.ndarray:
    """A mask of bool or integers as bool.

    Raises:
      TypeError: for floats.
    """
    if mask.dtype.kind == "f":  # all values above 0 of a soft mask would count as lesion
        raise TypeError("masks must be bool or integers; threshold a soft mask first")
    return mask.astype(bool)


def _dice(overlap: np.ndarray, p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return (2 * overlap + _SMOOTH) / (p + q + _SMOOTH)


def _iou(overlap: np.ndarray, p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return (overlap + _SMOOTH) / (p + q - overlap + _SMOOTH)


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if values.size else None
