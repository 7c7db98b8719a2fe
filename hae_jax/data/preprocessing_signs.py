"""Signs that a case was not skull-stripped, or that its images were not registered to each other.

`cases.read_case` looks for them. They are signs and no proof: a case with them is used all the same, with a warning.
"""

import numpy as np

from hae_jax.data.case_warning import CaseWarning

FIELD_OF_VIEW_MM = 100.0  # along each axis; smaller volumes are no whole head, and nothing is said about them
ZEROS = 0.2  # share of voxels that are 0 in a skull-stripped volume, at least; also where it is cropped to the brain
BRAIN_LITRES = 2.5  # what a skull-stripped head encloses, at most; brains have 1 to 2
OVERLAP = 0.85  # Dice of what two registered images cover, at least

_DO = "docs/data.md, From raw scans, has the commands"


def preprocessing_signs(
    volumes: np.ndarray,  # [X, Y, Z, C] raw intensities
    affine: np.ndarray,  # [4, 4] voxel -> mm
    modalities: tuple[str, ...],  # [C]
) -> tuple[CaseWarning, ...]:
    """Warnings, one line each, with the sign that was seen; none for a case that looks as it should."""
    shape, voxel = volumes.shape[:3], np.linalg.norm(affine[:3, :3], axis=0)
    if (np.array(shape) * voxel < FIELD_OF_VIEW_MM).any():
        return ()
    covered = volumes != 0
    return (*_skull(covered, voxel), *_shifted(covered, modalities))


def _skull(covered: np.ndarray, voxel: np.ndarray) -> list[CaseWarning]:
    """Raw scans have noise where skull-stripped ones have zeros, and a head is larger than a brain."""
    zeros = 1 - covered.mean(axis=(0, 1, 2)).max()
    litres = covered.any(axis=-1).sum() * voxel.prod() / 1e6
    if zeros < ZEROS:
        return [CaseWarning("does not look skull-stripped: only {:.0%} of the voxels are 0, where the background of a "
                      f"skull-stripped image is 0; {_DO}", zeros)]
    if litres > BRAIN_LITRES:
        return [CaseWarning("does not look skull-stripped: what is not 0 has {:.1f} litres, and a brain has 1 to 2; "
                      f"{_DO}", litres)]
    return []


def _shifted(covered: np.ndarray, modalities: tuple[str, ...]) -> list[CaseWarning]:
    """Registered images of one brain, with one brain mask, cover the same voxels."""
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
