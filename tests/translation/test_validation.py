"""Where calibrations are kept: under everything that they depend on, the rule of a fixed threshold included."""

import json

import pytest

from hae_jax.data.store import open_store
from hae_jax.errors import UserError
from hae_jax.translation import records, validation
from hae_jax.translation.batched import IntensityReader
from hae_jax.translation.fixed_threshold import FixedThreshold
from hae_jax.translation.methods import IntensityThreshold

MADE_WITH = {"settings": {"method": "threshold", "modality": (0, 3)}, "data": {"root": "data"}}


@pytest.fixture
def method():
    return IntensityThreshold()


def test_a_threshold_of_another_rule_is_not_used_again(method, prepared, tmp_path):
    store = open_store(prepared / "store")
    as_kept = json.loads(json.dumps(MADE_WITH))
    older = FixedThreshold("threshold", 0.69, 0.9, 40, as_kept)
    older.save(tmp_path / f"threshold_{records.digest(as_kept)[:12]}.json")
    with pytest.raises(UserError, match=r"neither data\.root"):  # nor is it where there are no data
        validation.calibration_path(method, None, tmp_path, MADE_WITH)
    made = validation.calibrated(IntensityReader(method.intensity), method, store, tmp_path, MADE_WITH)
    assert made.threshold != older.threshold
    assert made.made_with == as_kept | {"rule": "best mean Dice of lesion slices"}
    assert validation.calibrated(None, method, store, tmp_path, MADE_WITH) == made
    assert validation.calibrated(None, method, None, tmp_path, MADE_WITH) == made


def test_the_file_is_known_before_it_is_made(method, prepared, tmp_path):
    store = open_store(prepared / "store")
    path = validation.calibration_path(method, store, tmp_path, MADE_WITH)
    assert not list(tmp_path.iterdir())
    validation.calibrated(IntensityReader(method.intensity), method, store, tmp_path, MADE_WITH)
    assert path.is_file()
    assert validation.calibration_path(method, None, tmp_path, MADE_WITH | {"data": {"root": "gone"}}) == path
