"""AUROC and AUPRC from histograms agree with the exact functions: to 1e-4 for all pixels, less closely for draws."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from hae_jax.evaluation import ranking


def _draws():
    rng = np.random.default_rng(0)
    hits = rng.random(200_000) < 0.02
    normal = rng.normal(size=hits.size)
    yield "uniform", hits, rng.random(hits.size) + 0.3 * hits
    yield "negative too", hits, normal + 1.5 * hits
    yield "negative", hits, -np.exp(normal - hits)
    yield "heavy tails", hits, rng.standard_cauchy(hits.size) ** 2 * (1 + 5 * hits)
    yield "squared differences", hits, ((0.05 + 0.1 * hits) * normal) ** 2
    yield "tied", hits, np.round(normal + hits, 1)
    yield "mostly zero", hits, np.maximum(normal + hits - 1, 0) * np.where(rng.random(hits.size) < 0.5, 1, -0.0)
    yield "all equal", hits, np.full(hits.size, 0.3)
    yield "far apart", hits, 10.0 ** (12 * normal.clip(-3, 3)) * (1 + hits)


@pytest.mark.parametrize(("hits", "scores"), [pytest.param(*rest, id=name) for name, *rest in _draws()])
def test_ranking_against_the_exact_functions(hits, scores):
    scores = scores.astype(np.float32)
    exact = roc_auc_score(hits, scores), average_precision_score(hits, scores)
    histogram = ranking.score_histogram(hits, scores)
    assert ranking.ranking(histogram) == pytest.approx(exact, abs=1e-4)
    assert (ranking.auroc(histogram.toarray()), ranking.auprc(histogram.toarray())) == pytest.approx(exact, abs=1e-4)
    small = ranking.coarse(histogram).toarray()
    assert small.sum() == hits.size
    assert (ranking.auroc(small), ranking.auprc(small)) == pytest.approx(exact, rel=6e-3)


def test_bins_rise_with_the_scores_and_are_fine():
    scores = np.sort(np.concatenate([sign * np.geomspace(1e-30, 1e30, 5000) for sign in (-1, 1)]))
    assert (np.diff(ranking.score_bins(scores)) > 0).all()
    ones = np.array([1, 1 + 1e-3, 0.0, -0.0, np.float32(1e-45)])
    one, more, zero, negative_zero, tiny = ranking.score_bins(ones)
    assert one < more
    assert zero == negative_zero <= tiny
    assert 0 <= ranking.score_bins(np.array([-3e38]))[0] < ranking.score_bins(np.array([3e38]))[0] < 2**20


def test_many_histograms_at_once():
    rng = np.random.default_rng(0)
    several = rng.integers(0, 3, (5, 2, 40))
    several[3, 1] = several[4, 0] = 0  # no lesion pixels, no healthy pixels
    auroc, auprc = ranking.auroc(several), ranking.auprc(several)
    for index in range(3):
        truth, score = np.nonzero(several[index])
        weight = several[index][truth, score]
        assert auroc[index] == pytest.approx(roc_auc_score(truth, score, sample_weight=weight))
        assert auprc[index] == pytest.approx(average_precision_score(truth, score, sample_weight=weight))
    assert np.isnan([auroc[3:], auprc[3:]]).all()


def test_what_is_undefined_or_wrong():
    for truth in (False, True):
        assert ranking.ranking(ranking.score_histogram(np.full(5, truth), np.arange(5.0))) == (None, None)
    assert ranking.ranking(ranking.score_histogram(np.zeros(0, bool), np.zeros(0))) == (None, None)
    with pytest.raises(ValueError, match="not finite"):
        ranking.score_histogram(np.array([True]), np.array([np.nan]))


def test_intervals_of_patients_who_are_alike_hold_the_figure():
    """These intervals are narrower than the error of the coarse bins."""
    rng = np.random.default_rng(0)
    hits = rng.random(200_000) < 0.02
    scores = rng.random(hits.size) + 0.3 * hits
    histogram, patients = 0, []
    for _ in range(20):
        mostly = rng.random(hits.size) < 0.99
        own = ranking.score_histogram(hits[mostly], scores[mostly])
        histogram += own
        patients.append(ranking.coarse(own))
    found = ranking.rankings(histogram, patients, list(map(str, range(20))))
    for name, value in found.items():
        assert value["low"] < value["mean"] < value["high"] < value["low"] + 2e-3, name
        assert value["cases"] == 20
    assert found["auprc"]["mean"] - ranking.auprc(sum(patients).toarray()) > 1e-3
