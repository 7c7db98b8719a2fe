"""The filters in mm and ml."""

import numpy as np
import pytest
from scipy import ndimage

from hae_jax.data.slices import SliceGrid
from hae_jax.errors import UserError
from hae_jax.localization.map_threshold import NO_FILTERS, PhysicalFilters, without_mm
from hae_jax.localization.methods import IntensityThreshold
from hae_jax.localization.published import PixelFilters


def test_filters_in_mm_mean_the_same_at_every_resolution():
    """A ball of 8 mm and a single voxel on a grid of 2 mm and on one of 1 mm x 1 mm x 2 mm."""
    found = []
    for step in (2.0, 1.0):
        x, y = np.meshgrid(*[np.arange(0, 40, step) + step / 2] * 2, indexing="ij")
        z = np.arange(0, 40, 2.0)[:, None, None]
        ball = (x - 20) ** 2 + (y - 20) ** 2 + (z - 20) ** 2 < 64
        speck = (abs(x - 5) < 3) & (abs(y - 5) < 3) & (z == 4)
        grid = SliceGrid(np.arange(20), (step, step, 2.0))
        kept = PhysicalFilters(smallest_ml=0.1).masks(ball | speck, grid)
        np.testing.assert_array_equal(kept, ball)
        assert PhysicalFilters(smallest_ml=0.01).masks(ball | speck, grid)[speck].all()
        smooth = PhysicalFilters(median_mm=6.0).masks(ball | speck, grid)
        assert not smooth[speck].any()
        alone = np.zeros(ball.shape, bool)
        alone[10, 10, 10] = True
        assert not PhysicalFilters(median_mm=2 * step).masks(alone, grid).any()
        found.append(smooth.sum() * step * step * 2 / 1000)
        head = ((x - 20) ** 2 + (y - 20) ** 2 < 225)[None]
        eroded = PhysicalFilters(head_erosion_mm=5.0).heads(head, grid)
        assert eroded.sum() * step * step == pytest.approx(np.pi * 100, rel=0.15)
    assert found[0] == pytest.approx(found[1], rel=0.1)


def test_maps_are_smoothed_across_slices_in_mm():
    """In the middle of a stack, the result equals SciPy's Gaussian. Missing slices have no weight."""
    maps = np.random.default_rng(0).normal(size=(40, 3, 3))
    grid = SliceGrid(np.arange(40), (1.0, 1.0, 2.0))
    found = PhysicalFilters(across_mm=3.0).maps(maps, grid)
    expected = ndimage.gaussian_filter1d(maps, 1.5, axis=0, truncate=4)
    np.testing.assert_allclose(found[8:-8], expected[8:-8], atol=1e-4)
    np.testing.assert_allclose(PhysicalFilters(across_mm=3.0).maps(np.ones((40, 3, 3)), grid), 1)
    kept = np.array([0, 1, 3, 30])
    apart = PhysicalFilters(across_mm=1.0).maps(maps[kept], SliceGrid(kept, (1.0, 1.0, 1.0)))
    np.testing.assert_array_equal(apart[3], maps[30])
    weights = np.exp(-0.5 * np.array([0, 1, 3]) ** 2)
    np.testing.assert_allclose(apart[0], np.tensordot(weights / weights.sum(), maps[[0, 1, 3]], 1))


def test_slices_left_out_count_in_mm():
    masks = np.ones((2, 4, 4), bool)
    grid = SliceGrid(np.array([0, 2]), (1.0, 1.0, 1.0))  # not adjacent: 16 voxels each
    assert not PhysicalFilters(smallest_ml=0.02).masks(masks, grid).any()
    assert PhysicalFilters(smallest_ml=0.02).masks(masks, grid._replace(positions=np.array([0, 1]))).all()


def test_unknown_spacing_is_said():
    with pytest.raises(UserError, match=r"translation\.filters is 'mm'"):
        PhysicalFilters(smallest_ml=0.1).masks(np.ones((1, 4, 4), bool), SliceGrid())
    with pytest.raises(UserError, match=r"translation\.smallest_ml is -1"):
        PhysicalFilters(smallest_ml=-1)


def test_without_the_size_of_pixels_only_filters_in_mm_are_left_out():
    method, pixels = (IntensityThreshold(filters=f) for f in (PhysicalFilters(smallest_ml=1.0), PixelFilters(True)))
    assert without_mm(method).filters == NO_FILTERS
    assert without_mm(pixels) is pixels
