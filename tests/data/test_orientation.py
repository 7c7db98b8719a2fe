"""Reorientation to LPS and back is exact for every orientation, and each voxel keeps its position in space."""

import itertools

import nibabel as nib
import numpy as np
import pytest

from hae_jax.data.nifti import Grid

SHAPE = (4, 5, 6)
TILT = nib.eulerangles.euler2mat(0.3, -0.25, 0.2)  # radians; less than 45 degrees in all
CODES = ["".join(axes) for order in itertools.permutations(("LR", "PA", "SI")) for axes in itertools.product(*order)]


def grid_of(codes, tilt):
    affine = np.eye(4)
    for axis, code in enumerate(codes):
        world = "LRPASI".index(code) // 2
        affine[:3, axis] = 0
        affine[world, axis] = (1 if code in "RAS" else -1) * (0.7, 1.1, 3.0)[axis]
    affine[:3, :3] = tilt @ affine[:3, :3]
    affine[:3, 3] = (-20, 31.5, 7)
    return Grid(SHAPE, affine, nib.Nifti1Header())


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("tilt", [np.eye(3), TILT], ids=["straight", "oblique"])
def test_there_and_back(codes, tilt):
    grid = grid_of(codes, tilt)
    assert grid.axes == codes
    values = np.arange(np.prod(SHAPE)).reshape(SHAPE)
    turned = grid.reorient(values)
    assert turned.shape == grid.reoriented_shape
    assert "".join(nib.aff2axcodes(grid.reoriented_affine)) == "LPS"
    np.testing.assert_array_equal(grid.restore(turned), values)
    assert grid.restore(turned > 50).dtype == bool
    for voxel in ((0, 0, 0), (3, 0, 5), (1, 4, 2)):  # positions in space do not change
        (there,) = np.argwhere(turned == values[voxel])
        np.testing.assert_allclose(grid.reoriented_affine @ [*there, 1], grid.affine @ [*voxel, 1], atol=1e-9)


def test_lps_is_left_alone():
    grid = grid_of("LPS", np.eye(3))
    values = np.zeros(SHAPE)
    assert np.shares_memory(grid.reorient(values), values)
    assert grid.reorient(values).strides == values.strides
    np.testing.assert_array_equal(grid.reoriented_affine, grid.affine)
