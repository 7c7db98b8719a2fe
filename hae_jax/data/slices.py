"""Between volumes and slices: a case becomes normalised 2-D slices, and slices go back into the case's own space.

The arithmetic is that of the published PyTorch preparation, number for number. Stands between `cases` and `store`;
translation uses the same functions, so that a network never sees slices made in another way.
"""

import collections
import dataclasses
import random
import re
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import ndimage

from hae_jax.data.cases import Case
from hae_jax.errors import UserError

SPLITS = ("train", "val", "test")
PERCENTILE = 99.0  # of a modality's positive voxels; becomes intensity 1
MIN_SLICE_SUM = 0.5  # a slice whose modality-mean intensity sums to more than this shows brain
_VISIT = re.compile(r"(?<=^BraTS-...-\d{5})-\d{3}$")
_SUBJECT = re.compile(r"sub-[^_]+")  # BIDS: what follows tells sessions, runs and kinds of image
RANGE_EPSILON = 1e-5  # keeps the range of a constant slice finite
SCALINGS = ("slice", "volume")
VOLUME_RANGE = 1.5  # times the 99th percentile: with scaling "volume", this intensity and all above become 1


@dataclasses.dataclass(frozen=True)
class CaseSlices:
    """The slices of one case, bottom to top."""

    images: np.ndarray  # [S, H, W, C] float32; 0 is background, 1 the 99th percentile
    masks: np.ndarray | None  # [S, H, W] float32, soft where the lesion's border was resized
    index: np.ndarray  # [S] int32, position along the volume's axis 2
    shape: tuple[int, int, int] | None  # (X, Y, Z) of the volume; None where the source does not tell
    scales: np.ndarray | None = None  # [C] the raw intensity that is 1 in `images`; None where it is not known


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

    Axial means axis 2; axes 0 and 1 become H and W, not transposed. Kept are the slices from the first to the last that
    shows brain.

    Raises:
      UserError: no slice shows anything.
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
    """(x, y, z) mm between the pixels of slices of `size` x `size` and between slices; None where it is not known."""
    if affine is None or shape is None:
        return None
    x, y, z = np.linalg.norm(np.asarray(affine, float)[:3, :3], axis=0)
    return float(x * shape[0] / size), float(y * shape[1] / size), float(z)


def resize(
    images: np.ndarray,  # [..., H, W]
    size: int | tuple[int, int],
) -> np.ndarray:  # [..., h, w] float32
    """Bilinear resizing with half-pixel centres, clamped edges and no antialiasing, to (h, w) or a square.

    Equals PyTorch's `interpolate(mode="bilinear", align_corners=False)`.
    """
    height, width = (size, size) if isinstance(size, int) else size
    images = np.asarray(images, np.float32)
    *leading, old_height, old_width = images.shape
    factors = (height / old_height, width / old_width)
    # One image at a time: over a stack, SciPy interpolates along the leading axes too and takes twice as long.
    resized = np.empty((int(np.prod(leading)), height, width), np.float32)
    for image, out in zip(images.reshape(-1, old_height, old_width), resized, strict=True):
        ndimage.zoom(image, factors, output=out, order=1, mode="nearest", grid_mode=True)
    return resized.reshape(*leading, height, width)


def to_model_range(
    images: np.ndarray,  # [..., H, W, C] normalised by volume: 0 is background, 1 the 99th percentile
    scaling: str = "slice",
) -> np.ndarray:  # [..., H, W, C] float32
    """Scales slices to [-1, 1], what networks take.

    With "slice" (as published), each slice and channel by its own range: 2 (x - min) / (max - min + 1e-5) - 1; a
    constant one becomes -1. A bright lesion then darkens the rest of its slice. With "volume", all slices of a case
    alike: 2 x / 1.5 - 1, clipped.

    Raises:
      UserError: another scaling.
    """
    if scaling not in SCALINGS:
        raise UserError(f"data.scaling is {scaling!r}: choose slice or volume")
    images = np.asarray(images, np.float32)
    if scaling == "volume":
        return np.clip(images * np.float32(2 / VOLUME_RANGE) - 1, -1, 1)
    # One axis after the other: NumPy is several times slower over both at once, with so few channels innermost.
    low = images.min(axis=-3, keepdims=True).min(axis=-2, keepdims=True)
    high = images.max(axis=-3, keepdims=True).max(axis=-2, keepdims=True)
    scaled = images - low  # then in place: this runs on every batch of training
    scaled /= high - low + np.float32(RANGE_EPSILON)
    scaled *= 2
    scaled -= 1
    return scaled


