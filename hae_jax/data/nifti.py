"""Reading and writing of NIfTI files. No other module reads them.

A volume is read as float32, together with its grid on disk, and reoriented to LPS (axes towards left, posterior,
superior). This is the orientation of BraTS, on which the published networks were trained. Axes are only swapped and
flipped, and nothing is resampled. An oblique image is assigned to the closest axes. Results are written on the grid on
disk. Data type, units and voxel size are taken from the header; a header with unusable values raises an error.
"""

import contextlib
import dataclasses
import functools
import gzip
import logging
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel import imageglobals, orientations
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from hae_jax.data.case_warning import CaseWarning
from hae_jax.data.presence import absence, pointer
from hae_jax.errors import UserError
from hae_jax.files import written_whole

ORIENTATION = "LPS"
EXTENSIONS = (".nii.gz", ".nii", ".NII.GZ", ".NII")  # new files get the first
SPACING = (0.02, 30.0)  # mm between voxels in an image of a head, lowest and highest
SIZES_AGREE = 0.01  # relative difference up to which two voxel sizes count as equal

_UNREADABLE = (OSError, EOFError, ValueError, TypeError, OverflowError, KeyError, AttributeError, zlib.error,
               ImageFileError, HeaderDataError)
_UNITS = {0: ("unknown", 1.0), 1: ("metres", 1000.0), 2: ("millimetres", 1.0), 3: ("micrometres", 0.001)}  # -> mm
_CODES = range(6)  # valid sform and qform codes
_GZIP = b"\x1f\x8b"
_HEADER_SIZES = {348, 540}  # the first number of a NIfTI-1 or NIfTI-2 file
_CHUNK = 2**22  # bytes


@dataclasses.dataclass(frozen=True)
class Grid:
    """The voxel grid of an image as it lies on disk.

    Attributes:
      shape: (X, Y, Z) of the file.
      affine: [4, 4] float64, voxel -> mm (RAS+, as nibabel gives it).
      header: of a 3-D image on this grid; results are written with it.
    """

    shape: tuple[int, int, int]
    affine: np.ndarray
    header: nib.Nifti1Header

    @property
    def axes(self) -> str:
        """The closest axis codes, such as "RAS"."""
        return "".join(nib.aff2axcodes(self.affine))

    @functools.cached_property
    def transform(self) -> np.ndarray:
        """[3, 2], for each axis of the file: its axis in LPS, and its direction there, kept (1) or flipped (-1)."""
        return orientations.ornt_transform(orientations.io_orientation(self.affine),
                                           orientations.axcodes2ornt(ORIENTATION))

    @property
    def reoriented_affine(self) -> np.ndarray:  # [4, 4]
        """The affine, voxel to mm, of the volume that `reorient` returns."""
        return self.affine @ orientations.inv_ornt_aff(self.transform, self.shape)

    @property
    def reoriented_shape(self) -> tuple[int, int, int]:
        """The shape of the volume that `reorient` returns."""
        shape = [0, 0, 0]
        for size, axis in zip(self.shape, self.transform[:, 0], strict=True):
            shape[int(axis)] = size
        return shape[0], shape[1], shape[2]

    def reorient(
        self,
        values: np.ndarray,  # [X, Y, Z] in the file's axes
    ) -> np.ndarray:  # the same voxels in LPS; a view
        """Reorients a volume to LPS."""
        return orientations.apply_orientation(values, self.transform)

    def restore(
        self,
        values: np.ndarray,  # [X', Y', Z'] in LPS
    ) -> np.ndarray:  # [X, Y, Z] in the file's axes
        """Reorients a volume from LPS to the file's axes; the inverse of `reorient`."""
        back = orientations.ornt_transform(orientations.axcodes2ornt(ORIENTATION),
                                           orientations.io_orientation(self.affine))
        return np.ascontiguousarray(orientations.apply_orientation(values, back))


def stem(path: Path) -> str:
    """A NIfTI file's name without extension."""
    return next((path.name.removesuffix(extension) for extension in EXTENSIONS if path.name.endswith(extension)),
                path.name)


def is_4d(path: Path) -> bool:
    """Whether a file holds several volumes. False if it cannot be read; `read_case` reports that error later."""
    if absence(path):
        return False
    try:
        with _quiet():
            image: Any = nib.load(path)
        shape = image.shape
    except (*_UNREADABLE, MemoryError):
        return False
    return len(shape) > 3 and shape[3] > 1


