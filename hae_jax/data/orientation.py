"""Between a file's own axes and the ones that slices are cut along.

Volumes are turned to LPS (axes towards left, posterior, superior), the orientation of BraTS and hence of what the
published networks were trained on. Only axes are swapped and flipped, nothing is resampled: an oblique image goes to
the closest axes, and `Grid.restore` undoes it exactly. Used by `cases`, and by translation on the way out.
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
        """[3, 2], for each axis of the file: where it goes in LPS, and whether it keeps (1) or turns (-1) its way."""
        return orientations.ornt_transform(orientations.io_orientation(self.affine),
                                           orientations.axcodes2ornt(ORIENTATION))

    @property
    def reoriented_affine(self) -> np.ndarray:  # [4, 4]
        """Voxel -> mm of what `reorient` returns."""
        return self.affine @ orientations.inv_ornt_aff(self.transform, self.shape)

    @property
    def reoriented_shape(self) -> tuple[int, int, int]:
        """Shape of what `reorient` returns."""
        shape = [0, 0, 0]
        for size, axis in zip(self.shape, self.transform[:, 0], strict=True):
            shape[int(axis)] = size
        return shape[0], shape[1], shape[2]

    def reorient(
        self,
        values: np.ndarray,  # [X, Y, Z] in the file's axes
    ) -> np.ndarray:  # the same voxels in LPS; a view
        """Turns a volume to LPS."""
        return orientations.apply_orientation(values, self.transform)

    def restore(
        self,
        values: np.ndarray,  # [X', Y', Z'] in LPS
    ) -> np.ndarray:  # [X, Y, Z] in the file's axes
        """Turns a volume back into the file's axes; `reorient` undone."""
        back = orientations.ornt_transform(orientations.axcodes2ornt(ORIENTATION),
                                           orientations.io_orientation(self.affine))
        return np.ascontiguousarray(orientations.apply_orientation(values, back))
