"""Lesion masks: the filters that they go through, and the published way from curves and maps to them.

Comes after `calibration.py` and `map_threshold.py`; what it returns is measured by `evaluation` and written as volumes
by `volume.py`. B and S: slices, T: forward steps, M: modalities that take part.
"""

import dataclasses
import math
from typing import NamedTuple, Protocol

import numpy as np
from scipy import ndimage

from hae_jax.errors import UserError
from hae_jax.localization.calibration import Calibration, similarity

_LEVELS = 0.98 - 0.08 * np.arange(101) / 100  # quantile level of the mask's threshold, by r in steps of 0.01
_IN_PLANE = np.stack([np.zeros((3, 3)), np.ones((3, 3)), np.zeros((3, 3))])  # 8 neighbours, none in other slices
_IN_SPACE = np.ones((3, 3, 3))  # 26 neighbours


class Masks(NamedTuple):
    """The answer for each slice.

    Attributes:
      map: [B, H, W] float32, the anomaly map.
      mask_all: [B, H, W] bool, the mask of every slice, as if each had a lesion (the "lesion_slices" setting).
      mask: [B, H, W] bool, `mask_all` where `lesion`, else empty (the "all_slices" setting).
      lesion: [B] bool, the slice's predicted label.
      score: [B] float64, the anomaly score: high where there is a lesion.
    """

    map: np.ndarray
    mask_all: np.ndarray
    mask: np.ndarray
    lesion: np.ndarray
    score: np.ndarray


class SliceGrid(NamedTuple):
    """Where a case's slices lie.

    Attributes:
      positions: [S] their numbers in the volume, in rising order; None: they are to be filtered one by one.
      spacing: (x, y, z) mm between pixels and between neighbouring slices; None where it is not known.
    """

    positions: np.ndarray | None = None
    spacing: tuple[float, float, float] | None = None


class Filters(Protocol):
    """What masks go through. `maps` comes before the threshold, also where it is chosen; `masks` after it."""

    def heads(self, heads: np.ndarray, grid: SliceGrid) -> np.ndarray:
        """The part of the heads [S, H, W] bool in which lesions are looked for."""

    def maps(self, maps: np.ndarray, grid: SliceGrid) -> np.ndarray:
        """Filtered anomaly maps [S, H, W]."""

    def masks(self, masks: np.ndarray, grid: SliceGrid) -> np.ndarray:
        """Filtered masks [S, H, W] bool."""


@dataclasses.dataclass(frozen=True)
class PixelFilters:
    """The published filters, in pixels, whatever their size.

    Attributes:
      median: filter maps by a median of 5 pixels along each axis.
      remove_up_to: connected components of at most so many pixels are taken out; 0 keeps all.
      dimensions: 2, each slice alone, or 3.
    """

    median: bool = False
    remove_up_to: int = 0
    dimensions: int = 2

    def heads(self, heads: np.ndarray, grid: SliceGrid) -> np.ndarray:
        """As they are."""
        return heads

    def maps(self, maps: np.ndarray, grid: SliceGrid) -> np.ndarray:
        """See `median_filtered`."""
        return median_filtered(maps, self._positions(grid)) if self.median else maps

    def masks(self, masks: np.ndarray, grid: SliceGrid) -> np.ndarray:
        """See `remove_small_components`."""
        return remove_small_components(masks, self.remove_up_to, self._positions(grid))

    def _positions(self, grid: SliceGrid) -> np.ndarray | None:
        return grid.positions if self.dimensions == 3 else None


