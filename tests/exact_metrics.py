"""Metrics of slices from all slices at once with scikit-learn, as reference for sums over cases."""

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score

from hae_jax.evaluation import metrics


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
    """All metrics of `metrics.DEFINITIONS` without intervals, as nested dictionaries ready for JSON.

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
        "all_slices": _ratios(metrics.pixel_shares(metrics.counts(mask, truth))) | _ranking(map, truth, foreground),
        "lesion_slices": _ratios(metrics.pixel_shares(metrics.counts(mask_all, truth)[:, sick]))
                     | _ranking(map[sick], truth[sick], foreground[sick]),
        "slice_level": _ratios(metrics.label_shares(np.stack([metrics.as_bool(lesion), sick]))),
        "shares": metrics.slice_shares(np.stack([metrics.as_bool(lesion), sick])),
    }


def _ratios(shares: dict[str, tuple[float, int]]) -> dict[str, float | None]:
    return {name: part / whole if whole else None for name, (part, whole) in shares.items()}


def _ranking(
    map: np.ndarray,  # [S, H, W]
    truth: np.ndarray,  # [S, H, W] bool
    foreground: np.ndarray,  # [S, H, W] bool
) -> dict[str, float | None]:
    """AUROC and AUPRC; None if all or none of the pixels are lesion."""
    hits, values = metrics.as_bool(truth)[foreground], map[foreground]
    if not hits.any() or hits.all():
        return {"auroc": None, "auprc": None}
    return {"auroc": float(roc_auc_score(hits, values)), "auprc": float(average_precision_score(hits, values))}
