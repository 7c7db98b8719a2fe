"""Conversion of a case into normalised 2-D slices, and of slices back to the case's own grid.

The results equal those of the published PyTorch preparation. Preparation uses this module between `cases` and `store`.
Translation uses the same functions, so that networks see slices of the same kind as in training.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from hae_jax.data.case_warning import CaseWarning
from hae_jax.data.cases import Case
from hae_jax.data.nifti import Grid
from hae_jax.errors import UserError

PERCENTILE = 99.0  # of a modality's positive voxels; this intensity becomes 1
MIN_SLICE_SUM = 0.5  # a slice shows brain if its intensities, averaged over modalities, sum to more than this
RANGE_EPSILON = 1e-5  # keeps the range of a constant slice finite
SCALINGS = ("slice", "volume")
VOLUME_RANGE = 1.5  # in units of the 99th percentile; with scaling "volume", this intensity and all above become 1


@dataclasses.dataclass(frozen=True)
class CaseSlices:
    """The slices of one case, bottom to top."""

    images: np.ndarray  # [S, H, W, C] float32; 0 is background, 1 the 99th percentile
    masks: np.ndarray | None  # [S, H, W] float32, soft where the lesion's border was resized
    index: np.ndarray  # [S] int32, position along the volume's axis 2
    shape: tuple[int, ...] | None  # (X, Y, Z) of the volume; None if the source does not give it
    scales: np.ndarray | None = None  # [C] the raw intensity that is 1 in `images`; None if it is not known


class SliceGrid(NamedTuple):
    """The position and spacing of a case's slices.

    Attributes:
      positions: [S] numbers of the slices in the volume, in increasing order; None: slices are filtered one by one.
      spacing: (x, y, z) mm between pixels and between neighbouring slices; None if it is not known.
    """

    positions: np.ndarray | None = None
    spacing: tuple[float, float, float] | None = None


ONE_BY_ONE = SliceGrid()


@dataclasses.dataclass(frozen=True)
class SlicedCase:
    """A case as slices for the network, with methods to put results back on the case's grid.

    Attributes:
      name: name of the case.
      inputs: [S, H, W, C] float32 in [-1, 1], the network's input. Empty slices are left out.
      slices: the same slices as in a prepared dataset (normalised, not scaled), with masks, positions and grid.
      scaling: the scaling from `slices` to `inputs` (`to_model_range`).
      affine: [4, 4] reoriented voxels to mm.
      grid: grid of the files; `grid.restore` and `nifti.write_volume` bring volumes back to it.
      head: [X, Y, Z] bool, reoriented: all non-zero voxels, and those that they enclose.
      truth: [X, Y, Z] bool, reoriented: the lesion; None without a segmentation.
      warnings: warnings about the case.
    """

    name: str
    inputs: np.ndarray
    slices: CaseSlices
    scaling: str
    affine: np.ndarray
    grid: Grid
    head: np.ndarray
    truth: np.ndarray | None
    warnings: tuple[CaseWarning, ...]

    @property
    def heads(self) -> np.ndarray:  # [S, H, W] bool
        """The head in each slice: all pixels that are not zero in at least one channel."""
        return np.any(self.slices.images, axis=-1)

    @property
    def slice_grid(self) -> SliceGrid:
        """Position and spacing of the slices."""
        return SliceGrid(self.slices.index, slice_spacing(self.affine, self.slices.shape, self.inputs.shape[1]))

    @property
    def slice_truth(self) -> np.ndarray | None:  # [S, H, W] bool
        """The lesion in each slice at network resolution, equal to the mask in a prepared dataset."""
        return None if self.slices.masks is None else self.slices.masks > 0.5

    def volume(
        self,
        values: np.ndarray,  # [S, h, w]
    ) -> np.ndarray:  # [X, Y, Z] float32
        """Resizes slices bilinearly to the case's reoriented grid. Zero outside of the head and of the slices."""
        return slices_to_volume(values, self.slices.index, self.head.shape) * self.head

    def mask_volume(
        self,
        masks: np.ndarray,  # [S, h, w] bool
    ) -> np.ndarray:  # [X, Y, Z] bool
        """Puts slice masks on the case's grid. A voxel is set where the resized mask exceeds one half."""
        return self.volume(masks.astype(np.float32)) > 0.5

    def healthy_volume(
        self,
        healthy: np.ndarray,  # [S, h, w] in [-1, 1], one modality
        channel: int,
    ) -> np.ndarray:  # [X, Y, Z] float32
        """The pseudo-healthy reconstruction of one modality in the file's own intensities."""
        assert self.slices.scales is not None  # `case_slices` sets them
        images = self.slices.images[..., channel:channel + 1]
        normalised = from_model_range(healthy[..., None], images, self.scaling)[..., 0]
        return self.volume(normalised * self.slices.scales[channel])


