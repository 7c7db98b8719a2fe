"""Probabilities from anomaly maps: known mixtures are recovered, and files and arrays are in [0, 1]."""

import dataclasses
import json

import numpy as np
import pytest
from run_helpers import read_json, read_volume
from scipy.stats import norm

from hae_jax.errors import UserError
from hae_jax.localization import probability, rules
from hae_jax.localization.calibration import MapThreshold, from_json
from hae_jax.localization.probability import pixel_probability, pixel_uncertainty

SHARE, SHIFT = 0.1, 3.0  # share of lesion pixels in lesion slices; difference of their map's mean


def mixture_of_normals(slices=40, pixels=4000, seed=0):
    """Healthy pixels are N(0, 1), lesion pixels N(SHIFT, 1); each lesion slice has SHARE of these."""
    rng = np.random.default_rng(seed)
    samples = []
    for i in range(slices):
        label = i % 2
        truth = (rng.random(pixels) < SHARE) & (label > 0)
        values = rng.normal(size=pixels) + SHIFT * truth
        samples.append(rules.Sample(values, truth, label, (i // 2) / slices, f"patient_{i}"))
    scores = np.array([rules.anomaly_score(sample.values) for sample in samples])
    return samples, scores, np.array([sample.label > 0 for sample in samples])


@pytest.fixture(scope="module")
def curves():
    return probability.fit(*mixture_of_normals())


def test_the_posterior_of_a_known_mixture(curves):
    """P(v) equals Bayes' rule for the densities of the samples. No pixel labels are used."""
    v = np.linspace(-2, 5, 29)
    lesion, healthy = SHARE * norm.pdf(v, SHIFT), (1 - SHARE) * norm.pdf(v)
    sure = np.array([1e9])  # a score at which every slice has a lesion
    found = pixel_probability(curves, v[None, None], sure)[0, 0]
    most = curves["slice"]["probability"][-1]
    np.testing.assert_allclose(found / most, lesion / (lesion + healthy), atol=0.1)
    assert most == pytest.approx(1 - 1 / 42)
    assert (np.diff(found) >= 0).all()
    assert curves["lesion_share"] == pytest.approx(SHARE, abs=0.02)


def test_probabilities_are_as_frequent_as_they_say(curves):
    """Of new pixels with a probability near p, a share p is lesion."""
    samples, scores, labels = mixture_of_normals(seed=1)
    found = np.concatenate([pixel_probability(curves, sample.values[None, None], scores[i:i + 1])[0, 0]
                            for i, sample in enumerate(samples)])
    truth = np.concatenate([sample.truth for sample in samples])
    for low in (0.05, 0.3, 0.6, 0.85):
        near = (found >= low) & (found < low + 0.15)
        assert near.sum() > 200
        assert truth[near].mean() == pytest.approx(found[near].mean(), abs=0.08)
    assert labels.mean() == curves["lesion_slices"] == 0.5


def test_a_score_of_healthy_slices_makes_a_pixel_improbable(curves):
    likely, unlikely = (pixel_probability(curves, np.full((1, 1, 1), 5.0), np.array([score]))[0, 0, 0]
                        for score in (5.0, 0.0))
    assert likely > 0.9
    assert unlikely == pytest.approx(1 / 42, rel=0.05)


def test_uncertainty_follows_the_noise(curves):
    maps, scores = np.linspace(-2, 5, 12).reshape(1, 3, 4), np.array([9.0])
    none = pixel_uncertainty(curves, maps, scores, np.zeros((1, 3, 4)))
    some = pixel_uncertainty(curves, maps, scores, np.full((1, 3, 4), 0.5))
    np.testing.assert_allclose(none, 0, atol=1e-7)
    rng = np.random.default_rng(0)
    drawn = [pixel_probability(curves, maps + 0.5 * rng.normal(size=maps.shape), scores) for _ in range(3000)]
    np.testing.assert_allclose(some, np.std(drawn, axis=0), atol=0.02)
    assert some.max() <= 0.5


def test_one_class_gives_no_curves():
    samples, scores, labels = mixture_of_normals(4, 50)
    assert probability.fit(samples[1::2], scores[1::2], labels[1::2]) is None


def test_curves_are_kept_with_the_thresholds(curves):
    kept = MapThreshold("residual", "mixture", "image labels", 1.0, 1.0, 0, 1.0, 20, 20, probability=curves)
    text = json.dumps(dataclasses.asdict(kept))
    assert from_json(MapThreshold, json.loads(text)) == kept
    with pytest.raises(TypeError, match="field probability has the wrong kind"):
        from_json(MapThreshold, json.loads(text.replace('"at"', '"places"')))


def test_files_of_a_run(run, config, three_cases):
    """Files are on the input's grid, in [0, 1] and zero in the background. A JSON file states their meaning."""
    config.translation.update({"method": "residual", "save_probability": True, "draws": 2})
    done = run(three_cases)
    assert not done.failed
    map_ = read_volume(done.output / "a_map.nii.gz")
    for kind, most in (("probability", 1), ("uncertainty", 0.5)):
        values = read_volume(done.output / f"a_{kind}.nii.gz")
        assert values.shape == map_.shape
        assert values.dtype == np.float32
        assert 0 <= values.min() <= values.max() <= most
        assert not values[..., [0, -1]].any()  # the empty slices
        assert "from 0 to" in read_json(done.output / f"a_{kind}.json")["Description"]
    assert read_json(done.output / "calibration.json")["probability"]["pixel"]["at"]
    config.translation.update({"draws": 1})
    run(three_cases)
    assert not list(done.output.glob("*_uncertainty*"))  # with one draw, there is no uncertainty
    assert (done.output / "a_probability.nii.gz").exists()


def test_a_calibration_without_probabilities_is_said(run, config, three_cases, tmp_path):
    config.translation.update({"method": "hae", "save_probability": True})
    with pytest.raises(UserError, match="has no probability curves"):
        run(three_cases, output=tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.nii.gz"))  # before the cases are translated
