"""Calibration: from validation slices with yes/no labels to the numbers that turn maps into masks.

Stands between the forward process, whose curves it reads, and `masks.py`, which applies it. No pixel label is used.
B: slices, T: forward steps, M: modalities that take part.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hae_jax import files
from hae_jax.errors import UserError

_LEVELS = np.linspace(0.005, 0.095, 100)  # candidate thresholds: these quantiles of the healthy slices' similarity
_BINS = 60  # of the histogram of anomaly scores
_NORM_FLOOR = 1e-6  # each norm is clamped to it, as PyTorch's cosine_similarity does


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What `masks.make_masks` needs to know about a network, its guidance strength and its number of steps.

    Attributes:
      threshold: a slice is called a lesion slice where its similarity (`similarity`) is at most this.
      diff_max: per modality, the largest peak of the diff curve over lesion slices (squared intensity in [-1, 1]).
      diff_min: per modality, the smallest such peak; empty where it is not known (published values).
      modality: the image channels that `diff_max` stands for, in its order.
      healthy_slices: number of healthy slices it was made from; None where it is not known, here and below.
      lesion_slices: number of lesion slices it was made from.
      errors: how many of these slices the threshold puts on the wrong side.
      made_with: what it belongs to (checkpoint identity, guidance strength, steps, ...), ready for JSON.
      slice_scores: `score_histogram` of the validation slices, for the report; empty where it is not known.

    Raises:
      ValueError: if the numbers are not finite or their lengths do not agree.
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

    def save(self, path: str | os.PathLike) -> None:
        """Writes it as JSON, whole or not at all."""
        files.write_json(path, dataclasses.asdict(self))

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Calibration":
        """Reads what `save` wrote.

        Raises:
          UserError: if there is no such file, it is not JSON, or a field is missing, unknown or of a wrong kind.
        """
        return loaded(cls, path, _KINDS, "calibrate first, or name a preset",
                      optional=("slice_scores",))


def loaded(
    cls: type, path: str | os.PathLike, kinds: Mapping[str, Callable[[Any], bool]], otherwise: str,
    optional: tuple[str, ...] = (),
) -> Any:
    """A dataclass from the JSON object that holds its fields, checked.

    Args:
      cls: the dataclass; its tuples are lists in JSON.
      path: the file.
      kinds: for every field, whether a value out of JSON can be its.
      otherwise: what to do if there is no such file, in words.
      optional: fields that files of earlier versions do not have.

    Raises:
      UserError: if there is no such file, it is not JSON, or a field is missing, unknown or of a wrong kind.
    """
    try:
        fields = files.read_json(path)
    except UserError as error:
        there = Path(path).is_file()
        raise UserError(f"{error}; {'delete it and calibrate again' if there else otherwise}") from error
    try:
        return cls(**_checked_fields(fields, kinds, optional))
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: {error}; delete it and calibrate again") from error


def _checked_fields(
    fields: Any, kinds: Mapping[str, Callable[[Any], bool]], optional: tuple[str, ...]
) -> dict[str, Any]:
    """The JSON object as arguments: every field there but optional ones, none unknown, each of its kind."""
    if not isinstance(fields, dict):
        raise TypeError("is not a JSON object")
    if missing := [name for name in kinds if name not in fields and name not in optional]:
        raise ValueError(f"field {', '.join(missing)} is missing")
    if unknown := [name for name in fields if name not in kinds]:
        raise ValueError(f"field {', '.join(unknown)} is not known")
    for name, right in kinds.items():
        if name in fields and not right(fields[name]):
            raise TypeError(f"field {name} has the wrong kind of value ({fields[name]!r})")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


def is_number(value: Any) -> bool:
    """Whether a value out of JSON is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_whole(value: Any) -> bool:
    """Whether a value out of JSON is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)


def _is_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(is_number(item) for item in value)


def is_histogram(value: Any) -> bool:
    """Whether a value out of JSON is a `score_histogram`, or empty."""
    if not isinstance(value, dict) or not value:
        return value == {}
    return (set(value) == {"edges", "healthy", "lesion"} and all(map(_is_numbers, value.values()))
            and len(value["healthy"]) == len(value["lesion"]) == len(value["edges"]) - 1)


def _is_count(value: Any) -> bool:
    return value is None or (is_whole(value) and value >= 0)


_KINDS = {  # what each field looks like in JSON
    "threshold": is_number,
    "diff_max": _is_numbers,
    "diff_min": _is_numbers,
    "modality": lambda value: isinstance(value, list) and all(is_whole(item) for item in value),
    "healthy_slices": _is_count,
    "lesion_slices": _is_count,
    "errors": _is_count,
    "made_with": lambda value: isinstance(value, dict),
    "slice_scores": is_histogram,
}


def score_histogram(
    scores: np.ndarray,  # [S] anomaly scores
    labels: np.ndarray,  # [S] 0 healthy, 1 lesion
) -> dict[str, list]:
    """How many healthy and lesion slices have which anomaly score: "edges" [n + 1], "healthy" [n], "lesion" [n]."""
    lesion, edges = np.asarray(labels) > 0, np.histogram_bin_edges(scores, _BINS)
    return {"edges": edges.tolist(), "healthy": np.histogram(scores[~lesion], edges)[0].tolist(),
            "lesion": np.histogram(scores[lesion], edges)[0].tolist()}


def similarity(
    mse: np.ndarray,  # [B, T, M]
    ref: np.ndarray,  # [B, T, M]
) -> np.ndarray:  # [B]
    """How alike the guided and the reference prediction err along the forward process: near 1 for a healthy slice.

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
    """The candidate that makes the fewest errors on these slices (the lowest of several such), and their number."""
    candidates = np.quantile(healthy, _LEVELS)
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
    valid: np.ndarray | None = None,  # [B] bool, False where a row is padding
) -> Calibration:
    """Chooses the slice threshold and the range of the diff curve's peak on validation slices.

    Args:
      mse, ref, diff: spatial means of (G - X)^2, (R - X)^2 and (G - R)^2 (guided, reference, input).
      labels: one yes/no label for each slice.
      modality: the channels that the last axis stands for.
      made_with: kept with the result, to recognise later what it belongs to.
      valid: rows to count; all of them where None.

    Raises:
      UserError: if there is no healthy or no lesion slice, or if the curves are not finite.
    """
    rows = np.ones(len(labels), bool) if valid is None else np.asarray(valid, bool)
    is_lesion = np.asarray(labels)[rows] > 0
    _require_both(is_lesion)
    s = similarity(mse[rows], ref[rows])
    threshold, errors = slice_threshold(s[~is_lesion], s[is_lesion])
    peaks = np.asarray(diff, np.float64)[rows][is_lesion].max(axis=1)  # [lesion slices, M]
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


def preset(name: str) -> Calibration:
    """A published calibration, for those who have no validation data.

    Raises:
      UserError: if there is none of this name.
    """
    if name not in PRESETS:
        raise UserError(f"calibration preset {name!r}: not known; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]


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
