"""Per-patient metrics against manual counts and brute force, and cases in which they are undefined."""

import dataclasses
import json
import time

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from hae_jax.evaluation import metrics, volumes

ANISOTROPIC = np.diag([0.5, 1.0, 4.0, 1.0])


def _boxes(*boxes, shape=(20, 16, 12)):
    """A mask that is true in the given boxes: ((x0, x1), (y0, y1), (z0, z1))."""
    mask = np.zeros(shape, bool)
    for box in boxes:
        mask[tuple(slice(*ends) for ends in box)] = True
    return mask


LEFT = ((1, 5), (1, 4), (1, 3))  # 24 voxels
RIGHT = ((12, 14), (10, 12), (6, 8))  # 8 voxels
STRAY = ((18, 20), (0, 1), (10, 12))  # 4 voxels, at the volume's border


def _blobs(seed, quantile):
    rng = np.random.default_rng(seed)
    coarse = rng.random((5, 4, 3))
    return np.kron(coarse, np.ones((4, 4, 4))) > quantile


def test_two_lesions_one_found_one_false():
    truth, predicted = _boxes(LEFT, RIGHT), _boxes(((3, 7), (1, 4), (1, 3)), STRAY)
    found = volumes.volume_metrics(predicted, truth, ANISOTROPIC)
    assert (found.lesions, found.lesions_found, found.lesions_predicted, found.false_lesions) == (2, 1, 2, 1)
    assert found.dice == pytest.approx(2 * 12 / (28 + 32))
    assert found.iou == pytest.approx(12 / 48)
    assert (found.volume_ml, found.true_volume_ml) == pytest.approx((28 * 2 / 1000, 32 * 2 / 1000))
    assert found.best_dice is found.best_threshold is None
    json.dumps(dataclasses.asdict(found), allow_nan=False)


def test_lesions_are_counted_as_the_definition_says():
    def detected(predicted, truth):
        found = volumes.volume_metrics(predicted, truth, np.eye(4))
        return found.lesions, found.lesions_found, found.lesions_predicted, found.false_lesions

    corner = _boxes(((0, 2), (0, 2), (0, 2)), ((2, 4), (2, 4), (2, 4)))
    assert volumes.lesion_count(corner) == 1  # the boxes touch in a corner
    assert volumes.lesion_count(_boxes(((0, 2), (0, 2), (0, 2)), ((3, 4), (2, 4), (2, 4)))) == 2
    assert detected(_boxes(((4, 5), (3, 4), (2, 3))), _boxes(LEFT)) == (1, 1, 1, 0)  # one voxel is enough
    assert detected(_boxes(((5, 6), (1, 4), (1, 3))), _boxes(LEFT)) == (1, 0, 1, 1)  # a voxel beside it is not enough
    everything = np.ones((20, 16, 12), bool)
    assert detected(everything, _boxes(LEFT, RIGHT)) == (2, 2, 1, 0)  # one component may find several lesions
    assert detected(_boxes(((1, 2), (1, 4), (1, 3)), ((4, 5), (1, 4), (1, 3))), _boxes(LEFT)) == (1, 1, 2, 0)


def _brute_hd95(predicted, truth, affine):
    """Compares all pairs of surface voxels. The surface is found by checking the six neighbours one by one."""
    def surface(mask):
        padded = np.pad(mask, 1)
        steps = [np.roll(padded, step, axis) for axis in range(3) for step in (-1, 1)]
        return np.argwhere(padded & ~np.all(steps, axis=0)) @ affine[:3, :3].T

    distances = cdist(surface(predicted), surface(truth))
    return max(np.percentile(distances.min(axis=axis), 95) for axis in (0, 1))


def _oblique():
    turn = np.linalg.qr(np.random.default_rng(5).standard_normal((3, 3)))[0]
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = turn @ np.diag([0.5, -1.0, 4.0]), (90, -70, 30)
    return affine


@pytest.mark.parametrize("seed", range(4))
def test_hd95_brute_force(seed):
    predicted, truth = _blobs(seed, 0.6), _blobs(seed + 100, 0.8)
    expected = _brute_hd95(predicted, truth, ANISOTROPIC)
    assert volumes.hd95_mm(predicted, truth, ANISOTROPIC) == pytest.approx(expected)
    assert volumes.hd95_mm(truth, predicted, ANISOTROPIC) == pytest.approx(expected)
    assert volumes.volume_metrics(predicted, truth, ANISOTROPIC).hd95_mm == pytest.approx(expected)
    assert volumes.hd95_mm(predicted, truth, _oblique()) == pytest.approx(expected)  # the spacing is the same


