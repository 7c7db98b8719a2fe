"""Lesion probabilities in [0, 1] and their uncertainty from anomaly maps, by curves made from image labels only.

`map_threshold.py` makes the curves as part of a calibration. `volumes` applies them to a case.

Let h(v) and u(v) be the densities of the map's values in the heads of healthy and of lesion validation slices, and pi
the share of lesion pixels in lesion slices: the mixture u = pi t + (1 - pi) h of `rules.mixture`. A pixel with value v
in a lesion slice is then lesion with probability

    P(v) = pi t(v) / u(v) = 1 - (1 - pi) h(v) / u(v)

(positive and unlabelled data; Elkan and Noto 2008). h / u is estimated by isotonic regression of the slices' labels on
v, so P is non-decreasing. Likewise, Q(s) is the isotonic regression of the labels on the slices' anomaly scores s. It
is the probability that a slice has a lesion, if lesion slices are as frequent as in the validation split. A pixel's
probability is Q(s) P(v).
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from hae_jax.data.slices import SlicedCase
from hae_jax.errors import UserError
from hae_jax.localization import rules

MEANINGS = {
    "probability":
        "Probability that a voxel belongs to a lesion, from 0 to 1. It is the product of two probabilities: that its "
        "slice has a lesion, given the slice's anomaly score, and that the voxel is lesion in a lesion slice, given "
        "the value of the anomaly map. Both were estimated on validation slices from image labels alone. They are "
        "valid if lesions are as frequent as in the validation slices.",
    "uncertainty":
        "Standard deviation, from 0 to 0.5, that the probability of the same slice would have if the noise of the "
        "method were drawn again. It measures the effect of the noise, not how often the network is wrong.",
}
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(7)  # for the normal distribution


class Volumes(NamedTuple):
    """A case's maps in [0, 1] on its reoriented grid, zero outside the head."""

    probability: np.ndarray  # [X, Y, Z] float32
    uncertainty: np.ndarray | None  # the same; None with a single noise draw, or a method without noise draws


def fit(
    samples: Sequence[rules.Sample],  # validation slices
    scores: np.ndarray,  # [S] their anomaly scores
    labels: np.ndarray,  # [S] bool, whether they have a lesion
) -> dict[str, Any] | None:
    """The curves P and Q, ready for JSON; None with one class of slices alone.

    Each curve is a list of places `at` and of probabilities there, with straight lines between and constant beyond.
    """
    if not 0 < labels.sum() < len(labels):
        return None
    shares = rules.shares(samples)
    return {"pixel": _pixel_curve(shares), "slice": _slice_curve(scores, labels), "lesion_share": shares.lesion_share,
            "lesion_slices": float(labels.mean())}


def is_curves(value: Any) -> bool:
    """Whether a value from JSON has the form of a result of `fit`."""
    def rising(curve: Any) -> bool:
        try:
            at, probability = np.array(curve["at"], float), np.array(curve["probability"], float)
        except (TypeError, KeyError, ValueError):
            return False
        return bool(at.ndim == 1 and at.size and at.shape == probability.shape and (np.diff(at) > 0).all()
                    and (np.diff(probability) >= 0).all() and probability[0] >= 0 and probability[-1] <= 1)

    return isinstance(value, dict) and all(rising(value.get(name)) for name in ("pixel", "slice"))


def _isotonic(**limits: Any) -> Any:
    from sklearn.isotonic import IsotonicRegression  # slow to import, and only calibration needs it

    return IsotonicRegression(**limits)


def _pixel_curve(shares: rules.Shares) -> dict[str, list[float]]:
    levels = shares.levels
    u, h = (-np.diff(above, prepend=1, append=0) for above in (shares.lesion_slices, shares.healthy_slices))
    at = np.concatenate([levels[:1], (levels[1:] + levels[:-1]) / 2, levels[-1:]])
    mass = u + h
    lesion = np.divide(u, mass, out=np.zeros_like(u), where=mass > 0)
    g = _isotonic(y_min=1e-12, y_max=1).fit_transform(at, lesion, sample_weight=np.maximum(mass, 1e-12))
    return _curve(at, np.clip(1 - (1 - shares.lesion_share) * (1 - g) / g, 0, 1))


