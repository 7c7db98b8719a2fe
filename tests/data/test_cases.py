"""Reading of cases: values, orientation, grid, and all kinds of broken cases."""

import gzip
import shutil
import struct

import nibabel as nib
import numpy as np
import pytest

from hae_jax.data.cases import MODALITIES, find_cases, read_case
from hae_jax.data.slices import case_slices
from hae_jax.errors import UserError

NAME = "BraTS2021_00000"
LATER_NAMES = {"_flair": "-t2f", "_t1": "-t1n", "_t1ce": "-t1c", "_t2": "-t2w", "_seg": "-seg"}


@pytest.fixture
def folder(golden, tmp_path):
    return shutil.copytree(golden / "brats_raw", tmp_path / "raw")


def change(path, edit=lambda x: x, affine=None):
    """Rewrites a NIfTI file with edited values."""
    image = nib.load(path)
    nib.save(nib.Nifti1Image(edit(image.get_fdata(dtype=np.float32)), image.affine if affine is None else affine), path)


def test_channels_are_in_order_and_values_raw(folder):
    (files,) = find_cases(folder)
    case = read_case(files)
    assert case.name == NAME
    assert case.volumes.dtype == np.float32
    for channel, modality in enumerate(MODALITIES):
        image = nib.load(folder / NAME / f"{NAME}_{modality}.nii.gz")
        np.testing.assert_array_equal(case.volumes[..., channel], np.asarray(image.dataobj))
    np.testing.assert_array_equal(case.affine, image.affine)
    assert case.warnings == ()
    segmentation = nib.load(folder / NAME / f"{NAME}_seg.nii.gz")
    np.testing.assert_array_equal(case.mask, np.asarray(segmentation.dataobj) > 0)
    assert case.grid.header.get_data_shape() == case.mask.shape


@pytest.mark.parametrize(("file", "breakage", "says"), [
    ("t1ce", lambda p: p.unlink(), "missing"),
    ("t1", lambda p: p.write_bytes(p.read_bytes()[:200]), "cannot be read"),
    ("flair", lambda p: p.write_bytes(b"not an image"), "cannot be read"),
    ("t2", lambda p: change(p, lambda x: np.where(x == x.max(), np.nan, x)), "NaN"),
    ("t1", lambda p: change(p, np.zeros_like), "no voxel is positive"),
    ("t2", lambda p: change(p, lambda x: x[:-1]), "shape"),
    ("t1", lambda p: change(p, lambda x: x[..., None].repeat(2, -1)), "3-D"),
    ("seg", lambda p: change(p, affine=np.eye(4)), "affine"),
    ("seg", lambda p: change(p, lambda x: x[:, :-1]), "shape"),
])
def test_broken_case_is_named_in_one_line(folder, file, breakage, says):
    path = folder / NAME / f"{NAME}_{file}.nii.gz"
    breakage(path)
    (files,) = find_cases(folder)
    with pytest.raises(UserError, match=says) as error:
        read_case(files)
    assert path.name in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize(("shape", "says"), [
    ((-1, 8, 4), r"has shape \(-1, 8, 4\), so no voxels"),
    ((8, 8, -512), r"has shape \(8, 8, -512\), so no voxels"),
    ((0, 8, 4), r"has shape \(0, 8, 4\), so no voxels"),
    ((8, 8, 4, 0), r"has shape \(8, 8, 4, 0\), so no voxels"),
    # Which of the two errors occurs depends on the memory that the system offers.
    ((32767, 32767, 32767), "(does not fit in memory|cannot be read)"),
    ((8, 8, 32767), "cannot be read"),
])
def test_a_wrong_size_in_the_header_fails_the_case_alone(tmp_path, ending, shape, says):
    nib.save(nib.Nifti1Image(np.ones((8, 8, 4), np.int16), np.eye(4)), tmp_path / "a.nii")
    content = bytearray((tmp_path / "a.nii").read_bytes())
    content[40:56] = struct.pack("<8h", len(shape), *shape, *[1] * (7 - len(shape)))  # dim
    (tmp_path / "a.nii").unlink()
    path = tmp_path / f"a{ending}"
    path.write_bytes(content if ending == ".nii" else gzip.compress(content))
    (files,) = find_cases(tmp_path, ("t1",))
    with pytest.raises(UserError, match=rf"a{ending}: {says}") as error:
        read_case(files)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("fault", [OverflowError("negative count"), MemoryError()])
def test_what_nibabel_raises_for_a_damaged_file_fails_the_case_alone(folder, monkeypatch, fault):
    def load(path):
        raise fault

    (files,) = find_cases(folder)
    monkeypatch.setattr(nib, "load", load)
    with pytest.raises(UserError, match=r"flair.nii.gz: .*again$"):
        read_case(files)


