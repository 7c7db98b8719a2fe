"""Metrics of a method's maps on validation slices.

`training.localization` uses them during training, `ablation` to compare settings.
"""

import contextlib
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from hae_jax.data.slices import SliceGrid
from hae_jax.errors import UserError
from hae_jax.evaluation import ranking
from hae_jax.evaluation.metrics import dice
from hae_jax.localization import rules
from hae_jax.localization.map_threshold import MapThresholdMethod, ValidationSlice, stacked


class Measures(NamedTuple):
    """The metrics; NaN where undefined. The first four need image labels only, the others need ground truth.

    Attributes:
      expected_dice: of all lesion slices' pixels together, by the rule `mixture`; NaN where it finds no lesion.
      lesion_share: share of lesion pixels in the lesion slices' heads, by the rule `mixture`.
      slice_auc: area under the ROC curve of the slices' anomaly scores.
      slice_accuracy: share of slices on the right side of the best threshold on anomaly scores (chosen on them).
      auprc: average precision of the map over the lesion slices' heads.
      best_dice: mean Dice of the lesion slices at the best single threshold: an upper bound.
      mixture_dice: mean Dice of the lesion slices at the threshold of the rule `mixture`.
      fpr_dice: the same at the threshold of the rule `healthy_fpr`.
    """

    expected_dice: float
    lesion_share: float
    slice_auc: float
    slice_accuracy: float
    auprc: float
    best_dice: float
    mixture_dice: float
    fpr_dice: float


def measure(method: MapThresholdMethod, results: Iterable[tuple[Any, ValidationSlice]]) -> Measures:
    """Measures a method's results on slices of both classes."""
    samples, scores, labels = method.samples(results)
    expected = share = math.nan
    thresholds = {}
    with contextlib.suppress(UserError):  # the rule finds no lesion
        found = rules.mixture(samples)
        assert found.expected_dice is not None  # since the rule is `mixture`
        assert found.lesion_share is not None
        expected, share, thresholds["mixture"] = found.expected_dice, found.lesion_share, found.value
    with contextlib.suppress(UserError):  # there are no healthy slices
        thresholds["fpr"] = rules.healthy_fpr(samples, method.healthy_fpr).value
    errors = rules.slice_threshold(scores, labels)[1] if len(scores) else 0
    return Measures(expected, share, rules.slice_auc(scores, labels), 1 - errors / max(len(scores), 1),
                    *_with_ground_truth([sample for sample in samples if sample.label], thresholds))


def masks_dice(method: MapThresholdMethod, results: Sequence[tuple[Any, ValidationSlice]]) -> float:
    """Mean Dice of the lesion slices' masks, with the method's rule, slice labels and filters.

    The thresholds are chosen on the same slices. NaN without ground truth, or if the rule finds no threshold.
    """
    try:
        calibration = method.calibrate(results, {})
    except UserError:
        return math.nan
    found = []
    for _, own in itertools.groupby(results, key=lambda pair: pair[1].case):
        maps, slices = zip(*own, strict=True)
        grid = SliceGrid(np.array([item.position for item in slices]), slices[0].spacing)
        masks = method.masks(stacked(maps), calibration, np.stack([item.head for item in slices]), grid).mask
        found += [dice(mask[None], item.truth[None])[0] for mask, item in zip(masks, slices, strict=True) if item.label]
    return float(np.mean(found)) if any(item.truth.any() for _, item in results) else math.nan


def _with_ground_truth(lesion: list[rules.Sample], thresholds: dict[str, float]) -> tuple[float, ...]:
    if not any(sample.truth.any() for sample in lesion):
        return (math.nan,) * 4
    curve = np.zeros(ranking.COARSE_BINS)
    for sample in lesion:
        curve += ranking.dice_by_threshold(sample.values, sample.truth, np.count_nonzero(sample.truth))

    def mean_dice(rule: str) -> float:
        if rule not in thresholds:
            return 0.0  # an empty mask
        return float(np.mean([dice((sample.values >= thresholds[rule])[None], sample.truth[None])[0]
                              for sample in lesion]))

    truth, values = (np.concatenate(parts) for parts in zip(*((s.truth, s.values) for s in lesion), strict=True))
    auprc = ranking.ranking(ranking.score_histogram(truth, values))[1]
    return (math.nan if auprc is None else auprc, float(curve.max() / len(lesion)), mean_dice("mixture"),
            mean_dice("fpr"))
