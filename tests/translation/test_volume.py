"""Volumes out: on the input's grid to the last bit, and the right values in the right place."""

import nibabel as nib
import numpy as np
import pytest

from hae_jax.data.cases import find_cases, read_case
from hae_jax.data.slices import CaseSlices, case_slices
from hae_jax.translation.volume import map_volume, mask_volume, read_slices, write_volume

BRATS = np.array([[-1.0, 0, 0, 0], [0, -1, 0, 239], [0, 0, 1, 0], [0, 0, 0, 1]])
OBLIQUE = np.array([[0.1, -0.2, 3.9, -7], [0.69, 0.05, -0.3, 11], [0.02, 0.93, 0.4, -80.25], [0, 0, 0, 1]])


def _header(affine, qcode, scode, image_type=nib.Nifti1Image, units=("mm", "sec")):
    image = image_type(np.zeros((7, 8, 5), np.int16), None)
    image.header.set_zooms(np.linalg.norm(affine[:3, :3], axis=0))
    image.set_qform(affine, qcode)
    image.set_sform(affine, scode)
    image.header.set_xyzt_units(*units)
    image.header["cal_max"], image.header["descrip"] = 900, "an input"
    image.header.set_slope_inter(3, -5)
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"about the input"))
    return image.header


@pytest.mark.parametrize("image_type", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize(("affine", "qcode", "scode"), [
    (BRATS, 1, 1), (OBLIQUE, 1, 4), (OBLIQUE, 0, 2), (OBLIQUE, 2, 0), (np.diag([0.7, 0.9, 5, 1]), 0, 0)])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_the_grid_is_the_input_s(tmp_path, image_type, affine, qcode, scode, dtype):
    header = _header(affine, qcode, scode, image_type)
    values = np.random.default_rng(0).integers(0, 2, (7, 8, 5)).astype(dtype)
    write_volume(tmp_path / "out.nii.gz", values, header, "a mask")
    found = nib.load(tmp_path / "out.nii.gz")
    assert type(found) is image_type
    np.testing.assert_array_equal(found.affine, header.get_best_affine())
    for field in ("dim", "pixdim", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x",
                  "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z", "xyzt_units"):
        np.testing.assert_array_equal(found.header[field], header[field], err_msg=field)
    assert found.get_data_dtype() == dtype
    np.testing.assert_array_equal(np.asanyarray(found.dataobj), values)  # unscaled, and of the type itself
    assert np.asanyarray(found.dataobj).dtype == dtype
    assert (found.header["cal_max"], found.header["descrip"].item()) == (1, b"a mask")
    assert not found.header.extensions
    assert [path.name for path in tmp_path.iterdir()] == ["out.nii.gz"]


def test_read_slices_is_the_preparation_s_slicing(prepared):
    files = find_cases(prepared / "cases")[0]
    found, case = read_slices(files, 16), read_case(files)
    expected = case_slices(case, 16)
    np.testing.assert_array_equal(found.slices.images, expected.images)
    np.testing.assert_array_equal(found.slice_truth, expected.masks > 0.5)
    np.testing.assert_array_equal(found.truth, case.mask)
    np.testing.assert_array_equal(found.slices.index, np.arange(1, 8))
    assert (found.inputs.min(), found.inputs.max()) == (-1, pytest.approx(1, abs=1e-4))


def test_a_case_without_segmentation_has_no_truth(tmp_path, case_writer):
    case_writer(tmp_path, "a", seed=0, segmented=False)
    found = read_slices(find_cases(tmp_path)[0], 16)
    assert found.truth is None
    assert found.slice_truth is None


def test_slices_go_back_where_they_came_from():
    slices = CaseSlices(np.zeros((2, 4, 4, 1), np.float32), None, np.array([1, 3]), (8, 8, 5))
    masks = np.zeros((2, 4, 4), bool)
    masks[0, 1, 2] = masks[1, 3, 3] = True
    volume = mask_volume(masks, slices)
    expected = np.zeros((8, 8, 5), bool)
    expected[2:4, 4:6, 1] = expected[6:, 6:, 3] = True  # a pixel becomes 2 x 2 voxels
    np.testing.assert_array_equal(volume, expected)
    maps = map_volume(np.full((2, 4, 4), 0.25, np.float32), slices)
    assert maps.dtype == np.float32
    np.testing.assert_array_equal(maps[..., [1, 3]], 0.25)
    assert not maps[..., [0, 2, 4]].any()