@pytest.mark.parametrize("kind", ["t2", "seg"])
def test_damage_that_nibabel_would_take_for_data_is_found(folder, kind):
    """A single changed bit: the file can be decompressed, but its checksum is wrong."""
    path = folder / NAME / f"{NAME}_{kind}.nii.gz"
    plain = bytearray(gzip.decompress(path.read_bytes()))
    stored = bytearray(gzip.compress(plain, compresslevel=0))  # not compressed, so that a changed byte changes a voxel
    stored[len(stored) // 2] ^= 1
    path.write_bytes(stored)
    assert np.isfinite(nib.load(path).get_fdata()).all()
    (files,) = find_cases(folder)
    with pytest.raises(UserError, match=rf"{path.name}: cannot be read \(CRC check failed.*download it again"):
        read_case(files)


def test_voxels_far_below_zero_are_warned_of(folder):
    path = folder / NAME / f"{NAME}_t1.nii.gz"
    change(path, lambda values: values - 0.05 * values.max())  # as after resampling
    assert read_case(find_cases(folder)[0]).warnings == ()
    change(path, lambda values: values - 0.3 * values.max())
    (warning,) = read_case(find_cases(folder)[0]).warnings
    assert "voxels are far below 0" in warning


def test_two_files_of_a_kind_are_not_guessed_between(folder):
    path = folder / NAME / f"{NAME}_t1.nii.gz"
    for name in ("one", "two"):
        shutil.copy(path, path.with_name(f"{name}_t1.nii.gz"))
    read_case(find_cases(folder)[0])  # the file named after its folder is used
    path.unlink()
    with pytest.raises(UserError, match=f"{path.name}: missing"):
        read_case(find_cases(folder)[0])


def test_no_cases(tmp_path):
    with pytest.raises(UserError, match="no cases found"):
        find_cases(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        find_cases(tmp_path / "absent")


def reoriented(image, axes):
    """The same image with its voxels stored along other axes."""
    start = nib.orientations.io_orientation(image.affine)
    return image.as_reoriented(nib.orientations.ornt_transform(start, nib.orientations.axcodes2ornt(axes)))


@pytest.mark.parametrize("axes", ["RAS", "LAS", "PSR", "SRA", "IPL"])
def test_a_case_is_the_same_in_any_orientation(folder, axes):
    expected = read_case(find_cases(folder)[0])
    for path in (folder / NAME).iterdir():
        nib.save(reoriented(nib.load(path), axes), path)
    case = read_case(find_cases(folder)[0])
    on_disk = nib.load(folder / NAME / f"{NAME}_flair.nii.gz")
    assert case.grid.axes == axes
    assert case.grid.shape == case.grid.header.get_data_shape() == on_disk.shape
    np.testing.assert_array_equal(case.grid.affine, on_disk.affine)
    np.testing.assert_array_equal(case.grid.restore(case.volumes[..., 0]), np.asarray(on_disk.dataobj))
    np.testing.assert_array_equal(case.mask, expected.mask)
    np.testing.assert_allclose(case.affine, expected.affine, atol=1e-4)
    ours, theirs = case_slices(case, 32), case_slices(expected, 32)
    np.testing.assert_array_equal(ours.images, theirs.images)
    np.testing.assert_array_equal(ours.masks, theirs.masks)
    np.testing.assert_array_equal(ours.index, theirs.index)


def test_files_of_a_case_may_differ_in_orientation(folder):
    expected = read_case(find_cases(folder)[0])
    path = folder / NAME / f"{NAME}_seg.nii.gz"
    nib.save(reoriented(nib.load(path), "RAS"), path)
    np.testing.assert_array_equal(read_case(find_cases(folder)[0]).mask, expected.mask)


def test_trailing_single_axes_are_dropped_and_the_grid_kept(folder):
    expected = read_case(find_cases(folder)[0])
    for path in (folder / NAME).iterdir():
        image = nib.load(path)
        nib.save(type(image)(np.asarray(image.dataobj)[..., None, None], image.affine, image.header), path)
    case = read_case(find_cases(folder)[0])
    np.testing.assert_array_equal(case.volumes, expected.volumes)
    assert case.grid.header.get_data_shape() == case.grid.shape == expected.grid.shape
    for field in ("qform_code", "sform_code", "quatern_b", "qoffset_y", "srow_x", "srow_y", "srow_z", "xyzt_units"):
        np.testing.assert_array_equal(case.grid.header[field], expected.grid.header[field])


def test_a_header_without_orientation_is_accepted_and_said(tmp_path):
    rng = np.random.default_rng(0)
    values = rng.integers(1, 99, (9, 9, 4)).astype(np.int16)
    image = nib.Nifti1Image(values, None)
    assert (image.header["qform_code"], image.header["sform_code"]) == (0, 0)
    nib.save(image, tmp_path / "a.nii")
    case = read_case(find_cases(tmp_path, ("t1",))[0])
    np.testing.assert_array_equal(case.grid.restore(case.volumes[..., 0]), values)
    assert len(case.warnings) == 1
    assert "no orientation" in case.warnings[0]


@pytest.mark.parametrize(("spacing", "warns"), [((1, 1, 1), False), ((1.2, 1, 1), False), ((1.3, 1, 1), True),
                                                ((1, 1.3, 1), True), ((1, 1, 9), False)])
def test_a_field_of_view_far_from_square_is_said(tmp_path, spacing, warns):
    affine = np.diag([*spacing, 1])[:, [2, 0, 1, 3]]  # stored with the axial axis first
    nib.save(nib.Nifti1Image(np.ones((7, 20, 20), np.uint8), affine), tmp_path / "a.nii")
    warnings = read_case(find_cases(tmp_path, ("t1",))[0]).warnings
    assert [" mm and are resized to a square" in warning for warning in warnings] == [True] * warns


def test_an_affine_of_no_use_is_named(tmp_path):
    image = nib.Nifti1Image(np.ones((5, 5, 5), np.uint8), None)
    image.set_sform(np.diag([1, 1, 0, 1]), 2, update_affine=False)
    nib.save(image, tmp_path / "a.nii")
    with pytest.raises(UserError, match=r"a.nii: its affine cannot be inverted"):
        read_case(find_cases(tmp_path, ("t1",))[0])
