"""The published method (Che et al., arXiv:2404.15683): masks from the curves and maps of the forward process.

`calibrate` makes a `Calibration` from validation slices with yes/no labels. `make_masks` applies it. No pixel labels
are used. B: slices, T: forward steps, M: chosen modalities.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import jax
import numpy as np
from scipy import ndimage

from hae_jax.data.slices import ONE_BY_ONE, SliceGrid
from hae_jax.diffusion.process import Process
from hae_jax.errors import UserError
from hae_jax.localization.calibration import PRESETS, Calibration, MapThreshold, from_json, score_histogram
from hae_jax.localization.denoisers import Denoisers, step_noise
from hae_jax.localization.forward_process import ForwardSettings, Translation, forward_process
from hae_jax.localization.map_threshold import (
    IN_SPACE,
    Filters,
    MapThresholdMethod,
    Masks,
    ValidationSlice,
    in_volume,
)

_CANDIDATES = np.linspace(0.005, 0.095, 100)  # candidate thresholds, as quantiles of the healthy slices' similarity
_NORM_FLOOR = 1e-6  # lower bound of each norm, as in PyTorch's cosine_similarity
_LEVELS = 0.98 - 0.08 * np.arange(101) / 100  # quantile level of the mask's threshold, for r in steps of 0.01
_IN_PLANE = np.stack([np.zeros((3, 3)), np.ones((3, 3)), np.zeros((3, 3))])  # 8 neighbours, none in other slices


def similarity(
    mse: np.ndarray,  # [B, T, M]
    ref: np.ndarray,  # [B, T, M]
) -> np.ndarray:  # [B]
    """Cosine similarity of the errors of the guided and the reference prediction; near 1 for a healthy slice.

    s = <a, b> / (|a| |b|) over t, with a and b the curves `mse` and `ref` averaged over the modalities.

    Raises:
      UserError: if a curve is not finite.
    """
    a, b = (np.asarray(curve, np.float64).mean(axis=-1) for curve in (mse, ref))
    bad = ~np.isfinite(a + b).all(axis=1)
    if bad.any():
        raise UserError(f"translation: the predictions for {bad.sum()} of {bad.size} slices are not finite; "
                        "the training of this checkpoint has diverged, take an earlier one")
    norm_a, norm_b = (np.maximum(np.linalg.norm(curve, axis=1), _NORM_FLOOR) for curve in (a, b))
    return (a * b).sum(axis=1) / (norm_a * norm_b)


def slice_threshold(
    healthy: np.ndarray,  # [n] similarity of healthy slices
    lesion: np.ndarray,  # [m] similarity of lesion slices
) -> tuple[float, int]:
    """The candidate with the fewest errors on these slices (the lowest one, if several), and the number of errors."""
    candidates = np.quantile(healthy, _CANDIDATES)
    errors = (lesion[:, None] > candidates).sum(axis=0) + (healthy[:, None] < candidates).sum(axis=0)
    best = int(errors.argmin())
    return float(candidates[best]), int(errors[best])


def calibrate(
    mse: np.ndarray,  # [B, T, M]
    ref: np.ndarray,  # [B, T, M]
    diff: np.ndarray,  # [B, T, M]
    labels: np.ndarray,  # [B] 0 healthy, 1 lesion
    *,
    modality: tuple[int, ...],
    made_with: Mapping[str, Any] | None = None,
) -> Calibration:
    """Chooses the slice threshold and the range of the diff curve's peak on validation slices.

    Args:
      mse, ref, diff: spatial means of (G - X)^2, (R - X)^2 and (G - R)^2 (guided, reference, input).
      labels: one yes/no label for each slice.
      modality: the channels that the last axis stands for.
      made_with: kept with the result, to recognise later what it belongs to.

    Raises:
      UserError: if there is no healthy or no lesion slice, or if the curves are not finite.
    """
    is_lesion = np.asarray(labels) > 0
    _require_both(is_lesion)
    s = similarity(mse, ref)
    threshold, errors = slice_threshold(s[~is_lesion], s[is_lesion])
    peaks = np.asarray(diff, np.float64)[is_lesion].max(axis=1)  # [lesion slices, M]
    return Calibration(
        threshold=threshold,
        diff_max=tuple(peaks.max(axis=0).tolist()),
        diff_min=tuple(peaks.min(axis=0).tolist()),
        modality=tuple(modality),
        healthy_slices=int((~is_lesion).sum()),
        lesion_slices=int(is_lesion.sum()),
        errors=errors,
        made_with=dict(made_with or {}),
        slice_scores=score_histogram(1 - s, is_lesion),
    )


def _require_both(is_lesion: np.ndarray) -> None:
    lacking = [name for name, found in (("healthy (label 0)", ~is_lesion), ("lesion (label 1)", is_lesion))
               if not found.any()]
    if lacking:
        raise UserError(
            f"validation slices: no {' and no '.join(lacking)} slice among {is_lesion.size}, calibration needs both "
            f"kinds; put cases that have them into the validation split, or use a preset ({', '.join(PRESETS)})")


@dataclasses.dataclass(frozen=True)
class PixelFilters:
    """The published filters, in units of pixels.

    Attributes:
      median: filter maps by a median of 5 pixels along each axis.
      remove_up_to: connected components of at most so many pixels are taken out; 0 keeps all.
      dimensions: 2, each slice alone, or 3.
    """

    median: bool = False
    remove_up_to: int = 0
    dimensions: int = 2

    def heads(self, heads: np.ndarray, grid: SliceGrid) -> np.ndarray:
        """Returns the heads unchanged."""
        return heads

    def maps(self, maps: np.ndarray, grid: SliceGrid) -> np.ndarray:
        """See `median_filtered`."""
        return median_filtered(maps, self._positions(grid)) if self.median else maps

    def masks(self, masks: np.ndarray, grid: SliceGrid) -> np.ndarray:
        """See `remove_small_components`."""
        return remove_small_components(masks, self.remove_up_to, self._positions(grid))

    def _positions(self, grid: SliceGrid) -> np.ndarray | None:
        return grid.positions if self.dimensions == 3 else None


PUBLISHED_FILTERS = PixelFilters(median=True)


def make_masks(
    mse: np.ndarray,  # [B, T, M]
    ref: np.ndarray,  # [B, T, M]
    diff: np.ndarray,  # [B, T, M]
    maps: np.ndarray,  # [B, H, W, M] mean of mse_t before t_e
    calibration: Calibration,
    filters: Filters = PUBLISHED_FILTERS,
    grid: SliceGrid = ONE_BY_ONE,
) -> Masks:
    """Thresholds each slice's map at a quantile. The higher the peak of its diff curve, the lower the quantile.

    Args:
      mse, ref, diff: spatial means of (G - X)^2, (R - X)^2 and (G - R)^2 (guided, reference, input).
      maps: one anomaly map for each modality.
      calibration: the network's slice threshold and the largest diff peaks, for the same M modalities.
      filters: of the averaged map and of the masks. The thresholds always come from the unfiltered maps.
      grid: where the slices lie.

    Returns:
      The masks; their anomaly score is 1 - `similarity`.

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
    lesion = alike <= calibration.threshold
    mask = mask_all & lesion[:, None, None]  # filtered separately, since components in 3-D differ
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
    return ndimage.median_filter(in_volume(maps, positions), size=5, mode="mirror")[positions - positions[0]]


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
    """Removes 8-connected components of at most `max_pixels` pixels, slice by slice.

    Given the slices' positions in their volume, every 26-connected one in 3-D. A hole does not count to the size of the
    component around it.
    """
    if positions is None:
        labels, _ = ndimage.label(masks, structure=_IN_PLANE)
    else:
        labels = ndimage.label(in_volume(masks, positions), structure=IN_SPACE)[0][positions - positions[0]]
    keep = np.bincount(labels.ravel()) > max_pixels
    keep[0] = False  # the background
    return keep[labels]


