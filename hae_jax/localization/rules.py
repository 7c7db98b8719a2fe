"""Rules that choose one threshold for a method's maps on validation slices, and the labels that each rule uses.

A rule takes the maps' values at head pixels, slice by slice. `mixture` and `healthy_fpr` use image labels only. `dice`
uses the ground truth, which every table of results states.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hae_jax.errors import UserError
from hae_jax.evaluation.metrics import dice

IMAGE_LABELS, GROUND_TRUTH = "image labels", "ground truth"
LABELS = {  # the labels that each rule uses
    "mixture": IMAGE_LABELS, "healthy_fpr": IMAGE_LABELS, "quantile": IMAGE_LABELS, "dice": GROUND_TRUTH}
_HEIGHTS = 10  # bins of a slice's height in the head
_CANDIDATES = 400  # number of thresholds; they are denser where few pixels lie above
_ENOUGH = 50  # lesion-slice pixels above a threshold, at least, to estimate the lesion share at it
_SURE = 0.5  # share of healthy pixels below a threshold, at least, to estimate the lesion share at it
_LEVELS = (0.98, 0.90)  # of the rule "quantile", for the least and the most anomalous slice
_DRAWS = 200  # bootstrap draws of patients, for intervals
_INTERVAL = (0.025, 0.975)
_SCORE_SHARE = 0.01  # of the head's pixels; a slice's anomaly score is the mean of this share's highest values


class Sample(NamedTuple):
    """One validation slice."""

    values: np.ndarray  # [N] the map at the head's pixels
    truth: np.ndarray  # [N] bool, the lesion at these pixels; only the rule "dice" uses it
    label: int  # 1: the slice has a lesion
    height: float  # position of the slice in its head, 0 (bottom) to 1 (top)
    patient: str


class Threshold(NamedTuple):
    """The threshold that a rule has chosen.

    Attributes:
      value: a head pixel belongs to the mask where the map is at least this.
      expected_dice: of all lesion slices' pixels together, by the rule's own estimate; None where it makes none.
      interval: 95 % over patients of `expected_dice`; None where there is none.
      lesion_share: share of lesion pixels in lesion slices that `mixture` found; None for the other rules.
    """

    value: float
    expected_dice: float | None = None
    interval: tuple[float, float] | None = None
    lesion_share: float | None = None


def anomaly_score(values: np.ndarray) -> float:  # [N]
    """A slice's score: the mean of the highest 1 % of the map's values in the head, of at least one value.

    It is 0 for an empty head.
    """
    if not values.size:
        return 0.0
    count = max(1, round(_SCORE_SHARE * values.size))
    return float(np.partition(values, values.size - count)[-count:].mean())


def slice_threshold(scores: np.ndarray, labels: np.ndarray) -> tuple[float, int]:  # [S], [S]
    """The threshold of the anomaly score with the fewest errors, and their number.

    Candidates are halfway between neighbouring scores, and below and above all scores. Of several equally good ones,
    the middle one is used.
    """
    values, lesion = np.unique(np.asarray(scores, np.float64)), np.asarray(labels) > 0
    candidates = np.concatenate([values[:1], (values[1:] + values[:-1]) / 2, np.nextafter(values[-1:], np.inf)])
    errors = np.array([np.count_nonzero((scores >= candidate) != lesion) for candidate in candidates])
    best = np.flatnonzero(errors == errors.min())
    chosen = best[len(best) // 2]
    return float(candidates[chosen]), int(errors[chosen])


def slice_auc(scores: np.ndarray, labels: np.ndarray) -> float:  # [S], [S]
    """Area under the ROC curve of anomaly scores; NaN if all slices are of one class."""
    from sklearn.metrics import roc_auc_score  # slow to import, and only calibration needs it

    lesion = np.asarray(labels) > 0
    return float(roc_auc_score(lesion, scores)) if lesion.any() and not lesion.all() else float("nan")


def mixture(samples: Sequence[Sample], seed: int = 0) -> Threshold:
    """The threshold with the largest expected Dice, from image labels only.

    Let H(v) and U(v) be the shares of head pixels above v in healthy and in lesion slices. A lesion slice's pixels are
    a mixture: U = pi T + (1 - pi) H, with pi the share of lesion pixels and T(v) the share of these above v. As T is
    at most 1, pi >= (U - H) / (1 - H) for every v, with equality where all of the lesion lies above v; pi is the
    largest such value (mixture proportion estimation; Elkan and Noto 2008 for the setting of positive and unlabelled
    data). Then Dice(v) = 2 pi T / (U + pi) = 2 (U - (1 - pi) H) / (U + pi).

    Assumptions: 1. The other pixels of a lesion slice are like those of a healthy slice at the same height in the head
    (healthy slices are weighted to the heights of the lesion slices). 2. At some v, nearly all lesion pixels are above
    and most others below. The first does not hold if a lesion makes the rest of its slice darker (`data.scaling`
    "slice").

    Args:
      samples: validation slices with and without lesions.

    Raises:
      UserError: one class of slices is missing, or U - H is not above chance (95 %, over patients).
    """
    require_both(samples)
    levels = _levels(samples)
    counts = _Counts.of(samples, levels)
    u, h = counts.shares()
    share = _lesion_share(u, h, counts.above())
    expected = _expected_dice(u, h, share)
    best = int(np.argmax(expected))
    rng, draws, excess = np.random.default_rng(seed), [], []
    for _ in range(_DRAWS):
        drawn = counts.drawn(rng)
        if drawn is None:  # the drawn patients have slices of one class only
            continue
        u_b, h_b = drawn.shares()
        excess.append(u_b[best] - h_b[best])
        draws.append(_expected_dice(u_b, h_b, _lesion_share(u_b, h_b, drawn.above()))[best])
    if not excess or share == 0 or np.quantile(excess, _INTERVAL[0]) <= 0:
        raise UserError("rule mixture: lesion slices have no more head pixels above the threshold than healthy "
                        "slices, up to chance; train longer, choose other channels, or use the rule dice, "
                        "which needs ground truth")
    low, high = np.quantile(draws, _INTERVAL)
    return Threshold(float(levels[best]), float(expected[best]), (float(low), float(high)), float(share))


def healthy_fpr(samples: Sequence[Sample], share: float) -> Threshold:
    """The threshold above which this share of the healthy slices' head pixels lies, heights weighted as in `mixture`.

    Raises:
      UserError: one class of slices is missing, or the share is not between 0 and 1.
    """
    if not 0 < share < 1:
        raise UserError(f"translation.healthy_fpr is {share}: give a share of pixels between 0 and 1")
    require_both(samples)
    weights = _height_weights(samples)
    healthy = [s for s in samples if not s.label]
    values = np.concatenate([s.values for s in healthy])
    weight = np.concatenate([np.full(s.values.size, weights[_bin(s.height)]) for s in healthy])
    order = np.argsort(values)
    above = 1 - np.cumsum(weight[order]) / weight.sum()
    highest = values[order][np.flatnonzero(above <= share)[0]]
    # A mask includes its threshold. Many pixels may have one value, such as 0, so the threshold lies just above it.
    return Threshold(float(np.nextafter(np.float64(highest), np.inf)))


def best_dice(samples: Sequence[Sample]) -> Threshold:
    """The threshold with the best mean Dice over lesion slices, from their ground truth.

    Raises:
      UserError: no slice has a lesion in its mask.
    """
    lesion = [s for s in samples if s.label]
    if not any(s.truth.any() for s in lesion):
        raise UserError("rule dice: no validation slice has a lesion in its mask; put cases with lesions into the "
                        "validation split, or use the rule mixture, which needs image labels alone")
    levels, total = _levels(samples), np.zeros(_CANDIDATES)
    for s in lesion:
        masks = s.values >= levels[:, None]
        total += dice(masks[:, None], np.broadcast_to(s.truth, masks.shape)[:, None])
    best = int(total.argmax())
    return Threshold(float(levels[best]), float(total[best] / len(lesion)))


def quantile_thresholds(
    maps: np.ndarray,  # [S, H, W]
    heads: np.ndarray,  # [S, H, W] bool
    scores: np.ndarray,  # [S]
    largest: float,
) -> np.ndarray:  # [S]
    """Each slice's own quantile, at 0.98 for the least and 0.90 for the most anomalous slice.

    The published rule (`published.quantile_thresholds`) for any method: the anomaly score takes the place of the diff
    curve.
    """
    share = np.clip(scores / largest, 0, 1) if largest > 0 else np.ones(len(scores))
    levels = _LEVELS[0] - (_LEVELS[0] - _LEVELS[1]) * np.round(share, 2)
    return np.array([np.quantile(own[head], level) if head.any() else np.inf
                     for own, head, level in zip(maps, heads, levels, strict=True)])


class Shares(NamedTuple):
    """The shares of `mixture` at every candidate threshold."""

    levels: np.ndarray  # [V] rising
    lesion_slices: np.ndarray  # [V] U, share of lesion slices' head pixels above each level
    healthy_slices: np.ndarray  # [V] H, of healthy slices, at the heights of the lesion slices
    lesion_share: float  # pi


def shares(samples: Sequence[Sample]) -> Shares:
    """U, H and pi of validation slices of both classes, for `probability`, which uses the mixture model as well."""
    require_both(samples)
    levels = np.unique(_levels(samples))
    counts = _Counts.of(samples, levels)
    u, h = counts.shares()
    return Shares(levels, u, h, _lesion_share(u, h, counts.above()))


class _Counts(NamedTuple):
    """Head pixels above each threshold, by patient, class of slices and height."""

    above_: np.ndarray  # [P, 2, heights, V]
    all_: np.ndarray  # [P, 2, heights]

    @classmethod
    def of(cls, samples: Sequence[Sample], levels: np.ndarray) -> "_Counts":
        patients = {name: i for i, name in enumerate(dict.fromkeys(s.patient for s in samples))}
        above = np.zeros((len(patients), 2, _HEIGHTS, len(levels)))
        everything = np.zeros(above.shape[:3])
        for s in samples:
            place = patients[s.patient], int(s.label > 0), _bin(s.height)
            above[place] += s.values.size - np.searchsorted(np.sort(s.values), levels)
            everything[place] += s.values.size
        return cls(above, everything)

    def shares(self) -> tuple[np.ndarray, np.ndarray]:  # [V], [V]
        """U and H."""
        above, everything = self.above_.sum(0), self.all_.sum(0)
        weight = np.where(everything[0] > 0, everything[1], 0)  # only heights with healthy slices
        healthy = np.divide(above[0], everything[0][:, None], out=np.zeros_like(above[0]),
                            where=everything[0][:, None] > 0)
        matched = weight.sum() > 0
        h = (weight @ healthy) / weight.sum() if matched else above[0].sum(0) / everything[0].sum()
        rows = weight > 0 if matched else np.ones(len(weight), bool)
        return above[1][rows].sum(0) / everything[1][rows].sum(), h

    def above(self) -> np.ndarray:  # [V]
        """Lesion-slice pixels above each threshold."""
        return self.above_[:, 1].sum((0, 1))

    def drawn(self, rng: np.random.Generator) -> "_Counts | None":
        """A bootstrap draw of patients; None if the drawn patients have slices of one class only."""
        chosen = rng.integers(0, len(self.all_), len(self.all_))
        found = _Counts(self.above_[chosen], self.all_[chosen])
        return found if found.all_.sum((0, 2)).all() else None


def _levels(samples: Sequence[Sample]) -> np.ndarray:  # [V] ascending
    """Candidate thresholds: quantiles of all values, evenly spaced in the logarithm of the share above them."""
    values = np.concatenate([s.values for s in samples])
    shares = np.geomspace(0.9, max(1 / values.size, 1e-6), _CANDIDATES)
    return np.quantile(values, 1 - shares)


def _lesion_share(u: np.ndarray, h: np.ndarray, above: np.ndarray) -> float:
    usable = (above >= _ENOUGH) & (h <= 1 - _SURE)
    return float(((u[usable] - h[usable]) / (1 - h[usable])).max(initial=0.0))


def _expected_dice(u: np.ndarray, h: np.ndarray, share: float) -> np.ndarray:  # [V]
    found = np.clip(u - (1 - share) * h, 0, share)  # pi T, and T is at most 1
    return np.divide(2 * found, u + share, out=np.zeros_like(u), where=u + share > 0)


def _height_weights(samples: Sequence[Sample]) -> np.ndarray:  # [heights]
    """Weights of healthy pixels by height, so that healthy and lesion slices have the same distribution of heights."""
    counts = np.zeros((2, _HEIGHTS))
    for s in samples:
        counts[int(s.label > 0), _bin(s.height)] += s.values.size
    weights = np.divide(counts[1], counts[0], out=np.zeros(_HEIGHTS), where=counts[0] > 0)
    return weights if weights.any() else np.ones(_HEIGHTS)


def _bin(height: float) -> int:
    return min(int(height * _HEIGHTS), _HEIGHTS - 1)


def require_both(samples: Sequence[Sample]) -> None:
    """Raises a UserError unless there are slices with and without a lesion, both with head pixels."""
    lesion = sum(s.label > 0 for s in samples)
    if not 0 < lesion < len(samples):
        raise UserError(f"validation slices: {len(samples) - lesion} healthy and {lesion} with a lesion; the rule "
                        "needs both kinds: put cases with both into the validation split")
    for label, kind in ((0, "healthy slices"), (1, "lesion slices")):
        if not any(s.values.size for s in samples if (s.label > 0) == label):
            raise UserError(f"validation slices: no head pixels remain in the {kind}; lower "
                            "translation.head_erosion_mm")