def from_model_range(
    scaled: np.ndarray,  # [..., H, W, C] in [-1, 1]
    images: np.ndarray,  # [..., H, W, C] what `to_model_range` was given when the range was set
    scaling: str = "slice",
) -> np.ndarray:  # [..., H, W, C] float32
    """The inverse of `to_model_range`, into the range of other slices' intensities."""
    if scaling == "volume":
        return ((scaled + 1) / 2 * VOLUME_RANGE).astype(np.float32)
    low = images.min(axis=(-3, -2), keepdims=True)
    high = images.max(axis=(-3, -2), keepdims=True)
    return ((scaled + 1) / 2 * (high - low + RANGE_EPSILON) + low).astype(np.float32)


def slices_to_volume(
    values: np.ndarray,  # [S, h, w]
    index: np.ndarray,  # [S] positions along axis 2
    shape: tuple[int, int, int],  # (X, Y, Z)
) -> np.ndarray:  # [X, Y, Z] float32
    """Puts slices back on the case's grid: bilinear to X x Y, zero where there was no slice.

    A mask goes the same way as 0 and 1, and is thresholded afterwards at > 0.5.
    """
    volume = np.zeros(shape, np.float32)
    volume[:, :, index] = resize(values, tuple(shape[:2])).transpose(1, 2, 0)
    return volume


def split_patients(
    names: Sequence[str], train_fraction: float = 0.75, val_fraction: float = 0.05, seed: int = 10,
    patient: Mapping[str, str | None] | None = None,
) -> dict[str, list[str]]:
    """Splits patients as published: sorted names, shuffled, then int(train_fraction n), int(val_fraction n), the rest.

    All visits of a patient come into one split. The defaults need 20 patients to give one for validation. Fewer are not
    rearranged silently: the error names the option to set.

    Args:
      names: of the cases.
      train_fraction: share of the patients.
      val_fraction: share of the patients.
      seed: of the order.
      patient: whose each case is; where it does not say, the case's name does (`patient_of`).

    Returns:
      {"train": [...], "val": [...], "test": [...]} in shuffled order, without overlap. `test` may be empty.

    Raises:
      UserError: a fraction is out of range, or leaves train or val without a patient.
    """
    if not (train_fraction > 0 and val_fraction > 0 and train_fraction + val_fraction <= 1 + 1e-9):
        raise UserError(f"train_fraction {train_fraction} and val_fraction {val_fraction}: both must be greater than 0 "
                        "and their sum at most 1")
    visits = collections.defaultdict(list)
    for name in sorted(names):
        visits[(patient or {}).get(name) or patient_of(name)].append(name)
    patients = sorted(visits)
    if len(patients) < 2:
        raise UserError(f"{len(patients)} case(s) cannot be split; at least one to train on and one to validate is "
                        "needed")
    n_train, n_val = int(train_fraction * len(patients)), int(val_fraction * len(patients))
    for split, count, fraction in (("train", n_train, train_fraction), ("val", n_val, val_fraction)):
        if count == 0:
            needed = int(1000 / len(patients) + 1) / 1000  # rounded up, so that it suffices as printed
            raise UserError(f"{len(patients)} cases with {split}_fraction {fraction} leave none in {split}; "
                            f"set --{split}-fraction to {needed:.3f} or more, or add cases")
    order = list(range(len(patients)))
    random.Random(seed).shuffle(order)
    bounds = {"train": order[:n_train], "val": order[n_train:n_train + n_val], "test": order[n_train + n_val:]}
    return {split: [name for i in chosen for name in visits[patients[i]]] for split, chosen in bounds.items()}


def patient_of(name: str) -> str:
    """The patient that a case is of: several visits of one are told apart by BraTS 2023 and BIDS names."""
    subject = _SUBJECT.match(name)
    return subject.group() if subject else _VISIT.sub("", name)
