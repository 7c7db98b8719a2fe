"""Checks whether a segmentation can be a lesion mask. Impossible values raise an error, doubtful ones a warning.

With a brain mask or a tissue segmentation in place of the lesion mask, every slice would be a lesion slice. With a
mask in values other than 0, 1, 2, ..., every slice would be a healthy slice. Training would run without an error.
"""

from pathlib import Path

import numpy as np

from hae_jax.data.case_warning import CaseWarning
from hae_jax.errors import UserError

DOUBTFUL_SHARE, IMPOSSIBLE_SHARE = 0.5, 0.9  # share of the head's voxels that the mask covers
KNOWN_LABELS = frozenset((1, 2, 3, 4))  # BraTS 2012 to 2024; a mask with a single label may have any value
_SHOWN = 6  # labels in a message


def lesion_mask(
    path: Path,
    values: np.ndarray,  # [X, Y, Z] of the segmentation
    volumes: np.ndarray,  # [X, Y, Z, C] raw intensities
) -> tuple[np.ndarray, tuple[CaseWarning, ...]]:  # [X, Y, Z] bool, and warnings
    """The mask of all voxels with a label.

    Raises:
      UserError: voxels are negative, or positive without one that exceeds one half.
    """
    low, high = float(values.min()), float(values.max())
    if low < 0:
        raise UserError(f"{path}: holds {low:g}, and {_percent((values < 0).mean())} of its voxels are below 0; a "
                        "lesion mask is 0 outside and positive inside (255 stored as int8 becomes -1)")
    if 0 < high <= 0.5:
        raise UserError(f"{path}: its largest value is {high:g}, and a lesion is where it exceeds 0.5; threshold it, "
                        "or store it in 0 and 1")
    mask = values > 0.5
    return mask, (*_doubtful_labels(path, values), *_doubtful_size(path, mask, volumes))


def covered_share(
    mask: np.ndarray,  # [X, Y, Z] bool
    volumes: np.ndarray,  # [X, Y, Z, C] raw intensities
) -> float:
    """The share of the head's voxels that a mask covers. The head is where any channel is positive."""
    head = (volumes > 0).any(axis=-1)
    return float((mask & head).sum() / max(1, head.sum()))


def refuse_head_mask(path: Path, mask: np.ndarray, volumes: np.ndarray) -> None:
    """Refuses to learn from a mask that covers the head.

    Raises:
      UserError: it covers nearly the whole head.
    """
    share = covered_share(mask, volumes)
    if share >= IMPOSSIBLE_SHARE:
        raise UserError(f"{path}: covers {_percent(share)} of the head, so it is a mask of the brain or its tissues, "
                        "no lesion; take it out of the folder, or name the lesion masks in a table (--cases)")


def _doubtful_labels(path: Path, values: np.ndarray) -> list[CaseWarning]:
    labels = np.unique(values[values > 0])
    soft = (abs(values - np.rint(values)) > 1e-3).mean()
    if soft:
        return [CaseWarning("{}: {} of its voxels are no whole numbers; a lesion is where they exceed 0.5", path,
                      _percent(soft))]
    if len(labels) > 1 and not KNOWN_LABELS.issuperset(labels.tolist()):
        more = ", ..." if len(labels) > _SHOWN else ""
        shown = ", ".join(f"{label:g}" for label in labels[:_SHOWN])
        return [CaseWarning("{}: has {} labels ({}{}), which is no known convention; all of them count as lesion",
                            path, len(labels), shown, more)]
    return []


def _doubtful_size(path: Path, mask: np.ndarray, volumes: np.ndarray) -> list[CaseWarning]:
    share = covered_share(mask, volumes)
    if share >= DOUBTFUL_SHARE:
        return [CaseWarning("{}: covers {} of the head; check that it is a lesion mask", path, _percent(share))]
    head = (volumes > 0).any(axis=(0, 1, 3))  # [Z]
    slices = np.any(mask, axis=(0, 1)) & head
    if slices.any() and slices[head].all():
        return [CaseWarning(
            "{}: marks a lesion in all {} slices (100 %), {} of the head; check that it is a lesion mask",
            path, head.sum(), _percent(share))]
    return []


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.01 else f"{100 * share:.2g} %"
