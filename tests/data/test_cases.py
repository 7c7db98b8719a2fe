"""Finding and reading cases: both BraTS namings, and every way in which a case can be broken."""

import shutil

import nibabel as nib
import numpy as np
import pytest

from hae_jax.data.cases import LAYOUTS, MODALITIES, find_cases, read_case
from hae_jax.errors import UserError

NAME = "BraTS2021_00000"


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
    segmentation = nib.load(folder / NAME / f"{NAME}_seg.nii.gz")
    np.testing.assert_array_equal(case.mask, np.asarray(segmentation.dataobj) > 0)
    assert case.header.get_data_shape() == case.mask.shape


def test_later_brats_names_and_plain_nii_give_the_same_case(folder):
    expected = read_case(find_cases(folder)[0])
    old, new = LAYOUTS
    target = folder / "BraTS-GLI-00001-000"
    (folder / NAME).rename(target)
    for before, after in [*((old.images[m], new.images[m]) for m in MODALITIES), (old.segmentation, new.segmentation)]:
        nib.save(nib.load(target / f"{NAME}{before}.nii.gz"), target / f"{target.name}{after}.nii")
        (target / f"{NAME}{before}.nii.gz").unlink()
    case = read_case(find_cases(folder)[0])
    assert case.name == target.name
    np.testing.assert_array_equal(case.volumes, expected.volumes)
    np.testing.assert_array_equal(case.mask, expected.mask)


def test_cases_are_sorted_and_one_case_folder_is_accepted(folder):
    for name in ("b", "a", "c"):
        shutil.copytree(folder / NAME, folder / name)
    (folder / "notes").mkdir()
    assert [case.name for case in find_cases(folder)] == [NAME, "a", "b", "c"]
    assert [case.name for case in find_cases(folder / "b")] == ["b"]


def test_case_without_segmentation_is_read(folder):
    (folder / NAME / f"{NAME}_seg.nii.gz").unlink()
    (files,) = find_cases(folder)
    assert files.segmentation is None
    assert read_case(files).mask is None


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


def test_two_files_of_a_kind_are_not_guessed_between(folder):
    path = folder / NAME / f"{NAME}_t1.nii.gz"
    for name in ("one", "two"):
        shutil.copy(path, path.with_name(f"{name}_t1.nii.gz"))
    read_case(find_cases(folder)[0])  # the one named after its folder wins
    path.unlink()
    with pytest.raises(UserError, match=f"{path.name}: missing"):
        read_case(find_cases(folder)[0])


def test_no_cases(tmp_path):
    with pytest.raises(UserError, match="no cases found"):
        find_cases(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        find_cases(tmp_path / "absent")
