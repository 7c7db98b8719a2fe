"""Checks whether a case was skull-stripped and whether its images were registered to each other.

`cases.read_case` runs the checks. They can be wrong. A case that fails them is therefore used, with a warning.
"""

import numpy as np

from hae_jax.data.case_warning import CaseWarning

FIELD_OF_VIEW_MM = 100.0  # along each axis; smaller volumes do not show a whole head and are not checked
ZEROS = 0.2  # lowest share of zero voxels in a skull-stripped volume, also if it is cropped to the brain
BRAIN_LITRES = 2.5  # largest volume of a skull-stripped head; brains have 1 to 2
OVERLAP = 0.85  # lowest Dice of the non-zero voxels of two registered images

_DO = "docs/data.md, From raw scans, has the commands"


def preprocessing_signs(
    volumes: np.ndarray,  # [X, Y, Z, C] raw intensities
    affine: np.ndarray,  # [4, 4] voxel -> mm
    modalities: tuple[str, ...],  # [C]
) -> tuple[CaseWarning, ...]:
    """Warnings, one line each, with the sign that was found; none for a case without signs."""
    shape, voxel = volumes.shape[:3], np.linalg.norm(affine[:3, :3], axis=0)
    if (np.array(shape) * voxel < FIELD_OF_VIEW_MM).any():
        return ()
    covered = volumes != 0
    return (*_skull(covered, voxel), *_shifted(covered, modalities))


def _skull(covered: np.ndarray, voxel: np.ndarray) -> list[CaseWarning]:
    """Warns of a case that is not skull-stripped: its background has noise instead of zeros, or it is too large."""
    zeros = 1 - covered.mean(axis=(0, 1, 2)).max()
    litres = covered.any(axis=-1).sum() * voxel.prod() / 1e6
    if zeros < ZEROS:
        return [CaseWarning("does not look skull-stripped: only {:.0%} of the voxels are 0, where the background of a "
                      f"skull-stripped image is 0; {_DO}", zeros)]
    if litres > BRAIN_LITRES:
        return [CaseWarning("does not look skull-stripped: its voxels above 0 have {:.1f} litres; a brain has 1 to 2; "
                      f"{_DO}", litres)]
    return []


def _shifted(covered: np.ndarray, modalities: tuple[str, ...]) -> list[CaseWarning]:
    """Warns of images that are not registered. Registered images with one brain mask cover the same voxels."""
    size = covered.sum(axis=(0, 1, 2))
    if len(size) < 2 or (size == 0).any():
        return []
    overlaps = [2 * np.count_nonzero(covered[..., 0] & covered[..., c]) / (size[0] + size[c])
                for c in range(1, len(size))]
    worst = int(np.argmin(overlaps))
    if overlaps[worst] >= OVERLAP:
        return []
    return [CaseWarning(f"does not look registered: {{}} and {{}} cover different voxels (Dice {{:.2f}}); {_DO}",
                  modalities[0], modalities[worst + 1], overlaps[worst])]
