"""Masks from a method's anomaly maps, by a threshold that a rule has chosen on validation slices.

All methods use this module, except the published forward process with its own rule (`published.py`). `rules.py` chooses
the threshold. This module applies it, filters the masks, and scores slices. A slice with a lesion has a high anomaly
score. The threshold of the score is chosen from image labels, with every rule for pixels.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
from scipy import ndimage

from hae_jax.data.slices import SliceGrid
from hae_jax.errors import UserError
from hae_jax.localization import calibration, probability, rules
from hae_jax.localization.calibration import MapThreshold

IN_SPACE = np.ones((3, 3, 3))  # 26 neighbours


class Masks(NamedTuple):
    """The results for each slice.

    Attributes:
      map: [B, H, W] float32, the anomaly map.
      mask_all: [B, H, W] bool, the mask of every slice, as if each had a lesion (the "lesion_slices" setting).
      mask: [B, H, W] bool, as `mask_all`, but slices that are called healthy are emptied before the filters, unless
        the method is not `gated` (the "all_slices" setting).
      lesion: [B] bool, the slice's predicted label.
      score: [B] float64, the anomaly score: high where there is a lesion.
    """

    map: np.ndarray
    mask_all: np.ndarray
    mask: np.ndarray
    lesion: np.ndarray
    score: np.ndarray


class Filters(Protocol):
    """Filters of maps and masks. `maps` is applied before the threshold, in calibration too; `masks` after it."""

    def heads(self, heads: np.ndarray, grid: SliceGrid) -> np.ndarray:
        """The part of the heads [S, H, W] bool in which lesions are searched."""
        ...

    def maps(self, maps: np.ndarray, grid: SliceGrid) -> np.ndarray:
        """Filtered anomaly maps [S, H, W]."""
        ...

    def masks(self, masks: np.ndarray, grid: SliceGrid) -> np.ndarray:
        """Filtered masks [S, H, W] bool."""
        ...


@dataclasses.dataclass(frozen=True)
class PhysicalFilters:
    """Filters in mm and ml, so that they mean the same at every resolution.

    The erosion acts in the plane of each slice, and the Gaussian across slices. Median and components are in 3-D.

    Attributes:
      across_mm: standard deviation of a Gaussian across the slices of a map; 0: none.
      head_erosion_mm: width of the margin inside the head's outline in which no lesions are searched; 0: none.
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
        """Erodes the heads in the plane of each slice."""
        if not self.head_erosion_mm:
            return heads
        spacing = self._spacing(grid)[:2]
        depth = [ndimage.distance_transform_edt(np.pad(head, 1), sampling=spacing)[1:-1, 1:-1] for head in heads]
        return np.stack(depth) > self.head_erosion_mm

    def maps(self, maps: np.ndarray, grid: SliceGrid) -> np.ndarray:
        """Smooths maps across slices, since an anomaly in a single slice is mostly noise."""
        if not self.across_mm or grid.positions is None or len(maps) < 2:
            return maps
        apart = (grid.positions[:, None] - grid.positions) * self._spacing(grid)[2]
        weights = np.exp(-0.5 * (apart / self.across_mm) ** 2) * (np.abs(apart) <= 4 * self.across_mm)
        weights /= weights.sum(axis=1, keepdims=True)  # fewer neighbours at the ends and beside missing slices
        return np.einsum("st,thw->shw", weights, maps)

    def masks(self, masks: np.ndarray, grid: SliceGrid) -> np.ndarray:
        """Applies the majority filter, then removes small components."""
        if not masks.any() or not (self.median_mm or self.smallest_ml):
            return masks
        spacing, positions = self._spacing(grid), grid.positions
        positions = np.arange(len(masks)) if positions is None else positions
        stack = in_volume(masks, positions)
        if self.median_mm:
            # The nearest odd number of voxels. Of two equally near ones, the smaller, but not 1, which does nothing.
            edges = (self.median_mm / step for step in (spacing[2], *spacing[:2]))
            size = tuple(max(3, 2 * math.ceil(edge / 2) - 1) if edge >= 2 else 1 for edge in edges)
            stack = ndimage.median_filter(stack.astype(np.uint8), size=size, mode="mirror") > 0
        if self.smallest_ml:
            labels = ndimage.label(stack, structure=IN_SPACE)[0]
            keep = np.bincount(labels.ravel()) * np.prod(spacing) / 1000 >= self.smallest_ml
            keep[0] = False  # the background
            stack = keep[labels]
        return stack[positions - positions[0]]

    def _spacing(self, grid: SliceGrid) -> tuple[float, float, float]:
        if grid.spacing is None:
            raise UserError("translation.filters is 'mm', but the pixel size of the prepared data is not known; "
                            "prepare them from NIfTI files, or set translation.filters to 'pixels'")
        return grid.spacing


