"""Calibrations: thresholds that are chosen on validation slices and used to make masks of maps; published presets.

The published forward process uses `Calibration`, all other methods use `MapThreshold`. `published.py` and
`map_threshold.py` make and apply them. `pipeline.calibrations` stores them as JSON.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from hae_jax.localization import probability, rules

_BINS = 60  # of the histogram of anomaly scores


@dataclasses.dataclass(frozen=True)
class MapThreshold:
    """The thresholds that turn a method's maps into masks.

    Attributes:
      method: the method's name.
      rule: the rule that has chosen the threshold.
      labels: the labels that this rule has used: "image labels" or "ground truth".
      threshold: a head pixel belongs to the mask where the map is at least this; with the rule "quantile", the largest
        anomaly score of the lesion slices, which scales each slice's own threshold.
      slice_threshold: a slice is called a lesion slice where its anomaly score is at least this.
      slice_errors: number of validation slices that it classifies wrongly.
      slice_auc: area under the ROC curve of the validation slices' anomaly scores; None with only one class.
      healthy_slices: validation slices without a lesion.
      lesion_slices: validation slices with a lesion.
      expected_dice: the rule's estimate of Dice (`rules.Threshold`); None without an estimate.
      interval: its 95 % interval over patients; empty if there is none.
      lesion_share: share of lesion pixels in lesion slices, by the rule "mixture"; None for other rules.
      made_with: its key (checkpoint identity, settings, data, ...), ready for JSON.
      probability: curves that turn maps into probabilities (`probability.fit`); None if there are none.
      slice_scores: `score_histogram` of the validation slices, for the report; empty if it is not known.

    Raises:
      ValueError: a threshold is not finite.
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

    def described(self) -> str:
        """One line for the log."""
        parts = [f"rule {self.rule} ({self.labels}): threshold {self.threshold:.4g}"]
        if self.expected_dice is not None:
            interval = f" [{self.interval[0]:.3f}, {self.interval[1]:.3f}]" if self.interval else ""
            parts.append(f"expected Dice {self.expected_dice:.3f}{interval}")
        if self.lesion_share is not None:
            parts.append(f"share of lesion pixels {self.lesion_share:.4f}")
        if self.slice_auc is not None:
            parts.append(f"slice AUC {self.slice_auc:.3f}")
        return ", ".join(parts)


@dataclasses.dataclass(frozen=True)
class Calibration:
    """The values for `published.make_masks`. They hold for one network, guidance strength and number of steps.

    Attributes:
      threshold: a slice is called a lesion slice where its similarity (`published.similarity`) is at most this.
      diff_max: per modality, the largest peak of the diff curve over lesion slices (squared intensity in [-1, 1]).
      diff_min: per modality, the smallest such peak; empty if it is not known (published values).
      modality: the image channels of `diff_max`, in its order.
      healthy_slices: number of healthy slices in the calibration; None if it is not known, here and below.
      lesion_slices: number of lesion slices in the calibration.
      errors: number of these slices that the threshold classifies wrongly.
      made_with: its key (checkpoint identity, guidance strength, steps, ...), ready for JSON.
      slice_scores: `score_histogram` of the validation slices, for the report; empty if it is not known.

    Raises:
      ValueError: the values are not finite or their lengths do not agree.
    """

    threshold: float
    diff_max: tuple[float, ...]
    diff_min: tuple[float, ...]
    modality: tuple[int, ...]
    healthy_slices: int | None = None
    lesion_slices: int | None = None
    errors: int | None = None
    made_with: dict[str, Any] = dataclasses.field(default_factory=dict)
    slice_scores: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if not self.modality or len(self.diff_max) != len(self.modality):
            raise ValueError(f"diff_max has {len(self.diff_max)} values for {len(self.modality)} modalities")
        if self.diff_min and len(self.diff_min) != len(self.modality):
            raise ValueError(f"diff_min has {len(self.diff_min)} values for {len(self.modality)} modalities")
        if not all(math.isfinite(value) for value in (self.threshold, *self.diff_max, *self.diff_min)):
            raise ValueError("threshold, diff_max and diff_min must be finite")
        if min(self.diff_max) < 0:
            raise ValueError("diff_max must not be negative")


