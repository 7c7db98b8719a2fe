"""Warnings about cases that were not skull-stripped or not registered."""

import nibabel as nib
import numpy as np
import pytest

from hae_jax.data.cases import find_cases, read_case
from hae_jax.data.preprocessing_signs import preprocessing_signs

SHAPE, VOXEL = (60, 60, 52), 4.0  # 240 x 240 x 208 mm
NAMES = ("flair", "t1")


def ball(radius_mm, shift_mm=0.0):
    """A head with this radius, surrounded by zeros."""
    x, y, z = np.meshgrid(*((np.arange(n) - n / 2) * VOXEL for n in SHAPE), indexing="ij")
    return ((x - shift_mm) ** 2 + y ** 2 + z ** 2 < radius_mm ** 2).astype(np.float32)


def signs(*channels, voxel=VOXEL):
    return preprocessing_signs(np.stack(channels, axis=-1), np.diag([-voxel, -voxel, voxel, 1]), NAMES[:len(channels)])


def test_a_stripped_and_registered_case_has_none():
    assert signs(ball(70), ball(70, 4)) == ()  # 1.4 litres, one voxel apart


def test_noise_in_the_background():
    (sign,) = signs(1 + ball(70))
    assert "does not look skull-stripped: only 0% of the voxels are 0" in sign
    assert "docs/data.md" in sign


def test_one_raw_image_among_stripped_ones_is_enough():
    found = signs(ball(70), 1 + ball(70))
    assert "skull-stripped" in found[0]
    assert "registered: flair and t1" in found[1]


def test_a_head_with_its_scalp():
    (sign,) = signs(ball(90), ball(90))  # 3.1 litres, with zeros around, as after defacing
    assert "its voxels above 0 have 3.1 litres" in sign


def test_images_beside_each_other():
    (sign,) = signs(ball(70), ball(70, 40))
    assert "does not look registered: flair and t1 cover different voxels (Dice 0.5" in sign


def test_parts_of_a_head_are_left_alone():
    assert signs(1 + ball(70), voxel=1.0) == ()  # 60 mm wide


@pytest.mark.parametrize("stripped", [True, False])
def test_a_case_is_read_with_its_signs(tmp_path, stripped):
    volume = ball(70) + (0 if stripped else 1)
    nib.save(nib.Nifti1Image(volume, np.diag([VOXEL, VOXEL, VOXEL, 1])), tmp_path / "p_t1.nii.gz")
    warnings = read_case(find_cases(tmp_path, ("t1",))[0]).warnings
    assert any("does not look skull-stripped" in warning for warning in warnings) is not stripped
