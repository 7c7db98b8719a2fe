"""Volumes out: on the input's grid to the last bit, and the right values in the right place."""

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from hae_jax.data.cases import find_cases, read_case
from hae_jax.data.nifti import write_volume
from hae_jax.data.orientation import Grid
from hae_jax.data.slices import CaseSlices, case_slices
from hae_jax.localization.volume import (
    head,
    healthy_volume,
    in_head,
    map_volume,
    mask_volume,
    read_slices,
)

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
    grid = Grid((7, 8, 5), header.get_best_affine(), header)
    values = np.random.default_rng(0).integers(0, 2, (7, 8, 5)).astype(dtype)
    write_volume(tmp_path / "out.nii.gz", grid.reorient(values), grid, "a mask")
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


def _turned(axes):
    """An affine whose voxel axes point to the given anatomical directions."""
    return nib.orientations.inv_ornt_aff(
        nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(axes)),
        (7, 8, 5))


_TILT = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.3, -0.2, 0.4) @ np.diag([-0.5, 1.25, 3]), [7, -80.25, 11])


@pytest.mark.parametrize("affine", [BRATS, _TILT, *(_turned(axes) for axes in ("RAS", "LPS", "LAS", "PSR", "SRA"))])
def test_a_second_reader_sees_the_input_s_grid_and_every_voxel_in_its_place(tmp_path, affine):
    given, mask = tmp_path / "given.nii.gz", tmp_path / "mask.nii.gz"
    image = nib.Nifti1Image(np.random.default_rng(0).integers(1, 99, (7, 8, 5)).astype(np.int16), affine)
    nib.save(image, given)
    image = nib.load(given)
    grid = Grid(image.shape, image.affine, image.header)
    bright = grid.reorient(np.asarray(image.dataobj)) > 50  # as a network would find it, in its orientation
    write_volume(mask, bright.astype(np.uint8), grid, "a mask")
    ours, theirs = sitk.ReadImage(str(mask)), sitk.ReadImage(str(given))
    assert ours.GetSize() == theirs.GetSize()
    for attribute in ("GetSpacing", "GetOrigin", "GetDirection"):
        np.testing.assert_array_equal(getattr(ours, attribute)(), getattr(theirs, attribute)(), err_msg=attribute)
    assert ours.GetPixelIDTypeAsString() == "8-bit unsigned integer"
    np.testing.assert_array_equal(sitk.GetArrayFromImage(ours), sitk.GetArrayFromImage(theirs) > 50)


def test_results_of_a_four_dimensional_file_are_three_dimensional(tmp_path):
    nib.save(nib.Nifti1Image(np.random.default_rng(0).integers(1, 99, (7, 8, 5, 4)).astype(np.int16), OBLIQUE),
             tmp_path / "case.nii.gz")
    case = read_slices(find_cases(tmp_path)[0], 8)
    write_volume(tmp_path / "mask.nii.gz", np.ones(case.slices.shape, np.uint8), case.grid, "a mask")
    found = nib.load(tmp_path / "mask.nii.gz")
    assert found.shape == (7, 8, 5)
    np.testing.assert_allclose(found.affine, OBLIQUE, atol=1e-6)


def test_a_healthy_counterpart_equal_to_the_input_is_the_input(tmp_path, case_writer):
    case_writer(tmp_path, "a", seed=0)
    case = read_slices(find_cases(tmp_path)[0], 24)
    back = healthy_volume(case.inputs[..., 3], case, 3)
    expected = map_volume(case.slices.images[..., 3] * case.slices.scales[3], case.slices)
    np.testing.assert_allclose(back, expected, atol=1e-2)  # raw intensities, 50 to 250
    assert 50 < back[..., 1:-1].mean() < 150


def test_empty_slices_between_others_are_left_out(tmp_path, case_writer):
    case_writer(tmp_path, "a", seed=0)
    for path in (tmp_path / "a").glob("a_*.nii.gz"):
        image = nib.load(path)
        values = np.asarray(image.dataobj).copy()
        values[..., 4] = 0
        nib.save(nib.Nifti1Image(values, image.affine), path)
    case = read_slices(find_cases(tmp_path)[0], 16)
    assert list(case.slices.index) == [1, 2, 3, 5, 6, 7]
    assert len(case.inputs) == len(case.slice_truth) == 6


def test_nothing_is_found_where_nothing_is_shown(prepared):
    volumes = np.zeros((7, 8, 5, 2))
    volumes[1:6, 1:7, 1:4, 0] = 1
    volumes[3, 4, 2] = 0  # inside the head
    expected = np.zeros((7, 8, 5), bool)
    expected[1:6, 1:7, 1:4] = True
    np.testing.assert_array_equal(head(volumes), expected)
    assert head(volumes + 1).all()
    assert not head(volumes * 0).any()
    case = read_slices(find_cases(prepared / "cases")[0], 16)
    assert case.head[..., 1:-1].all()
    assert not case.head[..., [0, -1]].any()
    case.head[2:9, 3:5] = False
    everywhere = np.ones((7, 16, 16))
    mask, anomaly = in_head(case, everywhere > 0, everywhere)
    np.testing.assert_array_equal(mask, case.head)
    np.testing.assert_allclose(anomaly, case.head, atol=1e-6)


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
