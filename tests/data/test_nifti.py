"""Values in NIfTI headers are applied or refused, and errors name the file.

Written files have exactly the input's grid, with correct values at each position.
"""

import gzip

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from hae_jax.data.cases import AFFINE_TOLERANCE, find_cases, read_case
from hae_jax.data.nifti import Grid, header_warnings, read_volume, write_volume
from hae_jax.errors import UserError

RNG = np.random.default_rng(0)
VALUES = RNG.integers(1, 99, (9, 8, 5)).astype(np.int16)
SPACING = np.array([0.5, 0.75, 3.0])
AFFINE = np.diag([*-SPACING[:2], SPACING[2], 1])
BRATS = np.array([[-1.0, 0, 0, 0], [0, -1, 0, 239], [0, 0, 1, 0], [0, 0, 0, 1]])
OBLIQUE = np.array([[0.1, -0.2, 3.9, -7], [0.69, 0.05, -0.3, 11], [0.02, 0.93, 0.4, -80.25], [0, 0, 0, 1]])


def image(values=VALUES, affine=AFFINE, unit="mm"):
    made = nib.Nifti1Image(values, affine)
    made.header.set_xyzt_units(unit)
    return made


@pytest.mark.parametrize(("unit", "size"), [("mm", 1), ("unknown", 1), ("meter", 1000), ("micron", 0.001)])
def test_units_of_length_are_followed(tmp_path, unit, size):
    path = tmp_path / "a.nii"
    scale = np.diag([1 / size, 1 / size, 1 / size, 1])
    nib.save(image(affine=scale @ AFFINE, unit=unit), path)
    values, grid = read_volume(path)
    np.testing.assert_allclose(grid.affine, AFFINE, rtol=1e-6, atol=1e-12)
    assert header_warnings(grid) == []
    write_volume(tmp_path / "out.nii", values.astype(np.int16), grid, "a mask")
    written = nib.load(tmp_path / "out.nii")
    np.testing.assert_array_equal(written.affine, nib.load(path).affine)  # the file's own grid, in its own unit
    assert written.header.get_xyzt_units()[0] == unit


@pytest.mark.parametrize("unit", ["meter", "micron"])
def test_a_unit_that_cannot_be_is_refused(tmp_path, unit):
    nib.save(image(unit=unit), tmp_path / "a.nii")
    with pytest.raises(UserError, match=r"a\.nii: its voxels are .* mm, since its header counts in (metres|micro)"):
        read_volume(tmp_path / "a.nii")


def test_voxel_sizes_that_no_head_has_are_said(tmp_path):
    nib.save(image(affine=np.diag([1e-3, 1e-3, 1e-3, 1])), tmp_path / "a.nii")
    (warning,) = header_warnings(read_volume(tmp_path / "a.nii")[1])
    assert "0.001 x 0.001 x 0.001 mm, which is implausible for a head" in warning


def test_two_voxel_sizes_are_said(tmp_path):
    made = image()
    made.set_sform(2 * AFFINE, 1)
    made.set_qform(AFFINE, 1)
    nib.save(made, tmp_path / "a.nii")
    (warning,) = header_warnings(read_volume(tmp_path / "a.nii")[1])
    assert "1 x 1.5 x 6 mm (sform) and 0.5 x 0.75 x 3 mm (pixdim)" in warning


@pytest.mark.parametrize(("start", "value", "says"), [
    (108, 0.0, r"the voxels begin at byte 0, within the 348 bytes of the header"),  # vox_offset
    (112, np.inf, r"its header scales the voxels by inf"),  # scl_slope
])
def test_a_header_that_would_give_other_voxels_is_refused(tmp_path, start, value, says):
    """nibabel would read the header as voxels, or ignore the scale."""
    nib.save(image(), tmp_path / "a.nii")
    content = bytearray((tmp_path / "a.nii").read_bytes())
    content[start:start + 4] = np.float32(value).tobytes()
    (tmp_path / "a.nii").write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.nii: .*{says}"):
        read_volume(tmp_path / "a.nii")


def test_nibabel_adds_no_lines_of_its_own(tmp_path, caplog):
    nib.save(image(), tmp_path / "a.nii")  # its sform gives the voxel size
    content = bytearray((tmp_path / "a.nii").read_bytes())
    content[80:84] = np.float32(-2).tobytes()  # pixdim[1]
    (tmp_path / "a.nii").write_bytes(content)
    assert nib.load(tmp_path / "a.nii").shape == VALUES.shape
    assert "pixdim[1,2,3] should be positive" in caplog.text
    caplog.clear()
    read_volume(tmp_path / "a.nii")
    assert caplog.text == ""


@pytest.mark.parametrize(("size", "says"), [(0, "no"), (np.nan, "no"), (-2, "a negative")])
def test_a_voxel_without_size_is_refused(tmp_path, size, says):
    """nibabel would use 1 mm for 0, and the absolute value of a negative size."""
    made = image(affine=None)
    nib.save(made, tmp_path / "a.nii")
    content = bytearray((tmp_path / "a.nii").read_bytes())
    content[84:88] = np.float32(size).tobytes()  # pixdim[2]
    (tmp_path / "a.nii").write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.nii: its header gives {says} voxel size"):
        read_volume(tmp_path / "a.nii")