@dataclasses.dataclass(frozen=True)
class PhysicalFilters:
    """Filters in mm and ml, in 3-D, so that they mean the same at every resolution.

    Attributes:
      across_mm: standard deviation of a Gaussian across the slices of a map; 0: none.
      head_erosion_mm: depth below the head's outline in the slice at which lesions begin to be looked for; 0: at it.
      median_mm: edge of the cube over which a mask's median (the majority) is taken; 0: none.
      smallest_ml: connected components below this volume are taken out; 0 keeps all.

    Raises:
      UserError: for negative numbers.
    """

    across_mm: float = 0.0
    head_erosion_mm: float = 0.0
    median_mm: float = 0.0
    smallest_ml: float = 0.0

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if not 0 <= value < math.inf:
                raise UserError(f"translation.{name} is {value}: give 0, which is off, or more")

    def heads(self, heads: np.ndarray, grid: SliceGrid) -> np.ndarray:
        """Eroded in the plane of each slice."""
        if not self.head_erosion_mm:
            return heads
        spacing = self._spacing(grid)[:2]
        depth = [ndimage.distance_transform_edt(np.pad(head, 1), sampling=spacing)[1:-1, 1:-1] for head in heads]
        return np.stack(depth) > self.head_erosion_mm

    def maps(self, maps: np.ndarray, grid: SliceGrid) -> np.ndarray:
        """Smoothed across slices: what lies in one slice alone is mostly noise.

        The median comes later: that of a mask is the mask of the median map.
        """
        if not self.across_mm or grid.positions is None or len(maps) < 2:
            return maps
        apart = (grid.positions[:, None] - grid.positions) * self._spacing(grid)[2]
        weights = np.exp(-0.5 * (apart / self.across_mm) ** 2) * (np.abs(apart) <= 4 * self.across_mm)
        weights /= weights.sum(axis=1, keepdims=True)  # fewer neighbours at the ends, and where slices are left out
        return np.einsum("st,thw->shw", weights, maps)

    def masks(self, masks: np.ndarray, grid: SliceGrid) -> np.ndarray:
        """The majority filter, then without small components."""
        if not masks.any() or not (self.median_mm or self.smallest_ml):
            return masks
        spacing, positions = self._spacing(grid), grid.positions
        positions = np.arange(len(masks)) if positions is None else positions
        stack = _stack(masks, positions)
        if self.median_mm:
            size = tuple(2 * round((self.median_mm / step - 1) / 2) + 1 if self.median_mm > step else 1
                         for step in (spacing[2], *spacing[:2]))
            stack = ndimage.median_filter(stack.astype(np.uint8), size=size, mode="mirror") > 0
        if self.smallest_ml:
            labels = ndimage.label(stack, structure=_IN_SPACE)[0]
            keep = np.bincount(labels.ravel()) * np.prod(spacing) / 1000 >= self.smallest_ml
            keep[0] = False  # the background
            stack = keep[labels]
        return stack[positions - positions[0]]

    def _spacing(self, grid: SliceGrid) -> tuple[float, float, float]:
        if grid.spacing is None:
            raise UserError("translation.filters is 'mm', but the prepared data do not tell the size of their pixels; "
                            "prepare them from NIfTI files, or set translation.filters to 'pixels'")
        return grid.spacing


NO_FILTERS, PUBLISHED_FILTERS, OWN_FILTERS = PixelFilters(), PixelFilters(median=True), PhysicalFilters()
_ONE_BY_ONE = SliceGrid()


def make_masks(
    mse: np.ndarray,  # [B, T, M]
    ref: np.ndarray,  # [B, T, M]
    diff: np.ndarray,  # [B, T, M]
    maps: np.ndarray,  # [B, H, W, M] mean of mse_t before t_e
    calibration: Calibration,
    filters: Filters = PUBLISHED_FILTERS,
    grid: SliceGrid = _ONE_BY_ONE,
    heads: np.ndarray | None = None,  # [B, H, W] bool
) -> Masks:
    """Thresholds each slice's map at a quantile that falls, and so lets the mask grow, with the peak of its diff curve.

    Args:
      mse, ref, diff: spatial means of (G - X)^2, (R - X)^2 and (G - R)^2 (guided, reference, input).
      maps: one anomaly map for each modality.
      calibration: the network's slice threshold and the largest diff peaks, for the same M modalities.
      filters: of the averaged map and of the masks. The thresholds always come from the unfiltered maps.
      grid: where the slices lie.
      heads: where lesions may be; None: anywhere.

    Returns:
      The masks; their anomaly score is 1 - `calibration.similarity`.

    Raises:
      UserError: if the calibration is for another number of modalities, or a curve is not finite.
    """
    if len(calibration.modality) != maps.shape[-1]:
        raise UserError(f"calibration: made for the modalities {calibration.modality}, but the translation has "
                        f"{maps.shape[-1]} of them; calibrate again with the same modalities")
    maps = np.asarray(maps, np.float64)
    alike = similarity(mse, ref)
    thresholds = quantile_thresholds(maps, np.asarray(diff).max(axis=1), np.asarray(calibration.diff_max))
    combined = filters.maps(maps.mean(axis=-1), grid)
    mask_all = combined >= thresholds.mean(axis=-1)[:, None, None]
    if heads is not None:
        mask_all &= filters.heads(heads, grid)
    lesion = alike <= calibration.threshold
    mask = mask_all & lesion[:, None, None]  # in 3-D, components may lose slices, so these are filtered themselves
    mask_all, mask = (filters.masks(m, grid) for m in (mask_all, mask))
    return Masks(combined.astype(np.float32), mask_all, mask, lesion, 1 - alike)


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
