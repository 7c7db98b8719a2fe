"""Reading of a case: the second step of the data flow, used by preparation and translation.

The result has the same form for every layout and orientation: raw intensities in channel order, reoriented to LPS, and
a binary lesion mask if there is a segmentation. It includes the grid on disk, so that results can be written on it.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hae_jax.data.case_warning import CaseWarning
from hae_jax.data.layouts import MODALITIES, CaseFiles, ImageFile, find_cases, images_in
from hae_jax.data.lesion_mask import lesion_mask
from hae_jax.data.nifti import ORIENTATION, Grid, header_warnings, read_volume
from hae_jax.data.preprocessing_signs import preprocessing_signs
from hae_jax.data.presence import absence
from hae_jax.errors import UserError

__all__ = ["MODALITIES", "Case", "CaseFiles", "ImageFile", "find_cases", "read_case"]

AFFINE_TOLERANCE = 0.1  # mm, the largest allowed distance between corresponding corners of two volumes
NEGATIVE = 0.1  # as a share of the largest intensity; values further below 0 are not resampling artefacts
SQUARE = (0.8, 1.25)  # the range of height / width in which a slice's field of view counts as square


@dataclasses.dataclass(frozen=True)
class Case:
    """A case in memory, reoriented to LPS."""

    name: str
    volumes: np.ndarray  # [X, Y, Z, C] float32, raw intensities
    affine: np.ndarray  # [4, 4] float64, voxel -> mm, of `volumes`
    grid: Grid  # of the first image on disk; `grid.restore` takes [X, Y, Z] back to its axes
    mask: np.ndarray | None  # [X, Y, Z] bool, True for any lesion label; None without a segmentation
    warnings: tuple[CaseWarning, ...] = ()  # one line each, without the case's name


def read_case(files: CaseFiles) -> Case:
    """Reads all of a case and checks that its parts belong together.

    Files may have different orientations if they have the same voxels.

    Raises:
      UserError: the case has a `problem`; a file is missing, unreadable, not finite, without a positive voxel, on
        another grid than the first modality, or its dimensions do not fit the layout; or the segmentation has values
        that are not lesion labels.
    """
    _check_files(files)
    wanted = [image.modality for image in files.images]
    first, grid = _read(files.images[0], wanted)
    volumes = np.empty((*first.shape, len(files.images)), np.float32)
    for channel, image in enumerate(files.images):
        volume = first if channel == 0 else _read_on_grid(image, grid, files.images[0].path, wanted)
        if not (volume > 0).any():
            raise UserError(f"{image.path}: no voxel is positive; the image is empty, export it again")
        volumes[..., channel] = volume
    warnings = (*files.warnings, *header_warnings(grid), *_warnings(grid, volumes))
    mask = None
    if files.segmentation is not None:
        values = _read_on_grid(ImageFile("segmentation", files.segmentation), grid, files.images[0].path)
        mask, found = lesion_mask(files.segmentation, values, volumes)
        warnings += found
    warnings += preprocessing_signs(volumes, grid.reoriented_affine, tuple(wanted))
    return Case(files.name, volumes, grid.reoriented_affine, grid, mask, warnings)


def _check_files(files: CaseFiles) -> None:
    """Checks that all files of a case are there. An error names the wanted images and the images in the folder."""
    if files.problem:
        raise UserError(files.problem)
    for path in files.paths:
        reason = absence(path)
        image = next((image for image in files.images if image.path == path), None)
        if reason == "missing" and image is not None:
            wanted = ", ".join(image.modality for image in files.images)
            raise UserError(f"{path}: missing, or one of several to choose from; the case needs one {image.modality} "
                            f"image (wanted: {wanted}; in the folder: {images_in(path.parent)})")
        if reason:
            raise UserError(f"{path}: {reason}")


def _read(file: ImageFile, wanted: Sequence[str] = ()) -> tuple[np.ndarray, Grid]:
    return read_volume(file.path, file.volume, file.volumes, wanted)


def _read_on_grid(file: ImageFile, grid: Grid, reference: Path, wanted: Sequence[str] = ()) -> np.ndarray:
    volume, own = _read(file, wanted)
    shape = grid.reoriented_shape
    if volume.shape != shape:
        raise UserError(f"{file.path}: shape {volume.shape} differs from {shape} of {reference.name} (both in "
                        f"{ORIENTATION}); resample the case")
    if (apart := _apart(own, grid)) > AFFINE_TOLERANCE:
        raise UserError(f"{file.path}: its affine differs from that of {reference.name}: the corners of the two "
                        f"volumes lie up to {apart:.3g} mm apart, {AFFINE_TOLERANCE} mm are tolerated; resample to one "
                        "grid")
    return volume


def _apart(grid: Grid, other: Grid) -> float:
    """The largest distance in mm between corresponding corners of two volumes."""
    last = [size - 1 for size in grid.reoriented_shape]
    corners = np.array([[*corner, 1] for corner in itertools.product(*((0, end) for end in last))])  # [8, 4]
    difference = corners @ (grid.reoriented_affine - other.reoriented_affine).T
    return float(np.linalg.norm(difference[:, :3], axis=1).max())


def _warnings(grid: Grid, volumes: np.ndarray) -> tuple[CaseWarning, ...]:
    found = []
    channels = np.moveaxis(volumes, -1, 0)
    if any(channel.min() < -NEGATIVE * channel.max() for channel in channels):
        found.append(CaseWarning(
            "voxels are far below 0: networks are trained on images with background 0 and a positive brain, so slices "
            "may be taken for empty; export the images without centring or z-scores"))
    if backgrounds := sorted({value for channel in channels if (value := _background(channel)) > 0}):
        values = ", ".join(f"{value:g}" for value in backgrounds)
        found.append(CaseWarning(
            "the background is {}, not 0: networks are trained on images with background 0; subtract it", values))
    height, width = np.linalg.norm(grid.reoriented_affine[:3, :2], axis=0) * grid.reoriented_shape[:2]
    if not SQUARE[0] <= height / width <= SQUARE[1]:
        found.append(CaseWarning("axial slices show {:.0f} x {:.0f} mm and are resized to a square, which distorts the "
                           "brain; crop or pad the volumes to about as wide as long", height, width))
    return tuple(found)


def _background(
    channel: np.ndarray,  # [X, Y, Z]
) -> float:
    """The background value: the volume's minimum if all eight corners have it and it is not constant, else 0."""
    corners = channel[np.ix_(*([0, -1],) * 3)]
    low = channel.min()
    return float(low) if (corners == low).all() and channel.max() > low else 0.0
