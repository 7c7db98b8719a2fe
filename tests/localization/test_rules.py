"""Rules that choose a threshold, on synthetic maps with a known mixture."""

import numpy as np
import pytest

from hae_jax.errors import UserError
from hae_jax.localization.rules import Sample, anomaly_score, best_dice, healthy_fpr, mixture, shares, slice_threshold

SHARE = 0.05  # of lesion pixels in a lesion slice


def samples(shift=4.0, by_height=0.0, patients=12):
    """40 slices per patient, of which 14 have lesions in most patients. Values are normal; lesions are shifted up."""
    rng, found = np.random.default_rng(0), []
    for patient in range(patients):
        for z in range(40):
            lesion = patient % 4 != 0 and 10 < z < 25
            values, truth = rng.standard_normal(1000) + by_height * z / 40, np.zeros(1000, bool)
            truth[:round(SHARE * lesion * 1000)] = True
            values[truth] += shift
            found.append(Sample(values, truth, int(lesion), z / 40, f"p{patient}"))
    return found


def test_mixture_finds_the_lesion_share_and_the_best_threshold_without_ground_truth():
    given = samples()
    found, best = mixture(given), best_dice(given)
    assert found.lesion_share == pytest.approx(SHARE, rel=0.15)
    assert found.value == pytest.approx(best.value, abs=0.3)
    assert found.expected_dice == pytest.approx(best.expected_dice, abs=0.05)
    assert found.interval[0] < found.expected_dice < found.interval[1]
    blind = [sample._replace(truth=np.zeros_like(sample.truth)) for sample in given]
    assert mixture(blind) == found


def test_healthy_slices_are_weighted_to_the_heights_of_lesion_slices():
    # Values increase with height. Lesions are in the middle. Without weights, the bright top would count as healthy.
    given = samples(by_height=6.0)
    assert mixture(given).lesion_share == pytest.approx(SHARE, rel=0.3)
    flat = [sample._replace(height=0.5) for sample in given]
    assert abs(mixture(given).value - best_dice(given).value) < abs(mixture(flat).value - best_dice(given).value)


def test_mixture_refuses_what_is_not_above_chance():
    with pytest.raises(UserError, match="up to chance"):
        mixture(samples(shift=0.0))


@pytest.mark.parametrize("rule", [mixture, lambda s: healthy_fpr(s, 0.01)])
def test_both_classes_are_needed(rule):
    for label in (0, 1):
        with pytest.raises(UserError, match="both kinds"):
            rule([sample for sample in samples() if sample.label == label])


@pytest.mark.parametrize("rule", [mixture, lambda s: healthy_fpr(s, 0.01), shares])
@pytest.mark.parametrize("labels", [(0,), (1,), (0, 1)])
def test_head_pixels_are_needed(rule, labels):
    given = [s._replace(values=s.values[:0]) if s.label in labels else s for s in samples()]
    with pytest.raises(UserError, match=r"no head pixels remain in the .* lower translation\.head_erosion_mm"):
        rule(given)


def test_healthy_fpr_leaves_the_share_above():
    given = samples()
    value = healthy_fpr(given, 0.01).value
    same_heights = [s for s in given if not s.label and 10 < round(s.height * 40) < 25]
    assert np.mean(np.concatenate([s.values for s in same_heights]) > value) == pytest.approx(0.01, rel=0.2)
    with pytest.raises(UserError, match=r"translation\.healthy_fpr is 2"):
        healthy_fpr(given, 2)


def test_healthy_fpr_where_most_of_a_map_is_zero():
    """The share of pixels in a mask, which includes its threshold, is never larger than asked for."""
    given = [s._replace(values=np.where(s.values > np.quantile(s.values, 0.9), s.values, 0)) for s in samples()]
    value = healthy_fpr(given, 0.2).value
    assert 0 < value < min(s.values[s.values > 0].min() for s in given)


def test_dice_needs_ground_truth():
    with pytest.raises(UserError, match="rule dice"):
        best_dice([sample._replace(truth=np.zeros(1000, bool)) for sample in samples()])


def test_slices_are_told_apart_with_the_fewest_errors():
    labels = np.array([0, 0, 0, 1, 1])
    assert slice_threshold(np.array([0.1, 0.2, 0.3, 0.5, 0.9]), labels) == (pytest.approx(0.4), 0)
    value, errors = slice_threshold(np.array([0.1, 0.2, 0.7, 0.5, 0.9]), labels)
    assert errors == 1
    assert np.count_nonzero((np.array([0.1, 0.2, 0.7, 0.5, 0.9]) >= value) != labels) == 1
    assert slice_threshold(np.ones(3), np.ones(3)) == (1.0, 0)
    assert slice_threshold(np.ones(3), np.zeros(3))[0] > 1


def test_the_score_is_the_mean_of_the_highest_hundredth():
    assert anomaly_score(np.arange(200.0)) == 198.5
    assert anomaly_score(np.array([3.0, 1.0])) == 3.0


def test_a_few_pixels_alone_are_no_lesion():
    """Three bright pixels of 3000 are too few for a lesion share, so that the expected Dice is not above 1."""
    rng = np.random.default_rng(0)
    slices = [Sample(rng.random(100) * (0 if i % 2 else 1e-3), np.zeros(100, bool), i % 2, i / 30, f"p{i % 5}")
              for i in range(30)]
    slices[1].values[:3] = 5.0
    with pytest.raises(UserError, match="up to chance"):
        mixture(slices)