def _slice_curve(scores: np.ndarray, labels: np.ndarray) -> dict[str, list[float]]:
    """The curve Q. Its distance from 0 and 1 is at least that of the rule of succession for this number of slices."""
    least = 1 / (len(labels) + 2)
    fitted = _isotonic(y_min=least, y_max=1 - least, out_of_bounds="clip").fit(scores, labels.astype(float))
    return _curve(fitted.X_thresholds_, fitted.y_thresholds_)


def _curve(at: np.ndarray, probability: np.ndarray) -> dict[str, list[float]]:
    """A curve without points inside of constant stretches and without duplicate positions."""
    last = np.append(np.diff(at) > 0, True)
    at, probability = at[last], probability[last]
    flat = np.diff(probability) == 0
    keep = ~(np.append(False, flat) & np.append(flat, False))
    return {"at": at[keep].tolist(), "probability": probability[keep].tolist()}


def _value(curve: Mapping[str, Sequence[float]], at: np.ndarray) -> np.ndarray:
    return np.interp(at, curve["at"], curve["probability"])


def pixel_probability(
    curves: Mapping[str, Any],  # of `fit`
    maps: np.ndarray,  # [S, H, W]
    scores: np.ndarray,  # [S] anomaly scores
) -> np.ndarray:  # [S, H, W]
    """Q(s) P(v) of every pixel."""
    return _value(curves["slice"], scores)[:, None, None] * _value(curves["pixel"], maps)


def pixel_uncertainty(
    curves: Mapping[str, Any],  # of `fit`
    maps: np.ndarray,  # [S, H, W] mean over noise draws
    scores: np.ndarray,  # [S] anomaly scores
    deviation: np.ndarray,  # [S, H, W] standard deviation of this mean
) -> np.ndarray:  # [S, H, W] in [0, 0.5]
    """The standard deviation of Q(s) P(v) for normally distributed v, by Gauss-Hermite quadrature."""
    weights = _WEIGHTS / _WEIGHTS.sum()
    values = [_value(curves["pixel"], maps + node * deviation) for node in _NODES]
    mean = sum(weight * value for weight, value in zip(weights, values, strict=True))
    variance = sum(weight * (value - mean) ** 2 for weight, value in zip(weights, values, strict=True))
    return _value(curves["slice"], scores)[:, None, None] * np.sqrt(variance)


def check_probability(calibration: Any) -> None:
    """Refuses calibrations without curves.

    Raises:
      UserError: it has none.
    """
    if getattr(calibration, "probability", None) is None:
        raise UserError("calibration: has no probability curves. It is a published preset, has the rule quantile, was "
                        "made from one class of slices, or is older than version 0.2.0; calibrate again on "
                        "validation slices of both classes, or leave save_probability out")


def volumes(case: SlicedCase, method: Any, results: Any, masks: Any, calibration: Any) -> Volumes:
    """A case's probability and, where the method draws noise several times (`residual`), its uncertainty.

    Args:
      method: that was used; one that draws noise several times has `settings.draws`.
      results: its results, [S, ...]; then with a field `spread` [S, H, W], the standard deviation over noise draws.
      masks: `map_threshold.Masks` that the method made of them.
      calibration: of the method.

    Raises:
      UserError: the calibration has no curves.
    """
    check_probability(calibration)
    curves = calibration.probability
    maps, spread = np.asarray(masks.map, np.float64), getattr(results, "spread", None)
    draws = getattr(getattr(method, "settings", None), "draws", 1)
    probability = pixel_probability(curves, maps, masks.score) * case.heads
    uncertainty = None
    if draws > 1 and spread is not None:
        deviation = np.asarray(spread, np.float64) / np.sqrt(draws - 1)
        uncertainty = pixel_uncertainty(curves, maps, masks.score, deviation) * case.heads
    return Volumes(case.volume(probability), None if uncertainty is None else case.volume(uncertainty))
