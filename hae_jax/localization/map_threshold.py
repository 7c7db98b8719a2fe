"""From a method's anomaly maps to masks, by a threshold that a rule has chosen on validation slices.

Every method but the published forward process with its own rule (`calibration.py`) goes this way: `rules.py` chooses,
this file keeps what was chosen, applies it and scores slices. The anomaly score of a slice is high where there is a
lesion; its threshold comes from image labels, whatever the rule for pixels has seen.
"""

import dataclasses
import itertools
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np

from hae_jax import files
from hae_jax.errors import UserError
from hae_jax.localization import calibration, probability, rules
from hae_jax.localization.masks import PUBLISHED_FILTERS, Filters, Masks, SliceGrid

_LEVELS = (0.98, 0.90)  # quantile levels of the rule "quantile", of the least and the most anomalous slice


class ValidationSlice(NamedTuple):
    """What a calibration may know of a validation slice. Only the rule "dice" looks at `truth`."""

    label: int  # 1: the slice has a lesion
    truth: np.ndarray  # [H, W] bool
    head: np.ndarray  # [H, W] bool
    height: float  # where the slice lies in its head, 0 (bottom) to 1 (top)
    patient: str
    case: str = ""  # slices of one case follow one another
    position: int = 0  # in the volume, rising within a case
    spacing: tuple[float, float, float] | None = None  # mm between pixels and slices; None where it is not known


@dataclasses.dataclass(frozen=True)
class MapThreshold:
    """What turns a method's maps into masks.

    Attributes:
      method: the method's name.
      rule: that has chosen the threshold.
      labels: that this rule has seen: "image labels" or "ground truth".
      threshold: a head pixel belongs to the mask where the map is at least this; with the rule "quantile", the largest
        anomaly score of the lesion slices, which scales each slice's own threshold.
      slice_threshold: a slice is called a lesion slice where its anomaly score is at least this.
      slice_errors: validation slices on the wrong side of it.
      slice_auc: area under the ROC curve of the validation slices' anomaly scores; None with one class alone.
      healthy_slices: validation slices without a lesion.
      lesion_slices: validation slices with one.
      expected_dice: that the rule expects (`rules.Threshold`); None where it makes no estimate.
      interval: 95 % over patients of it; empty where there is none.
      lesion_share: share of lesion pixels in lesion slices, by the rule "mixture"; None for the others.
      made_with: what it belongs to (checkpoint identity, settings, data, ...), ready for JSON.
      probability: curves that turn maps into probabilities (`probability.fit`); None where there are none.
      slice_scores: `calibration.score_histogram` of the validation slices, for the report; empty where it is not known.

    Raises:
      ValueError: if a threshold is not finite.
    """

    method: str
    rule: str
    labels: str
    threshold: float
    slice_threshold: float
    slice_errors: int
    slice_auc: float | None
    healthy_slices: int
    lesion_slices: int
    expected_dice: float | None = None
    interval: tuple[float, ...] = ()
    lesion_share: float | None = None
    made_with: dict[str, Any] = dataclasses.field(default_factory=dict)
    probability: dict[str, Any] | None = None
    slice_scores: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if not (math.isfinite(self.threshold) and math.isfinite(self.slice_threshold)):
            raise ValueError("threshold and slice_threshold must be finite")

    def save(self, path: str | os.PathLike) -> None:
        """Writes it as JSON, whole or not at all."""
        files.write_json(path, dataclasses.asdict(self))

    @classmethod
    def load(cls, path: str | os.PathLike) -> "MapThreshold":
        """Reads what `save` wrote.

        Raises:
          UserError: if there is no such file, it is not JSON, or a field is missing, unknown or of a wrong kind.
        """
        return calibration.loaded(cls, path, _KINDS, "calibrate first", optional=("probability", "slice_scores"))

    def described(self) -> str:
        """One line for the log."""
        parts = [f"rule {self.rule} ({self.labels}): threshold {self.threshold:.4g}"]
        if self.expected_dice is not None:
            interval = f" [{self.interval[0]:.3f}, {self.interval[1]:.3f}]" if self.interval else ""
            parts.append(f"expected lesion-slice Dice {self.expected_dice:.3f}{interval}")
        if self.lesion_share is not None:
            parts.append(f"share of lesion pixels {self.lesion_share:.4f}")
        if self.slice_auc is not None:
            parts.append(f"slice AUC {self.slice_auc:.3f}")
        return ", ".join(parts)


def _none_or(kind):
    return lambda value: value is None or kind(value)


