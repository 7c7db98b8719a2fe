"""A picture of a phantom, and the Dice of the best intensity threshold, a baseline for every method."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hae_jax.data.cases import MODALITIES, CaseFiles, find_cases, read_case
from hae_jax.errors import UserError
from hae_jax.files import written_whole

_BINS, _TOP = 1500, 3.0  # thresholds tried: multiples of 0.002 of the volume's 99th percentile


@dataclass(frozen=True)
class ThresholdScore:
    """Volume Dice of intensity thresholds over the cases with a lesion.

    names, volumes_ml, common_dice, own_dice: one entry per case. common_threshold: the threshold with the best mean
    over all cases. own_dice: at the best threshold of each case. It needs the segmentation and is an upper bound.
    """

    names: tuple[str, ...]
    volumes_ml: np.ndarray
    common_threshold: float
    common_dice: np.ndarray
    own_dice: np.ndarray


def best_threshold(folder: str | os.PathLike, modality: str = "flair", dark: bool = False) -> ThresholdScore:
    """Scores thresholds on a modality / (99th percentile of its positive voxels) against any lesion label.

    Args:
      folder: folder of cases.
      modality: modality to threshold.
      dark: True: voxels below the threshold are lesion; False: voxels above it.

    Raises:
      UserError: no cases in `folder`, or none with a lesion.
    """
    names, volumes, curves = [], [], []
    for files in find_cases(folder, (modality,)):
        case = read_case(files)
        if case.mask is not None and case.mask.any():
            names.append(case.name)
            volumes.append(case.mask.sum() * abs(np.linalg.det(case.affine[:3, :3])) / 1000)
            curves.append(_dice_curve(case.volumes[..., 0], case.mask, dark))
    if not curves:
        raise UserError(f"{folder}: no case has a segmentation with a lesion; give cases that do")
    dice = np.stack(curves)  # [cases, thresholds]
    best = int(np.argmax(dice.mean(axis=0)))
    return ThresholdScore(tuple(names), np.array(volumes), best * _TOP / _BINS, dice[:, best], dice.max(axis=1))


def _dice_curve(image: np.ndarray, mask: np.ndarray, dark: bool) -> np.ndarray:
    """Dice of (image >= threshold) for all thresholds [bins], from the histograms inside and outside the lesion.

    For dark lesions: of (image < threshold), among positive voxels.
    """
    positive = image > 0
    value = np.clip(image[positive] / np.percentile(image[positive], 99), 0, _TOP * (1 - 1e-6))
    index = (value * (_BINS / _TOP)).astype(int)
    found = np.cumsum(np.bincount(index, minlength=_BINS)[::-1])[::-1]
    hit = np.cumsum(np.bincount(index[mask[positive]], minlength=_BINS)[::-1])[::-1]
    if dark:
        found, hit = found[0] - found, hit[0] - hit
    return 2 * hit / (found + mask.sum())


def draw_phantom(
    folder: str | os.PathLike, output: str | os.PathLike, modalities: Sequence[str] = MODALITIES, *, subjects: int = 5
) -> Path:
    """Draws up to `subjects` subjects, one per row: the modalities on one axial slice, then the outlined lesion.

    The slice is the one with the largest lesion area, or the middle one in a healthy subject. The last row is the first
    healthy subject, if there is one.

    Raises:
      UserError: no cases in `folder`.
    """
    from matplotlib.figure import Figure  # here, since it is slow to import; not pyplot, whose backend may be absent

    rows = _rows(find_cases(folder, modalities), subjects)
    titles = (*modalities, f"{modalities[0]} + segmentation")
    figure = Figure(figsize=(2 * len(titles), 2.35 * len(rows) + 0.35), facecolor="black", layout="constrained")
    axes = figure.subplots(len(rows), len(titles), squeeze=False)
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, color="white", fontsize=9)
    for line, (name, images, mask) in zip(axes, rows, strict=True):
        for axis, image in zip(line, [*images, images[0]], strict=True):
            axis.imshow(image, cmap="gray", vmin=0, vmax=1.1, interpolation="bilinear")
            axis.set_axis_off()
        line[0].text(0.01, 0.02, name, color="white", fontsize=7, transform=line[0].transAxes)
        if mask.any():
            line[-1].contour(mask, levels=[0.5], colors=["#ffb000"], linewidths=0.8)
    figure.suptitle("Phantom figure: template anatomy,\ndrawn lesions, no patient", color="white", fontsize=9)
    with written_whole(output) as temporary:
        figure.savefig(temporary, dpi=110, facecolor="black")
    return Path(output)


def _rows(cases: list[CaseFiles], count: int) -> list[tuple[str, np.ndarray, np.ndarray]]:
    ill, healthy = [], []
    for files in cases:
        row = _row(files)
        (ill if row[2].any() else healthy).append(row)
        if len(ill) >= count - 1 and healthy:
            break
    return ill[: count - len(healthy[:1])] + healthy[:1]


def _row(files: CaseFiles) -> tuple[str, np.ndarray, np.ndarray]:
    """Name, images [M, y, x] and lesion mask [y, x] of the slice to show, front of the head up, cropped to the head."""
    case = read_case(files)
    mask = case.mask if case.mask is not None else np.zeros(case.volumes.shape[:3], bool)
    area = mask.sum(axis=(0, 1))
    k = int(np.argmax(area)) if area.any() else len(area) // 2
    scale = [np.percentile(v[v > 0], 99.5) for v in np.moveaxis(case.volumes, -1, 0)]
    head = np.argwhere(case.volumes[..., 0].any(axis=2))
    (x0, y0), (x1, y1) = head.min(axis=0), head.max(axis=0) + 1
    images = np.moveaxis(case.volumes[x0:x1, y0:y1, k] / scale, -1, 0)
    return case.name, images.transpose(0, 2, 1), mask[x0:x1, y0:y1, k].T
