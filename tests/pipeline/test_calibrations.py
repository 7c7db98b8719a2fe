"""Calibrations are stored under a key of all that they depend on, including the rule."""

import json

import numpy as np
import pytest

from hae_jax.configs import default
from hae_jax.data.store import open_store
from hae_jax.errors import UserError
from hae_jax.localization.batched import IntensityReader
from hae_jax.localization.methods import IntensityThreshold, make_method
from hae_jax.pipeline.calibrations import (
    available,
    calibrated,
    kept_file,
    load_calibration,
    newest_for_other_data,
    validation_results,
)
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
        load_calibration(other, kept_file(IntensityThreshold(), tmp_path, with_rules[0]))
    assert calibrated(None, other, None, tmp_path, with_rules[1]) == made[1]  # the stored one


def test_slices_are_described_to_the_method(prepared):
    """Each validation slice has its height, head, patient and pixel size, besides label and mask."""
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
    other = tmp_path / "threshold_of_another_rule.json"
    other.write_text(json.dumps(json.loads(path.read_text()) | {"rule": "mixture"}))
    assert newest_for_other_data(method, tmp_path, MADE_WITH | {"data": {"root": "gone"}}) == path


@pytest.mark.parametrize("name", ["phantom", "phantom_stroke"])
def test_a_shipped_network_has_its_calibration(name):
    """It was made with these weights and settings, from image labels, and has probability curves."""
    made = load_run(name).calibration()
    assert (made.rule, made.labels) == ("healthy_fpr", "image labels")
    assert made.probability
    assert made.slice_scores


@pytest.mark.parametrize("content", ['{"metho', '{"a": 1}'])
def test_a_file_of_the_user_that_is_no_calibration_is_named(content, tmp_path):
    config, path = default.get_config(), tmp_path / "given.json"
    config.translation.calibration = str(path)
    path.write_text(content)
    with pytest.raises(UserError, match=r"--calibration .*given\.json: .*give another, or leave --calibration out"):
        available(config, None, make_method(config), {}, tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match=r"is a folder; a file is needed; give another"):
        available(config, None, make_method(config), {}, tmp_path)


def test_a_given_calibration_with_the_same_settings_is_used_without_a_warning(tmp_path, caplog):
    run = load_run("phantom")
    run.config.translation.calibration = str(run.folder / "calibration.json")
    with caplog.at_level("INFO", "hae_jax"):
        found = available(run.config, None, run.method, run.identity, tmp_path)
    assert found.method == "residual"
    assert not caplog.records
    assert load_run("phantom", {"calibration": run.config.translation.calibration}).calibration() == found


def test_settings_of_a_run_that_cannot_be():
    with pytest.raises(UserError, match=r"translation\.guidance is 'strong'"):
        load_run("phantom", {"guidance": "strong"})


def _published(**changes):
    return {"threshold": 0.9, "diff_max": [0.1, 0.2], "diff_min": [], "modality": [0, 3], "errors": None} | changes


def _threshold(**changes):
    return {"method": "ddib", "rule": "dice", "labels": "ground truth", "threshold": 0.2, "slice_threshold": 0.3,
            "slice_errors": 0, "slice_auc": None, "healthy_slices": 0, "lesion_slices": 7, "interval": []} | changes


@pytest.mark.parametrize(("method", "content", "message"), [
    ("hae", {}, "threshold, diff_max, diff_min, modality is missing"),
    ("hae", _published(speed=3), "speed is not known"),
    ("hae", _published(threshold="high"), "threshold has the wrong kind"),
    ("hae", _published(diff_max="12"), "diff_max has the wrong kind"),
    ("hae", _published(modality=[0, 1.5]), "modality has the wrong kind"),
    ("hae", _published(errors=-1), "errors has the wrong kind"),
    ("hae", _published(diff_max=[0.1]), "1 values for 2 modalities"),
    ("hae", _published(diff_max=[0.1, -0.1]), "negative"),
    ("hae", _published(threshold=10**400), "too large"),
    ("ddib", _threshold(threshold=float("nan")), "NaN is not a JSON number"),
    ("ddib", _threshold(slice_threshold=None), "slice_threshold has the wrong kind"),
    ("ddib", _threshold(lesion_slices=-1), "lesion_slices has the wrong kind"),
    ("ddib", _threshold(rule="best"), "rule has the wrong kind"),
    ("ddib", _threshold(interval=[0.1]), "interval has the wrong kind"),
    ("ddib", _threshold(method=3), "method has the wrong kind"),
    ("ddib", _threshold(made_with=[]), "made_with has the wrong kind"),
    ("ddib", _threshold(method="dae"), "is of the method dae with the rule dice, not of ddib with dice"),
    ("ddib", _threshold(rule="mixture"), "is of the method ddib with the rule mixture, not of ddib with dice"),
    ("ddib", [], "not a JSON object"),
    ("ddib", None, "cannot be read"),
])
def test_a_damaged_file_is_named(tmp_path, method, content, message):
    config, path = default.get_config(), tmp_path / "calibration.json"
    config.translation.method = method
    if content is not None:
        path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message) as caught:
        load_calibration(make_method(config), path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "calibrate again" in str(caught.value)
