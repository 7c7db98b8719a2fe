"""Metrics of masks and maps per volume, on the case's own grid, and their means over patients.

`metrics.py` has the metrics of slices. The functions take arrays only; `report.py` writes the results. An undefined
value is None and is not part of a mean. Each mean states its number of cases.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy import ndimage
from scipy.spatial import KDTree
from skimage import measure

from hae_jax.evaluation import metrics
from hae_jax.evaluation.bootstrap import RESAMPLES, share_of_sums

DEFINITIONS = {
    "cases": "cases: cases with a segmentation; lesion_cases: those with a lesion in it; healthy_cases: those without; "
             "missed_cases: lesion cases with an empty mask",
    "mean, low, high": "mean: mean over the cases that contribute ('cases'); low, high: its 95% interval (percentile "
                       f"bootstrap over patients, {RESAMPLES} resamples; a patient is drawn with all visits), null for "
                       "fewer than two patients",
    "dice": "volume Dice, mean over the lesion cases (an empty mask scores 0)",
    "iou": "volume IoU, mean over the lesion cases (an empty mask scores 0)",
    "hd95_mm": "95th percentile Hausdorff distance in mm: the larger of the two directed 95th percentiles of the "
               "distances between surface voxels of mask and ground truth; a surface voxel has one of its six "
               "neighbours outside. Undefined if mask or ground truth is empty, so the mean leaves out missed cases",
    "best_dice": "volume Dice at the best threshold on the map for each case, chosen with the ground truth (upper "
                 "bound); mean over the lesion cases",
    "lesions": "connected components of the ground truth in 3-D (26 neighbours), of any size; a lesion is found if at "
               "least one of its voxels is in the mask, and a component of the mask is false if none of its voxels is "
               "in the ground truth",
    "lesion_recall": "share of lesions that are found, pooled over all patients",
    "lesion_precision": "share of mask components that are not false, pooled over all patients",
    "lesion_f1": "2 lesions found / (2 lesions found + lesions not found + false components), pooled over all patients",
    "healthy_volume_ml": "false-positive volume in healthy subjects: volume of the mask in the healthy cases, mean",
    "healthy_volume_median_ml": "the median of healthy_volume_ml over the healthy cases",
    "healthy_false_lesions": "number of mask components in a healthy case, mean",
}


@dataclasses.dataclass(frozen=True)
class VolumeMetrics:
    """One patient's metrics; see `DEFINITIONS`. Every value is ready for JSON.

    Attributes:
      volume_ml: of the mask, in millilitres.
      true_volume_ml: of the truth.
      dice: 1 where both are empty.
      iou: 1 where both are empty.
      hd95_mm: None where either is empty.
      lesions: components of the truth.
      lesions_found: how many of them the mask touches.
      lesions_predicted: components of the mask.
      false_lesions: how many of them touch no lesion.
      best_dice: None without a map and for an empty truth.
      best_threshold: the mask is `map >= best_threshold`.
    """

    volume_ml: float
    true_volume_ml: float
    dice: float
    iou: float
    hd95_mm: float | None
    lesions: int
    lesions_found: int
    lesions_predicted: int
    false_lesions: int
    best_dice: float | None
    best_threshold: float | None


def volume_metrics(
    predicted: np.ndarray,  # [X, Y, Z] bool
    truth: np.ndarray,  # [X, Y, Z] bool
    affine: np.ndarray,  # [4, 4] voxels to mm
    anomaly: np.ndarray | None = None,  # [X, Y, Z] float
) -> VolumeMetrics:
    """Measures one patient.

    Raises:
      ValueError: if the volumes differ in shape.
    """
    if any(other.shape != truth.shape for other in (predicted, anomaly) if other is not None):
        raise ValueError(f"mask {predicted.shape}, truth {truth.shape} and map must be volumes of one shape")
    predicted, truth = metrics.as_bool(predicted), metrics.as_bool(truth)
    box = _bounding_box(predicted | truth)
    p, q = predicted[box], truth[box]
    lesions, found, components, false = _detection(p, q)
    best, threshold = (None, None) if anomaly is None else best_dice(anomaly, truth)
    return VolumeMetrics(
        volume_ml=metrics.volume_ml(p, affine),
        true_volume_ml=metrics.volume_ml(q, affine),
        dice=metrics.volume_dice(p, q),
        iou=float(metrics.iou(p[None], q[None])[0]),
        hd95_mm=hd95_mm(p, q, affine),
        lesions=lesions,
        lesions_found=found,
        lesions_predicted=components,
        false_lesions=false,
        best_dice=best,
        best_threshold=threshold,
    )


def hd95_mm(
    predicted: np.ndarray,  # [X, Y, Z] bool
    truth: np.ndarray,  # [X, Y, Z] bool
    affine: np.ndarray,  # [4, 4] voxels to mm
) -> float | None:
    """The robust Hausdorff distance of two masks in mm; None if either is empty.

    max(P95_a min_b |a - b|, P95_b min_a |a - b|) over the surface voxels a, b: the partial Hausdorff distance of
    Huttenlocher et al. 1993 at the 95th percentile. Distances are between voxel centres in scanner space, so that any
    spacing and any obliqueness counts.
    """
    a, b = (_surface_mm(metrics.as_bool(mask), affine) for mask in (predicted, truth))
    if not len(a) or not len(b):
        return None
    return max(float(np.percentile(_grid_tree(there).query(here)[0], 95)) for here, there in ((a, b), (b, a)))


def best_dice(
    anomaly: np.ndarray,  # [X, Y, Z] float
    truth: np.ndarray,  # [X, Y, Z] bool
) -> tuple[float | None, float | None]:
    """The highest Dice of a mask `anomaly >= threshold`, and the lowest threshold that gives it.

    Exact: between two neighbouring values of lesion voxels a lower threshold only adds false voxels, so the values of
    lesion voxels are all the candidates there are. None, None where nothing is true.
    """
    values = np.sort(anomaly[metrics.as_bool(truth)])
    if not len(values):
        return None, None
    candidates, first = np.unique(values, return_index=True)
    everywhere = np.sort(anomaly[anomaly >= candidates[0]])
    overlap = len(values) - first
    masked = len(everywhere) - np.searchsorted(everywhere, candidates)
    dice = 2 * overlap / (masked + len(values))
    best = int(np.argmax(dice))
    return float(dice[best]), float(candidates[best])


def lesion_count(mask: np.ndarray) -> int:
    """Connected components of a mask [X, Y, Z] in 3-D, 26 neighbours."""
    return _components(metrics.as_bool(mask))[1]


def summarise(
    cases: Sequence[VolumeMetrics], patients: Sequence[str] | None = None, seed: int = 0
) -> dict[str, dict[str, float | int | None] | float | None]:
    """All metrics of `DEFINITIONS` over several cases, ready for JSON.

    A metric is {"mean", "low", "high", "cases"}. Equal seeds draw equal patients, so that methods which were measured
    on the same cases in the same order are compared on the same resamples.

    Args:
      patients: whose case each is; None: each is another one's.
    """
    patients = list(map(str, range(len(cases)))) if patients is None else patients
    ill, healthy = ([(case, patient) for case, patient in zip(cases, patients, strict=True)
                     if bool(case.lesions) == kind] for kind in (True, False))

    def mean(of: Sequence[tuple[VolumeMetrics, str]], name: str) -> dict[str, float | int | None]:
        known = [(value, patient) for case, patient in of if (value := getattr(case, name)) is not None]
        values, whose = [value for value, _ in known], [patient for _, patient in known]
        return share_of_sums(values, np.ones(len(values)), whose, seed)

    found, lesions, components, false = (np.array([getattr(case, name) for case in cases], int) for name in (
        "lesions_found", "lesions", "lesions_predicted", "false_lesions"))
    return {
        "cases": len(cases),
        "lesion_cases": len(ill),
        "healthy_cases": len(healthy),
        "missed_cases": sum(case.lesions_predicted == 0 for case, _ in ill),
        **{name: mean(ill, name) for name in ("dice", "iou", "hd95_mm", "best_dice")},
        "lesion_recall": share_of_sums(found, lesions, patients, seed),
        "lesion_precision": share_of_sums(components - false, components, patients, seed),
        "lesion_f1": share_of_sums(2 * found, found + lesions + false, patients, seed),
        "healthy_volume_ml": mean(healthy, "volume_ml"),
        "healthy_volume_median_ml": float(np.median([case.volume_ml for case, _ in healthy])) if healthy else None,
        "healthy_false_lesions": mean(healthy, "lesions_predicted"),
    }


def paired_dice(
    cases: Sequence[VolumeMetrics], others: Sequence[VolumeMetrics], patients: Sequence[str], seed: int = 0
) -> dict[str, float | int | None]:
    """The mean volume Dice of the lesion cases minus that of another method on the same cases."""
    ill = [(a.dice - b.dice, patient) for a, b, patient in zip(cases, others, patients, strict=True) if a.lesions]
    return share_of_sums([value for value, _ in ill], np.ones(len(ill)), [patient for _, patient in ill], seed)


def _bounding_box(mask: np.ndarray) -> tuple[slice, ...]:
    """The bounding box of the mask; of size 0 if the mask is empty."""
    box = ndimage.find_objects(mask.astype(np.uint8))
    return box[0] if box else (slice(0, 0),) * mask.ndim


def _components(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """The component number of each voxel, and the number of components."""
    return measure.label(mask, connectivity=3, return_num=True) if mask.any() else (np.zeros(mask.shape, int), 0)


def _detection(predicted: np.ndarray, truth: np.ndarray) -> tuple[int, int, int, int]:
    """Numbers of lesions, of lesions found, of components of the mask, and of false components."""
    (true_labels, lesions), (labels, components) = _components(truth), _components(predicted)
    shared = predicted & truth
    return lesions, len(np.unique(true_labels[shared])), components, components - len(np.unique(labels[shared]))


def _surface_mm(mask: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """[N, 3] centres of the voxels of a mask that have one of their six neighbours outside of it."""
    surface = mask & ~ndimage.binary_erosion(mask)  # voxels beyond the volume count as outside
    return np.argwhere(surface) @ np.asarray(affine, float)[:3, :3].T


def _grid_tree(points: np.ndarray) -> KDTree:
    return KDTree(points, balanced_tree=False, compact_nodes=False)  # fastest to build for grid points