def sliced(case: Case, image_size: int, scaling: str = "slice", where: str = "images") -> SlicedCase:
    """Slices a case that is in memory. `where`, its origin, is named in errors.

    Raises:
      UserError: the case cannot be used.
    """
    slices = case_slices(case, image_size)
    shown = slices.images.any(axis=(1, 2, 3))  # empty slices may lie between others
    if not shown.any():
        raise UserError(f"{where}: what the images of {case.name} show is lost when its slices are made "
                        f"{image_size} x {image_size} px; check them, or remove the case")
    slices = dataclasses.replace(slices, images=slices.images[shown], index=slices.index[shown],
                                 masks=None if slices.masks is None else slices.masks[shown])
    return SlicedCase(case.name, to_model_range(slices.images, scaling), slices, scaling, case.affine, case.grid,
                      head(case.volumes), case.mask, case.warnings)


def head(
    volumes: np.ndarray,  # [X, Y, Z, C] raw intensities
) -> np.ndarray:  # [X, Y, Z] bool
    """The head: all but the background. The background is zero in every channel and connected to the volume's faces."""
    zero, _ = ndimage.label(~volumes.any(axis=-1))
    outside = np.zeros(zero.max() + 1, bool)
    for axis in range(zero.ndim):
        outside[np.unique(np.take(zero, [0, -1], axis))] = True
    outside[0] = False  # label 0: voxels that are not zero
    return ~outside[zero]


def normalise_volumes(
    volumes: np.ndarray,  # [X, Y, Z, C] raw intensities
    scales: np.ndarray,  # [C] of `intensity_scales`
) -> np.ndarray:  # [X, Y, Z, C] float32
    """Divides each channel by its scale."""
    return (volumes / scales.astype(volumes.dtype)).astype(np.float32, copy=False)


def intensity_scales(
    volumes: np.ndarray,  # [X, Y, Z, C] raw intensities
) -> np.ndarray:  # [C]
    """The raw intensity that becomes 1: the 99th percentile (linear interpolation) of a channel's positive voxels.

    Raises:
      ValueError: a channel has no positive voxel (`read_case` refuses such a case earlier).
    """
    scales = []
    for channel in range(volumes.shape[-1]):
        values = volumes[..., channel]
        positive = values[values > 0]
        if positive.size == 0:
            raise ValueError(f"channel {channel} has no positive voxel")
        scales.append(np.percentile(positive, PERCENTILE))
    return np.asarray(scales)


def case_slices(case: Case, image_size: int = 128) -> CaseSlices:
    """Normalises a case and cuts it into axial slices of `image_size` x `image_size` pixels.

    Axial slices are along axis 2. Axes 0 and 1 become H and W without transposition. All slices from the first to the
    last one that shows brain are kept.

    Raises:
      UserError: no slice shows brain.
    """
    scales = intensity_scales(case.volumes)
    volumes = normalise_volumes(case.volumes, scales)
    shows_brain = np.flatnonzero(volumes.mean(axis=-1).sum(axis=(0, 1)) > MIN_SLICE_SUM)
    if shows_brain.size == 0:
        raise UserError(f"case {case.name}: no axial slice shows any brain; check that the images are not blank, "
                        "and that their background is 0, not negative")
    index = np.arange(shows_brain[0], shows_brain[-1] + 1, dtype=np.int32)
    images = resize(volumes[:, :, index].transpose(2, 3, 0, 1), image_size).transpose(0, 2, 3, 1)
    masks = None
    if case.mask is not None:
        masks = resize(case.mask[:, :, index].transpose(2, 0, 1).astype(np.float32), image_size)
    return CaseSlices(np.ascontiguousarray(images), masks, index, case.volumes.shape[:3], scales)