@dataclasses.dataclass(frozen=True)
class Hae(MapThresholdMethod):
    """The published forward process (Che et al., arXiv:2404.15683): see `forward_process`.

    With the rule "quantile", as published; with another one, its map averaged over the modalities is thresholded.
    """

    process: Process
    settings: ForwardSettings
    rule: str = dataclasses.field(default="quantile", kw_only=True)
    filters: Filters = dataclasses.field(default=PUBLISHED_FILTERS, kw_only=True)

    name: ClassVar[str] = "hae"
    network: ClassVar[bool] = True

    @property
    def modality(self) -> tuple[int, ...]:
        """Channels of the reconstruction."""
        return self.settings.modality

    @property
    def passes(self) -> int:
        """Network passes per slice: three per step, and twice as many if the process runs twice (`t_e_ratio`)."""
        return 3 * self.settings.steps * (1 if self.settings.t_e_ratio == 1 else 2)

    def __call__(
        self,
        denoisers: Denoisers,
        x0: jax.Array,  # [B, H, W, C] in [-1, 1]
        keys: jax.Array,  # [B], of each slice's noise
    ) -> Translation:
        """Runs the forward process for a batch."""
        return forward_process(self.process, denoisers, x0, step_noise(keys, x0.shape[1:]), self.settings)

    def calibrate(
        self, results: Iterable[tuple[Translation, ValidationSlice]], made_with: Mapping[str, Any]
    ) -> Calibration | MapThreshold:
        """Chooses the slice threshold and the peaks of the diff curve, without masks. Only the curves are kept.

        Raises:
          UserError: if there is no healthy or no lesion slice, or a curve is not finite.
        """
        if self.rule != "quantile":
            return super().calibrate(results, made_with)
        curves, labels = [], []
        for result, item in results:
            curves.append((result.mse, result.ref, result.diff))
            labels.append(item.label)
        shape = (0, self.settings.steps, len(self.settings.modality))
        mse, ref, diff = map(np.stack, zip(*curves, strict=True)) if curves else [np.zeros(shape)] * 3
        return calibrate(mse, ref, diff, np.array(labels, int), modality=self.settings.modality, made_with=made_with)

    def read_calibration(self, fields: Any) -> Calibration | MapThreshold:
        """See `calibration.from_json`, or `MapThresholdMethod.read_calibration` with another rule."""
        return (from_json(Calibration, fields) if self.rule == "quantile"
                else super().read_calibration(fields))

    def masks(
        self,
        results: Translation,
        calibration: Any,  # a Calibration with the published rule, a MapThreshold with another one
        heads: np.ndarray,
        grid: SliceGrid,
    ) -> Masks:
        """See `make_masks`, or `MapThresholdMethod.masks` with another rule than the published one."""
        if self.rule != "quantile":
            return super().masks(results, calibration, heads, grid)
        mse, ref, diff, maps = map(np.asarray, (results.mse, results.ref, results.diff, results.map))
        return make_masks(mse, ref, diff, maps, calibration, self.filters, grid)

    def _maps(self, results: Translation, grid: SliceGrid) -> np.ndarray:  # [S, H, W] float64
        return super()._maps(results._replace(map=np.asarray(results.map, np.float64).mean(axis=-1)), grid)