def from_json(cls: type, fields: Any) -> Any:
    """A calibration from the JSON object that holds its fields.

    Args:
      cls: `MapThreshold` or `Calibration`; its tuples are lists in JSON.
      fields: the JSON object of the file.

    Raises:
      ValueError, TypeError, OverflowError: it is no JSON object, or a field is missing, unknown or of a wrong kind.
    """
    if not isinstance(fields, dict):
        raise TypeError("is not a JSON object")
    own = {field.name: field.default is field.default_factory is dataclasses.MISSING
           for field in dataclasses.fields(cls)}
    if missing := [name for name, needed in own.items() if needed and name not in fields]:
        raise ValueError(f"field {', '.join(missing)} is missing")
    if unknown := [name for name in fields if name not in own]:
        raise ValueError(f"field {', '.join(unknown)} is not known")
    for name, value in fields.items():
        if not _KINDS[name](value):
            raise TypeError(f"field {name} has the wrong kind of value ({value!r})")
    return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_number, value))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_histogram(value: Any) -> bool:
    if not isinstance(value, dict) or not value:
        return value == {}
    return (set(value) == {"edges", "healthy", "lesion"} and all(map(_is_numbers, value.values()))
            and len(value["healthy"]) == len(value["lesion"]) == len(value["edges"]) - 1)


def _or_none(kind: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or kind(value)


_KINDS: dict[str, Callable[[Any], bool]] = {  # checks of each field of a calibration in JSON
    "method": lambda value: isinstance(value, str),
    "rule": lambda value: isinstance(value, str) and value in rules.LABELS,
    "labels": lambda value: isinstance(value, str),
    "threshold": _is_number,
    "slice_threshold": _is_number,
    "slice_errors": _is_count,
    "slice_auc": _or_none(_is_number),
    "healthy_slices": _or_none(_is_count),
    "lesion_slices": _or_none(_is_count),
    "expected_dice": _or_none(_is_number),
    "interval": lambda value: _is_numbers(value) and len(value) in (0, 2),
    "lesion_share": _or_none(_is_number),
    "made_with": lambda value: isinstance(value, dict),
    "probability": _or_none(probability.is_curves),
    "slice_scores": _is_histogram,
    "diff_max": _is_numbers,
    "diff_min": _is_numbers,
    "modality": lambda value: isinstance(value, list) and all(map(_is_count, value)),
    "errors": _or_none(_is_count),
}


def score_histogram(
    scores: np.ndarray,  # [S] anomaly scores
    labels: np.ndarray,  # [S] 0 healthy, 1 lesion
) -> dict[str, list]:
    """Histograms of anomaly scores by class of slices: "edges" [n + 1], "healthy" [n], "lesion" [n]."""
    lesion, edges = np.asarray(labels) > 0, np.histogram_bin_edges(scores, _BINS)
    return {"edges": edges.tolist(), "healthy": np.histogram(scores[~lesion], edges)[0].tolist(),
            "lesion": np.histogram(scores[lesion], edges)[0].tolist()}


_AS_PUBLISHED = {"respacing": "", "reference": "healthy", "d_reverse": True, "clipping": "static", "maps": "mse"}


def _published(data: str, guidance: float, steps: int, threshold: float, diff_max: tuple[float, ...],
               modality: tuple[int, ...]) -> Calibration:
    made_with = {"source": "published", "data": data, "guidance": guidance, "forward_steps": steps, **_AS_PUBLISHED}
    return Calibration(threshold, diff_max, (), modality, made_with=made_with)


PRESETS = {
    "brats_600": _published("BraTS", 2.0, 600, 0.99488, (0.0509, 0.0397), (0, 3)),
    "brats_999": _published("BraTS", 2.0, 999, 0.99931, (0.0551, 0.0388), (0, 3)),
    "atlas_600": _published("ATLAS", 20.0, 600, 0.72854, (0.8555,), (0,)),
}