_KINDS = {  # what each field looks like in JSON
    "method": lambda value: isinstance(value, str),
    "rule": lambda value: value in rules.LABELS,
    "labels": lambda value: isinstance(value, str),
    "threshold": calibration.is_number,
    "slice_threshold": calibration.is_number,
    "slice_errors": calibration.is_whole,
    "slice_auc": _none_or(calibration.is_number),
    "healthy_slices": lambda value: calibration.is_whole(value) and value >= 0,
    "lesion_slices": lambda value: calibration.is_whole(value) and value >= 0,
    "expected_dice": _none_or(calibration.is_number),
    "interval": lambda value: (isinstance(value, list) and len(value) in (0, 2)
                               and all(map(calibration.is_number, value))),
    "lesion_share": _none_or(calibration.is_number),
    "made_with": lambda value: isinstance(value, dict),
    "probability": _none_or(probability.is_curves),
    "slice_scores": calibration.is_histogram,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MapThresholdMethod:
    """What methods with a threshold on their maps share; their results have a field `map`, [H, W] for one slice.

    Attributes:
      rule: that chooses the threshold (`rules.LABELS`).
      healthy_fpr: share of the healthy slices' head pixels above the threshold, for the rule of this name.
      filters: of masks (`masks.Filters`).
      name: of the method.
      gated: whether slices that are called healthy have empty masks.
    """

    rule: str = "dice"
    healthy_fpr: float = 5e-4
    filters: Filters = PUBLISHED_FILTERS

    name: ClassVar[str]
    gated: ClassVar[bool] = True

    def healthy(self, results: NamedTuple) -> np.ndarray | None:  # [S, H, W, M] in [-1, 1]
        """The pseudo-healthy reconstructions; None: the method makes none."""
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
        """What rules look at: the map's values in each slice's head, its anomaly score [S], its label [S] bool."""
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
        return rules.mixture(samples) if self.rule == "mixture" else rules.best_dice(samples)

    def load_calibration(self, path: str | os.PathLike) -> MapThreshold:
        """Reads thresholds of this method.

        Raises:
          UserError: if the file is damaged, or another method's or rule's.
        """
        found = MapThreshold.load(path)
        if (found.method, found.rule) != (self.name, self.rule):
            raise UserError(f"{path}: is of the method {found.method} with the rule {found.rule}, not of {self.name} "
                            f"with {self.rule}; calibrate again")
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
            thresholds = quantile_thresholds(maps, heads, scores, calibration.threshold)
            found = heads & (maps >= thresholds[:, None, None])
        else:
            found = heads & (maps >= calibration.threshold)
        lesion = scores >= calibration.slice_threshold
        mask_all, mask = (self.filters.masks(m, grid) for m in (
            found, found & lesion[:, None, None] if self.gated else found))
        return Masks((maps * heads).astype(np.float32), mask_all, mask, lesion, scores)

    def _maps(self, results: Any, grid: SliceGrid) -> np.ndarray:  # [S, H, W] float64
        """The maps after the filters that work on maps.

        In float64: a threshold that was read from a float32 map must fall on the same side of it again.
        """
        maps = np.asarray(results.map, np.float64)
        bad = ~np.isfinite(maps).all(axis=(1, 2))
        if bad.any():
            raise UserError(f"translation: the maps of {bad.sum()} of {bad.size} slices are not finite; the training "
                            "of this checkpoint has diverged, take an earlier one")
        return self.filters.maps(maps, grid)


def stacked(results: Iterable[NamedTuple]) -> NamedTuple:
    """Results of single slices as those of a batch."""
    results = list(results)
    return type(results[0])(*(None if values[0] is None else np.stack(values)
                              for values in zip(*results, strict=True)))


def quantile_thresholds(
    maps: np.ndarray,  # [S, H, W]
    heads: np.ndarray,  # [S, H, W] bool
    scores: np.ndarray,  # [S]
    largest: float,
) -> np.ndarray:  # [S]
    """Each slice's own quantile, at 0.98 for the least and 0.90 for the most anomalous slice.

    The published rule (`masks.make_masks`) for maps of any method: the anomaly score takes the place of the diff curve.
    """
    share = np.clip(scores / largest, 0, 1) if largest > 0 else np.ones(len(scores))
    levels = _LEVELS[0] - (_LEVELS[0] - _LEVELS[1]) * np.round(share, 2)
    return np.array([np.quantile(own[head], level) if head.any() else np.inf
                     for own, head, level in zip(maps, heads, levels, strict=True)])
