"""A case in: slices for the network. Masks, maps and pseudo-healthy reconstructions out: on the case's own grid.

The first and the last stage of a translation; slicing and its reverse are those of `hae_jax.data.slices`. In between,
volumes lie in the orientation that networks are trained in; `hae_jax.data.nifti.write_volume` turns them back.
"""

import dataclasses

import numpy as np
from scipy import ndimage

from hae_jax.data.cases import Case, CaseFiles, Grid, read_case
from hae_jax.data.doubts import Doubt
from hae_jax.data.slices import (
    CaseSlices,
    case_slices,
    from_model_range,
    slice_spacing,
    slices_to_volume,
    to_model_range,
)
from hae_jax.errors import UserError
from hae_jax.localization.masks import SliceGrid


@dataclasses.dataclass(frozen=True)
class SlicedCase:
    """A case as the network sees it, and what is needed to go back.

    Attributes:
      name: of the case.
      inputs: [S, H, W, C] float32 in [-1, 1], what the network gets. Slices that show nothing are left out.
      slices: the same slices as in a prepared dataset (normalised, not scaled), their masks, positions, grid.
      scaling: how `inputs` were made of them (`to_model_range`).
      affine: [4, 4] voxels, reoriented, to mm.
      grid: of the files.
      head: [X, Y, Z] bool, reoriented: where anything is shown, and what that encloses.
      truth: [X, Y, Z] bool, reoriented: the lesion; None without a segmentation.
      warnings: what is unusual about the case, in words.
    """

    name: str
    inputs: np.ndarray
    slices: CaseSlices
    scaling: str
    affine: np.ndarray
    grid: Grid
    head: np.ndarray
    truth: np.ndarray | None
    warnings: tuple[Doubt, ...]

    @property
    def heads(self) -> np.ndarray:  # [S, H, W] bool
        """Where each slice shows anything."""
        return self.slices.images.any(axis=-1)

    @property
    def slice_grid(self) -> SliceGrid:
        """Where the slices lie."""
        return SliceGrid(self.slices.index, slice_spacing(self.affine, self.slices.shape, self.inputs.shape[1]))

    @property
    def slice_truth(self) -> np.ndarray | None:  # [S, H, W] bool
        """The lesion in each slice, at network resolution, as a prepared dataset has it."""
        return None if self.slices.masks is None else self.slices.masks > 0.5


def read_slices(files: CaseFiles, image_size: int, scaling: str = "slice") -> SlicedCase:
    """Reads a case and slices it; the volumes are let go.

    Raises:
      UserError: if the case cannot be used.
    """
    return sliced(read_case(files), image_size, scaling, str(files.folder))


def sliced(case: Case, image_size: int, scaling: str = "slice", where: str = "images") -> SlicedCase:
    """Slices a case that is in memory; `where` it comes from is for errors.

    Raises:
      UserError: if it cannot be used.
    """
    slices = _shown(case_slices(case, image_size))
    if not len(slices.index):
        raise UserError(f"{where}: what the images of {case.name} show is lost when its slices are made "
                        f"{image_size} x {image_size} px; check them, or remove the case")
    return SlicedCase(case.name, to_model_range(slices.images, scaling), slices, scaling, case.affine, case.grid,
                      head(case.volumes), case.mask, case.warnings)


def head(
    volumes: np.ndarray,  # [X, Y, Z, C] raw intensities
) -> np.ndarray:  # [X, Y, Z] bool
    """All but the background, which is zero in every channel and reaches the volume's faces: a zero within stays."""
    zero, _ = ndimage.label(~volumes.any(axis=-1))
    outside = np.zeros(zero.max() + 1, bool)
    for axis in range(zero.ndim):
        outside[np.unique(np.take(zero, [0, -1], axis))] = True
    outside[0] = False  # what is not zero
    return ~outside[zero]


def _shown(slices: CaseSlices) -> CaseSlices:
    """Without the empty slices that may lie between others."""
    keep = slices.images.any(axis=(1, 2, 3))
    masks = None if slices.masks is None else slices.masks[keep]
    return dataclasses.replace(slices, images=slices.images[keep], masks=masks, index=slices.index[keep])


def in_head(
    case: SlicedCase,
    masks: np.ndarray,  # [S, h, w] bool
    maps: np.ndarray,  # [S, h, w]
) -> tuple[np.ndarray, np.ndarray]:  # [X, Y, Z] bool and float32
    """Mask and map on the case's grid, as they are written and measured: empty where the images show nothing."""
    return mask_volume(masks, case.slices) & case.head, map_volume(maps, case.slices) * case.head


def map_volume(
    maps: np.ndarray,  # [S, h, w]
    slices: CaseSlices,
) -> np.ndarray:  # [X, Y, Z] float32
    """Slice maps on the case's grid, reoriented, bilinear; zero where there was no slice."""
    return slices_to_volume(maps, slices.index, slices.shape)


def mask_volume(
    masks: np.ndarray,  # [S, h, w] bool
    slices: CaseSlices,
) -> np.ndarray:  # [X, Y, Z] bool
    """Slice masks on the case's grid: a voxel belongs to the lesion where the resized mask exceeds one half."""
    return slices_to_volume(masks.astype(np.float32), slices.index, slices.shape) > 0.5


def healthy_volume(
    healthy: np.ndarray,  # [S, h, w] in [-1, 1], one modality
    case: SlicedCase,
    channel: int,
) -> np.ndarray:  # [X, Y, Z] float32
    """The pseudo-healthy reconstruction of one modality in the file's own intensities; zero where there is no head."""
    images = case.slices.images[..., channel:channel + 1]
    normalised = from_model_range(healthy[..., None], images, case.scaling)[..., 0]
    return map_volume(normalised * case.slices.scales[channel], case.slices) * case.head

