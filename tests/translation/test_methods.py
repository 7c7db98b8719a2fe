"""The flair threshold, held against a search done by hand."""

import numpy as np
import pytest

from hae_jax.data.store import open_store
from hae_jax.translation.methods import FlairThreshold


def test_chosen_on_lesion_slices(prepared):
    reader = open_store(prepared / "store").split("val")
    rows = reader.read(np.arange(len(reader)))
    assert 0 < rows["label"].sum() < len(reader)
    flair, truth = (values[rows["label"] > 0] for values in (rows["image"][..., 0], rows["mask"] > 0))
    found = FlairThreshold.chosen_on(reader)

    def dice(threshold):
        mask = flair >= threshold
        both = (mask & truth).sum((1, 2))
        return (2 * both / (mask.sum((1, 2)) + truth.sum((1, 2)))).mean()

    tried = np.arange(0.3, 2.001, 0.02)
    assert found.validation_dice == pytest.approx(max(map(dice, tried)), abs=1e-6)
    assert dice(found.threshold) == pytest.approx(found.validation_dice, abs=1e-6)
    assert found.validation_dice > 0.9  # the balls are bright


def test_masks():
    images = np.zeros((3, 12, 12, 4), np.float32)
    images[0, 2:5, 2:5, 0] = 1.5  # nine pixels
    images[1, 2, 2, 0] = 1.5  # one
    images[2, :, :, 1:] = 9  # not flair
    found = FlairThreshold(1.5, 0.0).masks(images, remove_up_to=3)
    np.testing.assert_array_equal(found.mask_all, images[..., 0] * [[[1]], [[0]], [[0]]] > 0)
    np.testing.assert_array_equal(found.mask, found.mask_all)
    np.testing.assert_array_equal(found.lesion, [True, False, False])
    np.testing.assert_array_equal(found.map, images[..., 0])
    assert FlairThreshold(1.5, 0.0).masks(images).lesion.tolist() == [True, True, False]
