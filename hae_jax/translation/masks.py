"""From the forward process's curves and maps to lesion masks, with a calibration.

Comes after `calibration.py`; what it returns is measured by `evaluation` and written as volumes by `volume.py`.
B: slices, T: forward steps, M: modalities that take part.
"""

from typing import NamedTuple

import numpy as np
from scipy import ndimage

from hae_jax.errors import UserError
from hae_jax.translation.calibration import Calibration, similarity

_LEVELS = 0.98 - 0.08 * np.arange(101) / 100  # quantile level of the mask's threshold, by r in steps of 0.01
_IN_PLANE = np.stack([np.zeros((3, 3)), np.ones((3, 3)), np.zeros((3, 3))])  # 8 neighbours, none in other slices
_IN_SPACE = np.ones((3, 3, 3))  # 26 neighbours


class Masks(NamedTuple):
    """The answer for each slice.

    Attributes:
      map: [B, H, W] float32, the anomaly map (squared intensity difference, averaged over steps and modalities).
      mask_all: [B, H, W] bool, the mask of every slice, as if each had a lesion (the "unhealthy" setting).
      mask: [B, H, W] bool, `mask_all` where `lesion`, else empty (the "mixed" setting).
      lesion: [B] bool, the slice's predicted label.
      score: [B] float64, the similarity: low where there is a lesion.
    """

    map: np.ndarray
    mask_all: np.ndarray
    mask: np.ndarray
    lesion: np.ndarray
    score: np.ndarray


def make_masks(
    mse: np.ndarray,  # [B, T, M]
    ref: np.ndarray,  # [B, T, M]
    diff: np.ndarray,  # [B, T, M]
    maps: np.ndarray,  # [B, H, W, M] mean of mse_t before t_e
    calibration: Calibration,
    *,
    median: bool = True,
    remove_up_to: int = 0,
    positions: np.ndarray | None = None,  # [B]
) -> Masks:
    """Thresholds each slice's map at a quantile that falls, and so lets the mask grow, with the peak of its diff curve.

    Args:
      mse, ref, diff: spatial means of (G - X)^2, (R - X)^2 and (G - R)^2 (guided, reference, input).
      maps: one anomaly map for each modality.
      calibration: the network's slice threshold and the largest diff peaks, for the same M modalities.
      median: filter the averaged map by a median of 5 pixels along each axis. The thresholds always come from the
        unfiltered maps.
      remove_up_to: connected components of at most so many pixels are taken out of the masks; 0 keeps all.
      positions: the slices' numbers in their volume, in rising order: both filters work in 3-D then. None: each slice
        is filtered alone.

    Raises:
      UserError: if the calibration is for another number of modalities, or a curve is not finite.
    """
    if len(calibration.modality) != maps.shape[-1]:
        raise UserError(f"calibration: made for the modalities {calibration.modality}, but the translation has "
                        f"{maps.shape[-1]} of them; calibrate again with the same modalities")
    maps = np.asarray(maps, np.float64)
    score = similarity(mse, ref)
    thresholds = quantile_thresholds(maps, np.asarray(diff).max(axis=1), np.asarray(calibration.diff_max))
    combined = maps.mean(axis=-1)
    if median:
        combined = median_filtered(combined, positions)
    mask_all = combined >= thresholds.mean(axis=-1)[:, None, None]
    lesion = score <= calibration.threshold
    mask = mask_all & lesion[:, None, None]  # in 3-D, components may lose slices, so these are filtered themselves
    mask_all, mask = (remove_small_components(m, remove_up_to, positions) for m in (mask_all, mask))
    return Masks(combined.astype(np.float32), mask_all, mask, lesion, score)


def median_filtered(
    maps: np.ndarray,  # [B, H, W]
    positions: np.ndarray | None = None,  # [B]
) -> np.ndarray:  # [B, H, W]
    """Maps after a median filter of 5 pixels along each axis, borders reflected without repeating the edge.

    Each slice alone, or, given their positions in the volume, all of them in 3-D; slices left out between count as 0.
    """
    if positions is None:
        return ndimage.median_filter(maps, size=(1, 5, 5), mode="mirror")
    return ndimage.median_filter(_stack(maps, positions), size=5, mode="mirror")[positions - positions[0]]


def quantile_thresholds(
    maps: np.ndarray,  # [B, H, W, M]
    peaks: np.ndarray,  # [B, M] maximum of the diff curve over t
    diff_max: np.ndarray,  # [M]
) -> np.ndarray:  # [B, M]
    """Each map's own quantile at the level 0.98 - 0.08 r, r = clip(peak / diff_max, 0, 1) rounded to two decimals.

    Where `diff_max` is 0, no lesion slice of the validation data changed at all, and r is 1.
    """
    r = np.ones(peaks.shape)
    np.divide(peaks, diff_max, out=r, where=np.broadcast_to(diff_max > 0, peaks.shape))
    index = np.rint(100 * np.clip(r, 0, 1)).astype(int)
    table = np.quantile(maps, _LEVELS, axis=(1, 2))  # [101, B, M]
    return np.take_along_axis(table, index[None], axis=0)[0]


def remove_small_components(
    masks: np.ndarray,  # [B, H, W] bool
    max_pixels: int = 40,
    positions: np.ndarray | None = None,  # [B]
) -> np.ndarray:  # [B, H, W] bool
    """Takes out every 8-connected component of at most `max_pixels` pixels, slice by slice.

    Given the slices' positions in their volume, every 26-connected one in 3-D. A hole does not count to the size of the
    component around it.
    """
    if positions is None:
        labels, _ = ndimage.label(masks, structure=_IN_PLANE)
    else:
        labels = ndimage.label(_stack(masks, positions), structure=_IN_SPACE)[0][positions - positions[0]]
    keep = np.bincount(labels.ravel()) > max_pixels
    keep[0] = False  # the background
    return keep[labels]


def _stack(
    slices: np.ndarray,  # [B, H, W]
    positions: np.ndarray,  # [B] in rising order
) -> np.ndarray:  # [D, H, W]
    """The slices where they lie, zero between them."""
    stack = np.zeros((positions[-1] - positions[0] + 1, *slices.shape[1:]), slices.dtype)
    stack[positions - positions[0]] = slices
    return stack