def test_a_code_that_nibabel_would_repair_in_silence_is_refused(tmp_path):
    nib.save(image(), tmp_path / "a.nii")
    content = bytearray((tmp_path / "a.nii").read_bytes())
    content[254:256] = np.int16(9).tobytes()  # sform_code; without it, orientation and voxel size would differ
    (tmp_path / "a.nii").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.nii: its header is damaged \(sform_code is 9\)"):
        read_volume(tmp_path / "a.nii")


COLOUR = np.zeros(VALUES.shape, [("R", "u1"), ("G", "u1"), ("B", "u1")])


@pytest.mark.parametrize(("values", "says"), [
    (VALUES * np.exp(1j * VALUES).astype(np.complex64), r"holds complex numbers \(complex64\); export the magnitude"),
    ((VALUES + 0j).astype(np.complex128), "holds complex numbers"),
    (COLOUR, r"is a colour image \(3 channels a voxel\)"),
])
def test_numbers_that_are_no_intensities_are_refused(tmp_path, values, says):
    nib.save(nib.Nifti1Image(values, AFFINE), tmp_path / "a.nii.gz")
    with pytest.raises(UserError, match=rf"a\.nii\.gz: {says}"):
        read_volume(tmp_path / "a.nii.gz")


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.float32, np.float64, np.int64])
def test_every_scalar_type_and_its_scaling_are_followed(tmp_path, dtype):
    made = nib.Nifti1Image(VALUES.astype(dtype), AFFINE, dtype=dtype)
    made.header.set_slope_inter(0.5, 10)
    nib.save(made, tmp_path / "a.nii")
    content = bytearray((tmp_path / "a.nii").read_bytes())
    content[112:120] = np.array([0.5, 10], np.float32).tobytes()  # scl_slope, scl_inter
    (tmp_path / "a.nii").write_bytes(content)
    stored = np.asarray(nib.load(tmp_path / "a.nii").dataobj.get_unscaled(), np.float32)
    values, grid = read_volume(tmp_path / "a.nii")
    np.testing.assert_array_equal(grid.restore(values), stored * 0.5 + 10)


def test_compressed_or_not_against_the_ending(tmp_path):
    nib.save(image(), tmp_path / "a.nii.gz")
    (tmp_path / "b.nii").write_bytes((tmp_path / "a.nii.gz").read_bytes())
    (tmp_path / "c.nii.gz").write_bytes(gzip.decompress((tmp_path / "a.nii.gz").read_bytes()))
    for name, says in (("b.nii", r"is compressed, .*; rename it to b\.nii\.gz"),
                       ("c.nii.gz", r"is not compressed, .*; rename it to c\.nii$")):
        with pytest.raises(UserError, match=says):
            read_volume(tmp_path / name)


SHIFT = np.array([[0, 0, 0, 1]] * 3 + [[0] * 4])


@pytest.mark.parametrize("axes", ["RAS", "LPS", "PIR"])
@pytest.mark.parametrize(("change", "apart"), [
    (lambda affine: np.round(affine, 4), 0), (lambda affine: affine + 0.002 * SHIFT, 0),
    (lambda affine: affine + 0.3 * SHIFT, "0.52"), (lambda affine: affine @ np.diag([1.01, 1, 1, 1]), "0.464")])
def test_affines_are_compared_in_mm_whatever_the_orientation(tmp_path, axes, change, apart):
    """A grid with an affine rounded to four decimals and moved by 2 um is the same; one moved by 0.3 mm is not."""
    affine = np.array([[0.46875, 0, 0, -11], [0, 0.46875, 0, 12], [0, 0, 5, 0], [0, 0, 0, 1]])
    values = RNG.integers(1, 99, (100, 100, 3)).astype(np.int16)
    spot = np.zeros_like(values)
    spot[3:9, 3:9, 1] = 1
    start = nib.orientations.io_orientation(affine)
    turn = nib.orientations.ornt_transform(start, nib.orientations.axcodes2ornt(axes))
    for name, data, own in (("a", values, affine), ("a_seg", spot, change(affine))):
        nib.save(nib.Nifti1Image(data, own).as_reoriented(turn), tmp_path / f"{name}.nii")
    (files,) = find_cases(tmp_path, ("t1",))
    if not apart:
        np.testing.assert_array_equal(read_case(files).mask.sum(), spot.sum())
        return
    with pytest.raises(UserError, match=rf"a_seg.nii: .* up to {apart} mm apart, {AFFINE_TOLERANCE} mm are tol"):
        read_case(files)


def test_a_constant_background_is_said(tmp_path):
    values = np.pad(VALUES, 2)
    for k, background in enumerate((0, 100)):
        nib.save(image(values + np.int16(background), np.eye(4)), tmp_path / f"p{k}.nii")
    plain, shifted = (read_case(files).warnings for files in find_cases(tmp_path, ("t1",)))
    assert plain == ()
    assert len(shifted) == 1
    assert "the background is 100, not 0" in shifted[0]


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
    np.testing.assert_array_equal(np.asanyarray(found.dataobj), values)  # unscaled, with the given data type
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
    bright = grid.reorient(np.asarray(image.dataobj)) > 50  # in the network's orientation
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
    case = read_case(find_cases(tmp_path)[0])
    write_volume(tmp_path / "mask.nii.gz", np.ones(case.volumes.shape[:3], np.uint8), case.grid, "a mask")
    found = nib.load(tmp_path / "mask.nii.gz")
    assert found.shape == (7, 8, 5)
    np.testing.assert_allclose(found.affine, OBLIQUE, atol=1e-6)
