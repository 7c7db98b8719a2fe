"""How well a method's maps show lesions on validation slices, before any case is translated.

`training.localization` looks at it while a network is trained, `ablation` when settings are compared.
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from hae_jax.errors import UserError
from hae_jax.evaluation import ranking
from hae_jax.evaluation.metrics import dice
from hae_jax.localization import rules
from hae_jax.localization.map_threshold import MapThresholdMethod, ValidationSlice


class Measures(NamedTuple):
    """What is measured; NaN where it cannot be. The first four need image labels alone, the others ground truth.

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
    try:
        found = rules.mixture(samples)
        assert found.expected_dice is not None  # since the rule is `mixture`
        assert found.lesion_share is not None
        expected, share, thresholds["mixture"] = found.expected_dice, found.lesion_share, found.value
        thresholds["fpr"] = rules.healthy_fpr(samples, method.healthy_fpr).value
    except UserError:  # nothing is found
        pass
    errors = rules.slice_threshold(scores, labels)[1] if len(scores) else 0
    return Measures(expected, share, rules.slice_auc(scores, labels), 1 - errors / max(len(scores), 1),
                    *_with_ground_truth([sample for sample in samples if sample.label], thresholds))


def _with_ground_truth(lesion: list[rules.Sample], thresholds: dict[str, float]) -> tuple[float, ...]:
    if not any(sample.truth.any() for sample in lesion):
        return (math.nan,) * 4
    curve, histogram = np.zeros(ranking.COARSE_BINS), np.zeros((2, ranking.BINS), np.int64)
    for sample in lesion:
        curve += ranking.dice_by_threshold(sample.values, sample.truth, np.count_nonzero(sample.truth))
        histogram += ranking.score_histogram(sample.truth, sample.values)

    def mean_dice(rule: str) -> float:
        if rule not in thresholds:
            return 0.0  # an empty mask
        return float(np.mean([dice((sample.values >= thresholds[rule])[None], sample.truth[None])[0]
                              for sample in lesion]))

    auprc = ranking.ranking(histogram)[1]
    return (math.nan if auprc is None else auprc, float(curve.max() / len(lesion)), mean_dice("mixture"),
            mean_dice("fpr"))