NO_FILTERS = PhysicalFilters()


def in_volume(
    slices: np.ndarray,  # [B, H, W]
    positions: np.ndarray,  # [B] in rising order
) -> np.ndarray:  # [D, H, W]
    """Puts slices at their positions in a volume that is zero elsewhere."""
    stack = np.zeros((positions[-1] - positions[0] + 1, *slices.shape[1:]), slices.dtype)
    stack[positions - positions[0]] = slices
    return stack


class ValidationSlice(NamedTuple):
    """A validation slice, as a calibration uses it. Only the rule "dice" uses `truth`."""

    label: int  # 1: the slice has a lesion
    truth: np.ndarray  # [H, W] bool
    head: np.ndarray  # [H, W] bool
    height: float  # position of the slice in its head, 0 (bottom) to 1 (top)
    patient: str
    case: str = ""  # slices of one case are consecutive
    position: int = 0  # in the volume, increasing within a case
    spacing: tuple[float, float, float] | None = None  # mm between pixels and slices; None if it is not known


def without_mm(method: Any) -> Any:
    """The method without filters in mm, for slices of unknown pixel size. Filters in pixels stay."""
    return dataclasses.replace(method, filters=NO_FILTERS) if isinstance(method.filters, PhysicalFilters) else method


@dataclasses.dataclass(frozen=True, kw_only=True)
class MapThresholdMethod:
    """Base class of methods with a threshold on their maps. Results have a field `map`, [H, W] for one slice.

    Attributes:
      rule: that chooses the threshold (`rules.LABELS`).
      healthy_fpr: share of the healthy slices' head pixels above the threshold, for the rule of this name.
      filters: of maps and masks.
      name: of the method.
      gated: whether slices that are called healthy have empty masks.
    """

    rule: str = "dice"
    healthy_fpr: float = 5e-4
    filters: Filters = NO_FILTERS

    name: ClassVar[str]
    gated: ClassVar[bool] = True

    def healthy(self, results: NamedTuple) -> np.ndarray | None:  # [S, H, W, M] in [-1, 1]
        """The pseudo-healthy reconstructions; None if the method makes none."""
        return getattr(results, "healthy", None)

    def calibrate(
        self, results: Iterable[tuple[NamedTuple, ValidationSlice]], made_with: Mapping[str, Any]
    ) -> MapThreshold:
        """Chooses the thresholds for pixels and for slices.

        Args:
          results: for each validation slice its result and what is known of it, one slice at a time.
          made_with: kept with the thresholds.

        Raises:
          UserError: the slices are not what the rule needs, or a map is not finite.
        """
        samples, scores, labels = self.samples(results)
        chosen = self._chosen(samples, scores, labels)
        cut, errors = rules.slice_threshold(scores, labels)
        auc = rules.slice_auc(scores, labels)
        return MapThreshold(
            self.name, self.rule, rules.LABELS[self.rule], chosen.value, cut, errors, None if math.isnan(auc) else auc,
            int((~labels).sum()), int(labels.sum()), chosen.expected_dice, chosen.interval or (), chosen.lesion_share,
            dict(made_with), probability.fit(samples, scores, labels), calibration.score_histogram(scores, labels))

    def samples(
        self, results: Iterable[tuple[NamedTuple, ValidationSlice]]
    ) -> tuple[list[rules.Sample], np.ndarray, np.ndarray]:
        """The input of rules: the map's values in each slice's head, anomaly scores [S], labels [S] bool."""
        samples: list[rules.Sample] = []
        for _, slices in itertools.groupby(results, key=lambda pair: pair[1].case):
            found, items = zip(*slices, strict=True)
            grid = SliceGrid(np.array([item.position for item in items]), items[0].spacing)
            maps = self._maps(stacked(found), grid)
            heads = self.filters.heads(np.stack([item.head for item in items]), grid)
            samples += [rules.Sample(own[head], item.truth[head], item.label, item.height, item.patient)
                        for own, head, item in zip(maps, heads, items, strict=True)]
        scores = np.array([rules.anomaly_score(sample.values) for sample in samples])
        return samples, scores, np.array([sample.label > 0 for sample in samples], bool)

    def _chosen(self, samples: list[rules.Sample], scores: np.ndarray, labels: np.ndarray) -> rules.Threshold:
        if self.rule == "quantile":
            rules.require_both(samples)
            return rules.Threshold(float(scores[labels].max()))
        if self.rule == "healthy_fpr":
            return rules.healthy_fpr(samples, self.healthy_fpr)
        return {"mixture": rules.mixture, "dice": rules.best_dice}[self.rule](samples)

    def read_calibration(self, fields: Any) -> MapThreshold:
        """The thresholds that a JSON object holds.

        Raises:
          ValueError, TypeError, OverflowError: it is damaged, or another method's or rule's.
        """
        found = calibration.from_json(MapThreshold, fields)
        if (found.method, found.rule) != (self.name, self.rule):
            raise ValueError(f"is of the method {found.method} with the rule {found.rule}, not of {self.name} with "
                             f"{self.rule}")
        return found

    def masks(
        self,
        results: NamedTuple,  # maps [S, H, W]
        calibration: MapThreshold,
        heads: np.ndarray,  # [S, H, W] bool
        grid: SliceGrid,
    ) -> Masks:
        """The masks of a case's slices.

        Raises:
          UserError: if a map is not finite.
        """
        maps = self._maps(results, grid)
        heads = self.filters.heads(heads, grid)
        scores = np.array([rules.anomaly_score(own[head]) for own, head in zip(maps, heads, strict=True)])
        if self.rule == "quantile":
            thresholds = rules.quantile_thresholds(maps, heads, scores, calibration.threshold)
            found = heads & (maps >= thresholds[:, None, None])
        else:
            found = heads & (maps >= calibration.threshold)
        lesion = scores >= calibration.slice_threshold
        mask_all, mask = (self.filters.masks(m, grid) for m in (
            found, found & lesion[:, None, None] if self.gated else found))
        return Masks((maps * heads).astype(np.float32), mask_all, mask, lesion, scores)

    def _maps(self, results: Any, grid: SliceGrid) -> np.ndarray:  # [S, H, W] float64
        """The filtered maps.

        They are float64, so that a threshold taken from a float32 map is compared with it exactly.
        """
        maps = np.asarray(results.map, np.float64)
        bad = ~np.isfinite(maps).all(axis=(1, 2))
        if bad.any():
            raise UserError(f"translation: the maps of {bad.sum()} of {bad.size} slices are not finite; the training "
                            "of this checkpoint has diverged, take an earlier one")
        return self.filters.maps(maps, grid)


def stacked(results: Iterable[NamedTuple]) -> NamedTuple:
    """Stacks the results of single slices to those of a batch."""
    results = list(results)
    return results[0]._make(map(np.stack, zip(*results, strict=True)))
