"""Where calibrations are kept: under everything that they depend on, the rule included."""

import numpy as np
import pytest

from hae_jax.data.store import open_store
from hae_jax.errors import UserError
from hae_jax.localization.batched import IntensityReader
from hae_jax.localization.methods import IntensityThreshold
from hae_jax.localization.validation import validation_results
from hae_jax.pipeline.calibrations import calibrated, kept_file, newest_for_other_data
from hae_jax.runs import load_run

MADE_WITH = {"settings": {"method": "threshold", "modality": [0, 3]}, "data": {"root": "data"}}


@pytest.fixture
def method():
    return IntensityThreshold()


def test_a_threshold_of_another_rule_is_not_used_again(prepared, tmp_path):
    store = open_store(prepared / "store")
    other = IntensityThreshold(rule="mixture")
    with_rules = [MADE_WITH | {"settings": {"method": "threshold", "rule": rule}} for rule in ("dice", "mixture")]
    made = [calibrated(IntensityReader(method.intensity), method, store, tmp_path, made_with)
            for method, made_with in zip((IntensityThreshold(), other), with_rules, strict=True)]
    assert [found.rule for found in made] == ["dice", "mixture"]
    assert [found.labels for found in made] == ["ground truth", "image labels"]
    with pytest.raises(UserError, match=r"with the rule dice, not of threshold with mixture"):
        other.load_calibration(kept_file(IntensityThreshold(), tmp_path, with_rules[0]))
    assert calibrated(None, other, None, tmp_path, with_rules[1]) == made[1]  # the kept one


def test_slices_are_described_to_the_method(prepared):
    """Height, head, patient and pixel size of each validation slice, beside its label and mask."""
    store = open_store(prepared / "store")
    rows = store.split("val").read(np.arange(len(store.split("val"))))
    found = list(validation_results(IntensityReader(IntensityThreshold().intensity), store, "slice"))
    heights = [item.height for _, item in found]
    assert heights == sorted(heights)
    assert (heights[0], heights[-1]) == (0, 1)
    for i, (result, item) in enumerate(found):
        np.testing.assert_array_equal(result.map, rows["image"][i, ..., 0])
        np.testing.assert_array_equal(item.head, rows["image"][i].any(-1))
        assert item.label == item.truth.any()
    x, y = np.hypot(1.5, 0.1), np.hypot(1.2, 0.1)
    assert found[0][1].spacing == pytest.approx((x * 20 / 16, y * 24 / 16, 4))


def test_the_file_is_known_before_it_is_made(method, prepared, tmp_path):
    store = open_store(prepared / "store")
    path = kept_file(method, tmp_path, MADE_WITH)
    assert not list(tmp_path.iterdir())
    calibrated(IntensityReader(method.intensity), method, store, tmp_path, MADE_WITH)
    assert path.is_file()
    assert newest_for_other_data(method, tmp_path, MADE_WITH | {"data": {"root": "gone"}}) == path


@pytest.mark.parametrize("name", ["phantom", "phantom_stroke"])
def test_a_shipped_network_has_its_calibration(name):
    """Made with these weights and settings, from image labels, with curves of probability."""
    made = load_run(name).calibration()
    assert (made.rule, made.labels) == ("healthy_fpr", "image labels")
    assert made.probability
    assert made.slice_scores
