"""Read a case: the second step of the data flow, shared by preparation and translation.

What leaves this file is the same for every layout and orientation: raw intensities in channel order, turned to LPS, and
a binary lesion mask where there is a segmentation; with them the grid on disk, for the way back.
"""

import contextlib
import dataclasses
import gzip
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from hae_jax.data.layouts import MODALITIES, UNREADABLE, CaseFiles, ImageFile, find_cases, images_in
from hae_jax.data.orientation import ORIENTATION, Grid
from hae_jax.data.preprocessing_signs import preprocessing_signs
from hae_jax.errors import UserError

__all__ = ["MODALITIES", "Case", "CaseFiles", "ImageFile", "find_cases", "read_case"]

AFFINE_TOLERANCE = 1e-3  # mm; what writing an affine as float32 quaternions can lose
NEGATIVE = 0.1  # of the largest intensity: what lies further below 0 is no artefact of resampling
SQUARE = (0.8, 1.25)  # height / width of a slice's field of view that passes as square

_CHUNK = 2**22  # bytes


@dataclasses.dataclass(frozen=True)
class Case:
    """A case in memory, turned to LPS."""

    name: str
    volumes: np.ndarray  # [X, Y, Z, C] float32, raw intensities
    affine: np.ndarray  # [4, 4] float64, voxel -> mm, of `volumes`
    grid: Grid  # of the first image on disk; `grid.restore` takes [X, Y, Z] back to it
    mask: np.ndarray | None  # [X, Y, Z] bool, any lesion label; None without a segmentation
    warnings: tuple[str, ...] = ()  # what the user should know about it, one line each, without the case's name

    @property
    def header(self) -> nib.Nifti1Header:
        """Of the first image, as it is on disk but 3-D; results are written with it."""
        return self.grid.header


def read_case(files: CaseFiles) -> Case:
    """Reads all of a case and checks that its parts belong together.

    A file may have an orientation of its own, as long as it lies on the same voxels.

    Raises:
      UserError: the case has a `problem`, or a file is missing, unreadable, of other dimensions than its layout says,
        not finite, without a positive voxel, or on another grid than the first modality.
    """
    _check_files(files)
    for path in files.paths:
        _check_compression(path)
    wanted = [image.modality for image in files.images]
    first, grid = _read_volume(files.images[0], wanted)
    volumes = np.empty((*first.shape, len(files.images)), np.float32)
    for channel, image in enumerate(files.images):
        volume = first if channel == 0 else _read_on_grid(image, grid, files.images[0].path, wanted)
        if not (volume > 0).any():
            raise UserError(f"{image.path}: no voxel is positive; the image is empty, export it again")
        volumes[..., channel] = volume
    mask = None
    if files.segmentation is not None:
        mask = _read_on_grid(ImageFile("segmentation", files.segmentation), grid, files.images[0].path) > 0.5
    return Case(files.name, volumes, grid.reoriented_affine, grid, mask,
                files.warnings + _warnings(grid, volumes)
                + preprocessing_signs(volumes, grid.reoriented_affine, tuple(wanted)))


def _check_files(files: CaseFiles) -> None:
    """What can be said without reading, with all that the case needs and what is there instead."""
    if files.problem:
        raise UserError(files.problem)
    for image in files.images:
        if not os.path.isfile(image.path):  # unlike Path.is_file, also False where the folder is closed to us
            wanted = ", ".join(image.modality for image in files.images)
            there = images_in(image.path.parent)
            raise UserError(f"{image.path}: missing, or one of several to choose from; the case needs one "
                            f"{image.modality} image (wanted: {wanted}; in the folder: {there})")


def _check_compression(path: Path) -> None:
    """Reads a compressed file to its end, where its checksum is: nibabel stops before, and would take damage for data.

    Raises:
      UserError: the file is damaged.
    """
    if path.suffix == ".gz":
        with _reading(path), gzip.open(path) as stream:
            while stream.read(_CHUNK):
                pass


def _read_volume(file: ImageFile, wanted: Sequence[str] = ()) -> tuple[np.ndarray, Grid]:
    """One channel [X, Y, Z] float32 in LPS, and its grid on disk; all the modalities `wanted` are for errors."""
    path = file.path
    with _reading(path):
        image: Any = nib.load(path)
    if any(size < 1 for size in image.shape):
        raise UserError(f"{path}: has shape {image.shape}, so no voxels; its header is damaged or the image empty; "
                        "copy or export it again")
    extra = image.shape[3:]
    expected = () if file.volume is None else (file.volumes,)
    if len(image.shape) < 3 or tuple(n for n in extra if n != 1) != expected:
        what = "one 3-D volume" if file.volume is None else (
            f"{file.volumes} volumes along a fourth axis, or a file for each modality (<case>_{wanted[0]}.nii.gz, ...)")
        raise UserError(f"{path}: has shape {image.shape}; expected {what} (wanted: {', '.join(wanted) or 'a mask'})")
    with _reading(path):
        if extra:  # reads the one volume only
            image = image.slicer[(..., *(0 if n == 1 else file.volume for n in extra))]
        volume = image.get_fdata(dtype=np.float32, caching="unchanged")
    if not np.isfinite(volume).all():
        raise UserError(f"{path}: holds NaN or infinite voxels; repair or remove the case")
    if not np.isfinite(image.affine).all() or np.linalg.matrix_rank(image.affine[:3, :3]) < 3:
        raise UserError(f"{path}: its affine cannot be inverted; repair the header's sform and qform")
    grid = Grid(volume.shape, image.affine, image.header)
    return grid.reorient(volume), grid


def _read_on_grid(file: ImageFile, grid: Grid, reference: Path, wanted: Sequence[str] = ()) -> np.ndarray:
    volume, own = _read_volume(file, wanted)
    shape = grid.reoriented_shape
    if volume.shape != shape:
        raise UserError(f"{file.path}: shape {volume.shape} differs from {shape} of {reference.name} (both in "
                        f"{ORIENTATION}); resample the case")
    if not np.allclose(own.reoriented_affine, grid.reoriented_affine, rtol=0, atol=AFFINE_TOLERANCE):
        raise UserError(f"{file.path}: its affine differs from that of {reference.name}; resample to one grid")
    return volume


def _warnings(grid: Grid, volumes: np.ndarray) -> tuple[str, ...]:
    found = []
    if any(channel.min() < -NEGATIVE * channel.max() for channel in np.moveaxis(volumes, -1, 0)):
        found.append("voxels are far below 0: networks are trained on images with background 0 and a positive brain, "
                     "so slices may be taken for empty; export the images without centring or z-scores")
    if grid.header["qform_code"] == 0 and grid.header["sform_code"] == 0:
        found.append(f"the header tells no orientation (qform and sform codes are 0); taken as {grid.axes}")
    height, width = np.linalg.norm(grid.reoriented_affine[:3, :2], axis=0) * grid.reoriented_shape[:2]
    if not SQUARE[0] <= height / width <= SQUARE[1]:
        found.append(f"axial slices show {height:.0f} x {width:.0f} mm and are resized to a square, which distorts the "
                     "brain; crop or pad the volumes to about as wide as long")
    return tuple(found)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except MemoryError as error:
        raise UserError(f"{path}: does not fit in memory; if its header tells a wrong size, copy or download it "
                        "again") from error
    except UNREADABLE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: cannot be read ({reason}); copy or download it again") from error