def read_volume(
    path: Path, volume: int | None = None, volumes: int = 1, wanted: Sequence[str] = ()
) -> tuple[np.ndarray, Grid]:
    """Reads one volume.

    Args:
      path: the file.
      volume: position along the fourth axis; None: the file is 3-D.
      volumes: number of volumes that the file must have.
      wanted: the modalities of the case; for errors.

    Returns:
      [X, Y, Z] float32 in LPS, and its grid on disk with the affine in mm.

    Raises:
      UserError: the file is not there, is damaged, has other dimensions, numbers that are no intensities (complex, RGB,
        NaN), or no voxel size.
    """
    _check_file(path)
    with _reading(path):
        image: Any = nib.load(path)
    _check_kind(path, image)
    _check_shape(path, image.shape, () if volume is None else (volumes,), wanted)
    with _reading(path), image.file_map["image"].get_prepare_fileobj("rb") as stream:
        stored = type(image.header).from_fileobj(stream, check=False)  # without nibabel's repairs, which may be wrong
    _check_stored(path, stored)
    affine = _affine_mm(path, image, stored)
    with _reading(path), np.errstate(over="ignore"):  # values beyond float32 become infinite and raise the error below
        if extra := image.shape[3:]:  # reads only the wanted volume
            image = image.slicer[(..., *(0 if n == 1 else volume for n in extra))]
        values = image.get_fdata(dtype=np.float32, caching="unchanged")
    if not np.isfinite(values).all():
        raise UserError(f"{path}: holds NaN or infinite voxels; repair or remove the case")
    grid = Grid(values.shape, affine, image.header)
    return grid.reorient(values), grid


def header_warnings(grid: Grid) -> list[CaseWarning]:
    """Warnings about unusual values in a header."""
    found = []
    if grid.header["qform_code"] == 0 and grid.header["sform_code"] == 0:
        found.append(CaseWarning(
            "the header has no orientation (qform and sform codes are 0); read as {}", grid.axes))
    spacing = np.linalg.norm(grid.affine[:3, :3], axis=0)
    if not _plausible(spacing):
        found.append(CaseWarning(
            "its voxels are {}, which is implausible for a head; if the header is wrong, all results in ml and mm are "
            "wrong; correct the voxel size in the header", _mm(spacing)))
    zooms = np.array(grid.header.get_zooms()[:3], float) * _UNITS[int(grid.header["xyzt_units"]) & 7][1]
    if grid.header["sform_code"] != 0 and not np.allclose(spacing, zooms, rtol=SIZES_AGREE, atol=0):
        found.append(CaseWarning(
            "the header gives two voxel sizes, {} (sform) and {} (pixdim); the sform is used, other programs may use "
            "the other", _mm(spacing), _mm(zooms)))
    return found


def write_volume(
    path: str | os.PathLike,
    values: np.ndarray,  # [X, Y, Z] in LPS, of the type to be stored
    grid: Grid,
    description: str,
) -> None:
    """Writes a NIfTI file on another image's grid, whole or not at all.

    Shape, zooms, qform and sform with their codes, and units are exactly those of the image. Fields of the header about
    intensities are replaced.

    Args:
      path: ending in .nii or .nii.gz.
      values: the volume.
      grid: the image's grid.
      description: a description of at most 79 characters.
    """
    values, header = np.ascontiguousarray(grid.restore(values)), grid.header.copy()
    header.set_data_shape(values.shape)  # the input may be 4-D, or 3-D with a fourth axis of length 1
    header.set_data_dtype(values.dtype)
    header.set_slope_inter(1, 0)
    header.set_intent("none")
    header["cal_min"], header["cal_max"] = 0, values.max()
    header["descrip"] = description
    header.extensions.clear()  # notes of other programs describe the input's intensities
    image_type = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
    # Without an affine argument, the image keeps the header's affine. With one, nibabel would change the form codes.
    image = image_type(values, None, header)
    with written_whole(path) as temporary:
        nib.save(image, temporary)


def _check_file(path: Path) -> None:
    """Checks without nibabel that a file exists, is complete, and is compressed if and only if its name says so.

    Compressed files are read to the end, where the checksum is. nibabel stops before it and would not notice damage.
    """
    if reason := absence(path):
        raise UserError(f"{path}: {reason}")
    with _reading(path), path.open("rb") as stream:
        beginning = stream.read(128)
    if reason := pointer(beginning):
        raise UserError(f"{path}: {reason}")
    named_gz, is_gz = path.suffix.lower() == ".gz", beginning.startswith(_GZIP)
    if is_gz and not named_gz:
        raise UserError(f"{path}: is compressed, although its name says that it is not; rename it to {path.name}.gz")
    if named_gz and not is_gz:
        if {int.from_bytes(beginning[:4], order) for order in ("little", "big")} & _HEADER_SIZES:
            raise UserError(f"{path}: is not compressed, although its name says so; rename it to {path.stem}")
        raise UserError(f"{path}: cannot be read (it is neither compressed nor NIfTI); copy or download it again")
    if is_gz:
        with _reading(path), gzip.open(path) as stream:
            while stream.read(_CHUNK):
                pass


