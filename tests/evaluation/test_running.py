"""Figures summed group by group: counts are exact, AUROC and AUPRC agree with the exact functions to 1e-4."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from hae_jax.evaluation import metrics, running


def _slices(seed, count, size=24):
    rng = np.random.default_rng(seed)
    truth = rng.random((count, size, size)) < 0.1
    truth[rng.random(count) < 0.5] = False
    maps = (rng.gamma(1, 0.05, truth.shape) + 0.1 * truth * rng.random(truth.shape)).astype(np.float32)
    lesion = rng.random(count) < 0.6
    mask = maps > 0.1
    return {"mask": mask & lesion[:, None, None], "mask_all": mask, "map": maps, "lesion": lesion, "truth": truth,
            "labels": truth.any((1, 2)).astype(int), "foreground": rng.random(truth.shape) < 0.6}


def test_groups_add_up_to_the_figures_of_all_slices_together():
    groups, sums = [_slices(seed, count) for seed, count in enumerate((7, 1, 12, 4))], running.SliceSums()
    for group in groups:
        sums.add(**group)
    together = {name: np.concatenate([group[name] for group in groups]) for name in groups[0]}
    found, expected = sums.results(), metrics.slice_metrics(**together)
    for setting in ("mixed", "unhealthy"):
        for name in ("auroc", "auprc"):
            assert found[setting].pop(name) == pytest.approx(expected[setting].pop(name), abs=1e-4), (setting, name)
    assert found == expected


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
    auroc, auprc = running.ranking(running.score_histogram(hits, scores))
    assert auroc == pytest.approx(roc_auc_score(hits, scores), abs=1e-4)
    assert auprc == pytest.approx(average_precision_score(hits, scores), abs=1e-4)


def test_bins_rise_with_the_scores_and_are_fine():
    scores = np.sort(np.concatenate([sign * np.geomspace(1e-30, 1e30, 5000) for sign in (-1, 1)]))
    assert (np.diff(running.score_bins(scores)) > 0).all()
    ones = np.array([1, 1 + 1e-3, 0.0, -0.0, np.float32(1e-45)])
    one, more, zero, negative_zero, tiny = running.score_bins(ones)
    assert one < more
    assert zero == negative_zero <= tiny
    assert 0 <= running.score_bins(np.array([-3e38]))[0] < running.score_bins(np.array([3e38]))[0] < 2**20


def test_what_is_undefined_or_wrong():
    for truth in (False, True):
        assert running.ranking(running.score_histogram(np.full(5, truth), np.arange(5.0))) == (None, None)
    assert running.ranking(running.score_histogram(np.zeros(0, bool), np.zeros(0))) == (None, None)
    with pytest.raises(ValueError, match="not finite"):
        running.score_histogram(np.array([True]), np.array([np.nan]))
    slices = _slices(0, 3)
    with pytest.raises(TypeError, match="threshold a soft mask"):
        running.SliceSums().add(**{**slices, "truth": slices["truth"].astype(float)})
