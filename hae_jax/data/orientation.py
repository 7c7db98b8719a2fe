"""Reorientation of volumes to LPS and back to the axes of their file.

Volumes are reoriented to LPS (axes towards left, posterior, superior). This is the orientation of BraTS, on which the
published networks were trained. Axes are only swapped and flipped, and nothing is resampled. An oblique image is
assigned to the closest axes. `Grid.restore` is the exact inverse. `cases` uses this module for input, translation for
output.
"""

import dataclasses
import functools

import nibabel as nib
import numpy as np
from nibabel import orientations

ORIENTATION = "LPS"


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