def test_hd95_by_hand():
    cube = _boxes(((4, 8), (4, 8), (4, 8)))
    assert volumes.hd95_mm(cube, cube, ANISOTROPIC) == 0
    plate = _boxes(((2, 18), (2, 14), (3, 4)))
    assert volumes.hd95_mm(plate, np.roll(plate, 2, axis=2), ANISOTROPIC) == 8  # two slices of 4 mm
    far = plate.copy()
    far[19, 15, 11] = True  # one of 193 voxels is not among the 95%
    assert volumes.hd95_mm(far, plate, ANISOTROPIC) == 0


def test_the_field_of_view_does_not_matter():
    truth, predicted = _boxes(LEFT, RIGHT), _boxes(((3, 7), (1, 4), (1, 3)), STRAY)
    anomaly = np.random.default_rng(0).random(truth.shape).astype(np.float32)
    wider = [np.pad(values, ((3, 9), (0, 5), (7, 2))) for values in (predicted, truth)]
    assert volumes.volume_metrics(*wider, ANISOTROPIC, np.pad(anomaly, ((3, 9), (0, 5), (7, 2)))) == \
        volumes.volume_metrics(predicted, truth, ANISOTROPIC, anomaly)


def test_empty_masks_have_a_stated_meaning():
    nothing, lesion = _boxes(), _boxes(LEFT)
    anomaly = np.ones(lesion.shape, np.float32)
    both = volumes.volume_metrics(nothing, nothing, ANISOTROPIC, anomaly)
    assert (both.dice, both.iou, both.hd95_mm, both.best_dice, both.best_threshold) == (1, 1, None, None, None)
    assert (both.lesions, both.lesions_found, both.lesions_predicted, both.false_lesions) == (0, 0, 0, 0)
    missed = volumes.volume_metrics(nothing, lesion, ANISOTROPIC, anomaly)
    assert (missed.hd95_mm, missed.lesions, missed.lesions_found) == (None, 1, 0)
    assert missed.dice == pytest.approx(0, abs=1e-6)
    invented = volumes.volume_metrics(lesion, nothing, ANISOTROPIC, anomaly)
    assert (invented.hd95_mm, invented.lesions_predicted, invented.false_lesions) == (None, 1, 1)


@pytest.mark.parametrize("seed", range(3))
def test_best_dice_brute_force(seed):
    rng = np.random.default_rng(seed)
    truth = _blobs(seed, 0.8)
    # Few distinct values and many zeros, as in a map, so that there are ties.
    anomaly = np.maximum(np.round(rng.random(truth.shape) + 0.4 * truth - 0.3, 2), 0).astype(np.float32)
    tried = {float(t): metrics.volume_dice(anomaly >= t, truth) for t in np.unique(anomaly)}
    dice, threshold = volumes.best_dice(anomaly, truth)
    assert dice == pytest.approx(max(tried.values()), abs=1e-8)
    assert metrics.volume_dice(anomaly >= threshold, truth) == pytest.approx(dice, abs=1e-8)
    assert threshold == min(t for t, found in tried.items() if found > dice - 1e-8)
    measured = volumes.volume_metrics(truth, truth, np.eye(4), anomaly)
    assert (measured.best_dice, measured.best_threshold) == (dice, threshold)


def test_best_dice_of_maps_that_say_all_or_nothing():
    truth = _boxes(LEFT)
    assert volumes.best_dice(truth * 0.7, truth) == (1, 0.7)
    flat = volumes.best_dice(np.zeros(truth.shape), truth)
    assert flat == (pytest.approx(2 * 24 / (24 + truth.size)), 0)
    assert volumes.best_dice(np.zeros(truth.shape), truth.astype(np.uint8)) == flat


def test_what_does_not_fit_is_refused():
    mask = _boxes(LEFT)
    with pytest.raises(ValueError, match="one shape"):
        volumes.volume_metrics(mask[1:], mask, np.eye(4))
    with pytest.raises(ValueError, match="one shape"):
        volumes.volume_metrics(mask, mask, np.eye(4), np.zeros((20, 16, 1)))
    with pytest.raises(TypeError, match="threshold a soft mask"):
        volumes.volume_metrics(mask.astype(np.float32), mask, np.eye(4))


def _patient(dice=0.5, hd95=3.0, lesions=1, found=1, predicted=1, false=0, ml=2.0):
    return volumes.VolumeMetrics(ml, 1.0, dice, dice / 2, hd95, lesions, found, predicted, false, dice, 0.1)