def slice_spacing(
    affine: Sequence[Sequence[float]] | np.ndarray | None,  # [4, 4] voxels to mm
    shape: Sequence[int] | None,  # (X, Y, Z) of the volume
    size: int,
) -> tuple[float, float, float] | None:
    """(x, y, z) mm between the pixels of slices of `size` x `size` and between slices; None if it is not known."""
    if affine is None or shape is None:
        return None
    x, y, z = np.linalg.norm(np.asarray(affine, float)[:3, :3], axis=0)
    return float(x * shape[0] / size), float(y * shape[1] / size), float(z)


def resize(
    images: np.ndarray,  # [..., H, W]
    size: int | tuple[int, ...],
) -> np.ndarray:  # [..., h, w] float32
    """Bilinear resizing with half-pixel centres, clamped edges and no antialiasing, to (h, w) or a square.

    Equals PyTorch's `interpolate(mode="bilinear", align_corners=False)`.
    """
    height, width = (size, size) if isinstance(size, int) else size
    images = np.asarray(images, np.float32)
    *leading, old_height, old_width = images.shape
    factors = (height / old_height, width / old_width)
    # Images are resized one by one. On a stack, SciPy also interpolates along the leading axes and takes twice as long.
    resized = np.empty((int(np.prod(leading)), height, width), np.float32)
    for image, out in zip(images.reshape(-1, old_height, old_width), resized, strict=True):
        ndimage.zoom(image, factors, output=out, order=1, mode="nearest", grid_mode=True)
    return resized.reshape(*leading, height, width)


def to_model_range(
    images: np.ndarray,  # [..., H, W, C] normalised by volume: 0 is background, 1 the 99th percentile
    scaling: str = "slice",
) -> np.ndarray:  # [..., H, W, C] float32
    """Scales slices to [-1, 1], the range of the network's input.

    With "slice" (as published), each slice and channel is scaled by its range: 2 (x - min) / (max - min + 1e-5) - 1. A
    constant slice becomes -1. A bright lesion makes the rest of its slice darker. With "volume", all slices of a case
    are scaled equally: 2 x / 1.5 - 1, clipped.

    Raises:
      UserError: unknown scaling.
    """
    if scaling not in SCALINGS:
        raise UserError(f"data.scaling is {scaling!r}: choose slice or volume")
    images = np.asarray(images, np.float32)
    if scaling == "volume":
        return np.clip(images * np.float32(2 / VOLUME_RANGE) - 1, -1, 1)
    # One axis after the other. Over both axes at once, NumPy is several times slower with few channels innermost.
    low = images.min(axis=-3, keepdims=True).min(axis=-2, keepdims=True)
    high = images.max(axis=-3, keepdims=True).max(axis=-2, keepdims=True)
    scaled = images - low  # the next steps are in place for speed, since this runs on every training batch
    scaled /= high - low + np.float32(RANGE_EPSILON)
    scaled *= 2
    scaled -= 1
    return scaled


def from_model_range(
    scaled: np.ndarray,  # [..., H, W, C] in [-1, 1]
    images: np.ndarray,  # [..., H, W, C] the slices that were given to `to_model_range`
    scaling: str = "slice",
) -> np.ndarray:  # [..., H, W, C] float32
    """The inverse of `to_model_range`. The intensity range is that of `images`."""
    if scaling == "volume":
        return ((scaled + 1) / 2 * VOLUME_RANGE).astype(np.float32)
    low = images.min(axis=(-3, -2), keepdims=True)
    high = images.max(axis=(-3, -2), keepdims=True)
    return ((scaled + 1) / 2 * (high - low + RANGE_EPSILON) + low).astype(np.float32)


def slices_to_volume(
    values: np.ndarray,  # [S, h, w]
    index: np.ndarray,  # [S] positions along axis 2
    shape: tuple[int, ...],  # (X, Y, Z)
) -> np.ndarray:  # [X, Y, Z] float32
    """Puts slices back on the case's grid, bilinearly resized to X x Y. Positions without a slice are zero.

    A mask is given as 0 and 1 and thresholded afterwards at > 0.5.
    """
    volume = np.zeros(shape, np.float32)
    volume[:, :, index] = resize(values, tuple(shape[:2])).transpose(1, 2, 0)
    return volume
