"""How good masks and maps are: per slice, over pixels, per slice label, per volume.

Exact, from all slices at once; `running.py` has the same figures for more slices than memory holds. Reads arrays only;
`report.py` writes what comes out of it. S: slices. An undefined value is None, so that it is null in JSON and never
enters a mean unseen.
"""

from collections.abc import Sequence

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score

from hae_jax.evaluation.bootstrap import RESAMPLES

_SMOOTH = 1e-6
FIXED_THRESHOLDS = np.arange(1, 70) / 100  # the candidates for methods with one fixed threshold on the map

DEFINITIONS = {
    "mean, low, high": "the figure over the slices that count, which are of so many 'cases', and its 95% interval by "
                       f"the percentile bootstrap over patients ({RESAMPLES} resamples; a patient is drawn with all "
                       "slices of all visits); null of fewer than two patients",
    "all_slices": "all slices; a slice that is called healthy has an empty mask",
    "lesion_slices": "only slices with a lesion by their label; every slice keeps its mask",
    "dice": "(2 I + s) / (P + Q + s) per slice, s = 1e-6, then the mean; an empty mask of an empty truth scores 1",
    "iou": "(I + s) / (P + Q - I + s) per slice, s = 1e-6, then the mean; an empty mask of an empty truth scores 1",
    "precision": "share of the mask's pixels that are lesion, over the pixels of all slices together",
    "recall": "share of the lesion's pixels that are in the mask, over the pixels of all slices together",
    "auroc": "area under the ROC curve of the continuous map, over the foreground pixels of all slices together; "
             "values that differ by less than 0.05 % may count as equal",
    "auprc": "average precision of the continuous map, over the foreground pixels of all slices together; "
             "values that differ by less than 0.05 % may count as equal",
    "slice_level": "the predicted label of a slice against its true one; precision and recall are of lesion slices",
    "shares": "number of slices, share of them that is healthy (in 'all_slices', an empty mask scores 1 there), and "
              "share that is called a lesion slice",
    "upper_bound": "mean Dice of the lesion slices at the one threshold on the map that is best for it, chosen with "
                   "the ground truth of these very slices: what no rule for a single threshold can exceed",
    "above_threshold": "Dice minus that of the intensity threshold on the same slices or volumes, with the paired 95% "
                       "interval over patients",
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
    """Pixels of the head, over which AUROC and AUPRC run: mean of all input channels above -0.95."""
    return images.mean(axis=-1) > -0.95


def slice_metrics(
    *,
    mask: np.ndarray,  # [S, H, W] bool
    mask_all: np.ndarray,  # [S, H, W] bool
    map: np.ndarray,  # [S, H, W] float
    lesion: np.ndarray,  # [S] bool
    truth: np.ndarray,  # [S, H, W] bool or 0/1 integers
    labels: np.ndarray,  # [S] 0 healthy, 1 lesion
    foreground: np.ndarray,  # [S, H, W] bool
    valid: np.ndarray | None = None,  # [S] bool
) -> dict[str, dict[str, float | int | None]]:
    """Everything that `DEFINITIONS` explains but for intervals, as nested dictionaries ready for JSON.

    Args:
      mask: masks that are empty where `lesion` is False, for all slices.
      mask_all: masks of every slice, for the lesion slices.
      map: continuous anomaly maps.
      lesion: predicted labels.
      truth: true masks.
      labels: true labels, as the training saw them.
      foreground: the pixels that AUROC and AUPRC count.
      valid: False where a row is padding; all rows count where None.
    """
    rows = np.ones(len(labels), bool) if valid is None else np.asarray(valid, bool)
    mask, mask_all, map, lesion, truth, labels, foreground = (
        values[rows] for values in (mask, mask_all, map, lesion, truth, labels, foreground))
    sick = labels > 0
    return {
        "all_slices": _ratios(pixel_shares(counts(mask, truth))) | _ranking(map, truth, foreground),
        "lesion_slices": _ratios(pixel_shares(counts(mask_all, truth)[:, sick]))
                     | _ranking(map[sick], truth[sick], foreground[sick]),
        "slice_level": _ratios(label_shares(np.stack([as_bool(lesion), sick]))),
        "shares": slice_shares(np.stack([as_bool(lesion), sick])),
    }


def counts(
    predicted: np.ndarray,  # [S, ...] bool
    truth: np.ndarray,  # [S, ...] bool
) -> np.ndarray:  # [3, S] int
    """Pixels in both, in the first and in the second, for each entry of the first axis."""
    predicted, truth = as_bool(predicted), as_bool(truth)
    axes = tuple(range(1, predicted.ndim))
    return np.stack([(predicted & truth).sum(axis=axes), predicted.sum(axis=axes), truth.sum(axis=axes)])


def pixel_shares(
    counted: np.ndarray,  # [3, S] of `counts`
) -> dict[str, tuple[float, int]]:
    """What "all_slices" and "lesion_slices" consist of, but for AUROC and AUPRC, as part and whole.

    Parts and wholes of several groups of slices add up to those of all slices together.
    """
    overlap, p, q = (int(count.sum()) for count in counted)
    slices = counted.shape[1]
    return {"dice": (float(_dice(*counted).sum()), slices), "iou": (float(_iou(*counted).sum()), slices),
            "precision": (overlap, p), "recall": (overlap, q)}


def label_shares(
    labels: np.ndarray,  # [2, S] bool: predicted and true
) -> dict[str, tuple[int, int]]:
    """What "slice_level" consists of, as part and whole, which add up as those of `pixel_shares` do."""
    predicted, true = labels
    hits, called, sick = (int(np.count_nonzero(rows)) for rows in (predicted & true, predicted, true))
    return {"accuracy": (int(np.count_nonzero(predicted == true)), len(true)), "precision": (hits, called),
            "recall": (hits, sick)}


def slice_shares(
    labels: np.ndarray,  # [2, S] bool: predicted and true
) -> dict[str, float | int | None]:
    """What "shares" consists of."""
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


def best_threshold(
    values: np.ndarray,  # [S, H, W] float
    truth: np.ndarray,  # [S, H, W] bool or 0/1 integers
    thresholds: Sequence[float] = FIXED_THRESHOLDS,
    groups: np.ndarray | None = None,  # [S] int, e.g. the case of each slice
) -> tuple[float, float]:
    """The threshold whose masks `values >= threshold` have the highest mean Dice, and that Dice.

    The mean runs over slices, or over groups of slices measured as one volume each. Of several equally good ones the
    lowest listed first is taken.
    """
    groups = np.arange(len(values)) if groups is None else np.unique(groups, return_inverse=True)[1]
    means = []
    for threshold in thresholds:
        means.append(_dice(*(np.bincount(groups, count) for count in counts(values >= threshold, truth))).mean())
    best = int(np.argmax(means))
    return float(thresholds[best]), float(means[best])


def as_bool(mask: np.ndarray) -> np.ndarray:
    """A mask of bool or integers as bool.

    Raises:
      TypeError: for floats.
    """
    if mask.dtype.kind == "f":  # a soft mask would count as lesion wherever it is above 0
        raise TypeError("masks must be bool or integers; threshold a soft mask first")
    return mask.astype(bool)


def _dice(overlap: np.ndarray, p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return (2 * overlap + _SMOOTH) / (p + q + _SMOOTH)


def _iou(overlap: np.ndarray, p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return (overlap + _SMOOTH) / (p + q - overlap + _SMOOTH)


def _ratios(shares: dict[str, tuple[float, int]]) -> dict[str, float | None]:
    return {name: part / whole if whole else None for name, (part, whole) in shares.items()}


def _ranking(
    map: np.ndarray,  # [S, H, W]
    truth: np.ndarray,  # [S, H, W] bool
    foreground: np.ndarray,  # [S, H, W] bool
) -> dict[str, float | None]:
    """AUROC and AUPRC; None where all pixels are lesion, or none is."""
    hits, values = as_bool(truth)[foreground], map[foreground]
    if not hits.any() or hits.all():
        return {"auroc": None, "auprc": None}
    return {"auroc": float(roc_auc_score(hits, values)), "auprc": float(average_precision_score(hits, values))}


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if values.size else None