def _check_kind(path: Path, image: object) -> None:
    if not isinstance(image, nib.Nifti1Image):  # CIFTI, Analyze, ...
        raise UserError(f"{path}: is {type(image).__name__.removesuffix('Image')}, not a NIfTI volume; convert it")
    dtype = np.dtype(image.get_data_dtype())
    if dtype.kind == "c":
        raise UserError(f"{path}: holds complex numbers ({dtype}); export the magnitude image")
    if dtype.names:
        raise UserError(f"{path}: is a colour image ({len(dtype.names)} channels a voxel); export the intensities, "
                        "one number a voxel")
    if dtype.kind not in "iuf":
        raise UserError(f"{path}: its data type {dtype} is not numeric; export it as float32 or int16")


def _check_shape(path: Path, shape: tuple[int, ...], expected: tuple[int, ...], wanted: Sequence[str]) -> None:
    if any(size < 1 for size in shape):
        raise UserError(f"{path}: has shape {shape}, so no voxels; its header is damaged or the image empty; copy or "
                        "export it again")
    if len(shape) < 3 or tuple(n for n in shape[3:] if n != 1) != expected:
        what = f"{expected[0]} volumes along a fourth axis, or a file for each modality (<case>_{wanted[0]}.nii.gz, " \
               "...)" if expected else "one 3-D volume"
        raise UserError(f"{path}: has shape {shape}; expected {what} (wanted: {', '.join(wanted) or 'a mask'})")


def _check_stored(path: Path, header: nib.Nifti1Header) -> None:
    """Refuses headers that nibabel accepts without an error: voxels that start in the header, an infinite scale."""
    start, size = int(header["vox_offset"]), int(header.sizeof_hdr)
    if start < size:
        raise UserError(f"{path}: its header says that the voxels begin at byte {start}, within the {size} bytes of "
                        "the header; correct vox_offset, or export it again")
    if np.isinf(header["scl_slope"]):  # some programs write NaN for "no scale"
        raise UserError(f"{path}: its header scales the voxels by {header['scl_slope']}; correct scl_slope, or export "
                        "it again")


def _affine_mm(path: Path, image: nib.Nifti1Image, stored: nib.Nifti1Header) -> np.ndarray:  # [4, 4]
    """The affine from voxels to mm, converted from the header's unit of length."""
    header = image.header
    unit, millimetres = _UNITS.get(int(header["xyzt_units"]) & 7, (None, 0))
    if unit is None:
        raise UserError(f"{path}: its unit of length is not known (xyzt_units is {int(header['xyzt_units'])}); correct "
                        "the header")
    for code in ("sform_code", "qform_code"):
        if int(stored[code]) not in _CODES:
            raise UserError(f"{path}: its header is damaged ({code} is {int(stored[code])}); copy or export it again")
    if header["sform_code"] == 0:  # otherwise the sform gives the voxel size
        sizes = np.asarray(stored["pixdim"][1:4], float)  # as stored, since nibabel replaces 0 by 1
        if not np.isfinite(sizes).all() or not sizes.all():
            raise UserError(f"{path}: its header gives no voxel size (pixdim is {', '.join(map(str, sizes))}); correct "
                            "the header")
        if (sizes < 0).any():  # nibabel takes the absolute value, but the axis may be reversed
            raise UserError(f"{path}: its header gives a negative voxel size (pixdim is {', '.join(map(str, sizes))}); "
                            "correct the header, or export the image again with an sform")
    assert image.affine is not None  # an image from a file has one
    with np.errstate(all="ignore"):
        affine = image.affine if millimetres == 1 else np.diag([millimetres] * 3 + [1]) @ image.affine
        usable = np.isfinite(affine).all() and np.linalg.matrix_rank(affine[:3, :3]) == 3
    if not usable:
        raise UserError(f"{path}: its affine cannot be inverted; repair the header's sform and qform")
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if millimetres != 1 and not _plausible(spacing):
        raise UserError(f"{path}: its voxels are {_mm(spacing)}, since its header counts in {unit}; correct xyzt_units "
                        "or the voxel size")
    return affine


def _plausible(spacing: np.ndarray) -> bool:
    return bool((spacing >= SPACING[0]).all() and (spacing <= SPACING[1]).all())


def _mm(spacing: np.ndarray) -> str:
    return " x ".join(f"{size:.3g}" for size in spacing) + " mm"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides nibabel's messages about its repairs, which name no file. The relevant errors are checked here."""
    logger = imageglobals.logger
    logger.addFilter(_nothing)
    try:
        yield
    finally:
        logger.removeFilter(_nothing)


def _nothing(record: logging.LogRecord) -> bool:
    return False


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        with _quiet():
            yield
    except MemoryError as error:
        raise UserError(f"{path}: does not fit in memory; if the size in its header is wrong, copy or download "
                        "it again") from error
    except PermissionError as error:
        raise UserError(f"{path}: no permission to read it; change its permissions") from error
    except _UNREADABLE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        again = "export" if isinstance(error, HeaderDataError) else "copy or download"
        raise UserError(f"{path}: cannot be read ({reason}); {again} it again") from error