@pytest.mark.filterwarnings("error")
def test_summary_by_hand():
    patients = [_patient(0.8, 2.0, lesions=3, found=2, predicted=4, false=2), _patient(0.4, 6.0),
                _patient(0.0, None, found=0, predicted=0, ml=0.0),
                _patient(1.0, None, lesions=0, found=0, predicted=0, ml=0.0),
                _patient(0.0, None, lesions=0, found=0, predicted=2, false=2, ml=5.0)]
    found = volumes.summarise(patients)
    assert (found["cases"], found["lesion_cases"], found["healthy_cases"], found["missed_cases"]) == (5, 3, 2, 1)
    assert (found["dice"]["mean"], found["dice"]["cases"]) == (pytest.approx(0.4), 3)  # without the healthy ones
    assert (found["hd95_mm"]["mean"], found["hd95_mm"]["cases"]) == (4, 2)
    assert found["lesion_recall"]["mean"] == 3 / 5
    assert found["lesion_precision"]["mean"] == 3 / 7  # false lesions of healthy patients count
    assert found["lesion_f1"]["mean"] == 2 * 3 / (2 * 3 + 2 + 4)
    assert (found["healthy_volume_ml"]["mean"], found["healthy_false_lesions"]["mean"]) == (2.5, 1)
    for name in ("dice", "lesion_recall", "lesion_precision", "lesion_f1", "healthy_volume_ml"):
        assert found[name]["low"] < found[name]["mean"] < found[name]["high"], name
    assert found["lesion_f1"]["cases"] == 5
    json.dumps(found, allow_nan=False)


def test_interval_covers_and_is_seeded():
    rng = np.random.default_rng(0)
    samples = rng.beta(4, 2, (60, 40))  # mean 2/3
    intervals = [volumes.summarise([_patient(dice) for dice in sample])["dice"] for sample in samples]
    covered = np.mean([interval["low"] <= 2 / 3 <= interval["high"] for interval in intervals])
    assert 0.85 <= covered <= 0.99
    widths = np.array([interval["high"] - interval["low"] for interval in intervals])
    np.testing.assert_allclose(widths.mean(), 2 * 1.96 * np.sqrt(2 / 63 / 40), rtol=0.1)  # variance of Beta(4, 2): 2/63

    patients = [_patient(dice) for dice in samples[0]]
    assert volumes.summarise(patients, seed=3) == volumes.summarise(patients, seed=3)
    assert volumes.summarise(patients, seed=3) != volumes.summarise(patients, seed=4)


def test_intervals_resample_patients_not_lesions():
    # One patient has all missed lesions. Draws have it never or often, so the interval is wide.
    patients = [_patient(lesions=50, found=0, predicted=1, false=1)] + [_patient(lesions=5, found=5, predicted=5)] * 9
    recall = volumes.summarise(patients)["lesion_recall"]
    assert recall["mean"] == 45 / 95
    assert recall["high"] == 1
    assert recall["low"] < 0.25


@pytest.mark.filterwarnings("error")
def test_too_few_patients_have_no_interval():
    nobody = volumes.summarise([])
    undefined = {"mean": None, "low": None, "high": None, "cases": 0}
    assert nobody["cases"] == 0
    assert nobody["dice"] == nobody["lesion_f1"] == nobody["healthy_volume_ml"] == undefined
    alone = volumes.summarise([_patient(0.7)])
    assert alone["dice"] == {"mean": 0.7, "low": None, "high": None, "cases": 1}
    assert alone["lesion_recall"] == {"mean": 1, "low": None, "high": None, "cases": 1}
    equal = volumes.summarise([_patient(0.7), _patient(0.7)])
    assert [equal["dice"][end] for end in ("low", "mean", "high")] == pytest.approx([0.7] * 3)
    nothing = volumes.summarise([_patient(1.0, None, lesions=0, found=0, predicted=0)] * 3)
    assert all(nothing[name]["mean"] is None for name in ("lesion_recall", "lesion_precision", "lesion_f1"))
    # Draws with the healthy patient three times have no recall. The interval is from the other draws.
    rarely = volumes.summarise([_patient(), _patient(), _patient(lesions=0, found=0, predicted=0)])["lesion_recall"]
    assert (rarely["low"], rarely["high"]) == (1, 1)
    json.dumps([nobody, alone, equal, nothing], allow_nan=False)


def test_every_name_has_a_definition():
    explained = " ".join([*volumes.DEFINITIONS, *volumes.DEFINITIONS.values()])
    assert [name for name in volumes.summarise([]) if name not in explained] == []


def test_a_case_of_full_size_takes_seconds_not_minutes():
    x = np.indices((240, 240, 155), np.float32, sparse=True)
    truth = sum((axis - centre) ** 2 for axis, centre in zip(x, (100, 120, 80), strict=True)) < 28**2
    anomaly = np.random.default_rng(0).random(truth.shape, np.float32) + truth
    clock = time.monotonic()
    found = volumes.volume_metrics(anomaly > 0.99, truth, ANISOTROPIC, anomaly)  # thousands of stray voxels
    assert found.lesions_found == 1
    assert time.monotonic() - clock < 20
