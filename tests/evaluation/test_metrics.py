"""Metrics against golden values and manual counts, and cases in which they are undefined."""

import json

import numpy as np
import pytest
from exact_metrics import slice_metrics

from hae_jax.evaluation import metrics


@pytest.fixture(scope="module")
def slices(golden):
    """The golden masks after the component filter, as arguments of `slice_metrics`."""
    z = np.load(golden / "masks.npz")
    mask = z["mask_all_cc_filtered"][:, 0] > 0
    lesion = z["pred_label"] > 0
    return {
        "mask": mask & lesion[:, None, None], "mask_all": mask, "map": z["map"][:, 0], "lesion": lesion,
        "truth": z["lesion"][:, 0] > 0, "labels": z["label"],
        "foreground": metrics.foreground(np.moveaxis(z["source"], 1, -1)),
    }


@pytest.mark.parametrize(
    ("setting", "key"), [("all_slices", "metrics_cc_filtered"), ("lesion_slices", "metrics_unhealthy_only")])
def test_slice_metrics_golden(golden, slices, setting, key):
    z = np.load(golden / "masks.npz")
    found = slice_metrics(**slices)[setting]
    # The stored names are correct: precision is 1 (every predicted pixel is lesion), recall is not. The values were
    # computed in float32.
    for name, value in zip(z["metrics_names"], z[key], strict=True):
        assert found[str(name)] == pytest.approx(value, abs=1e-7), name


def test_slice_level_and_shares(slices):
    found = slice_metrics(**slices)
    # called lesion: 0, 1, 2, 3, 4; labels: 1, 1, 0, 1, 1, 0
    assert found["slice_level"] == {"accuracy": 5 / 6, "precision": 4 / 5, "recall": 1.0}
    assert found["shares"] == {"slices": 6, "healthy": 2 / 6, "called_lesion": 5 / 6}


def test_padding_never_enters(slices):
    rng = np.random.default_rng(0)
    padded = {name: np.concatenate([v, rng.permutation(v)[:3] if v.dtype == bool else v[:3] + 1])
              for name, v in slices.items()}
    valid = np.arange(9) < 6
    assert slice_metrics(**padded, valid=valid) == slice_metrics(**slices)
    assert slice_metrics(**padded) != slice_metrics(**slices)


def test_mixed_uses_gated_masks_and_unhealthy_all_masks(slices):
    missed = {**slices, "lesion": np.zeros(6, bool), "mask": np.zeros_like(slices["mask"])}
    found = slice_metrics(**missed)
    assert found["all_slices"]["dice"] == pytest.approx(2 / 6, abs=1e-6)  # the two healthy slices score 1
    assert found["all_slices"]["precision"] is None
    assert found["all_slices"]["recall"] == 0
    assert found["lesion_slices"] == slice_metrics(**slices)["lesion_slices"]
    assert found["slice_level"]["precision"] is None


def test_dice_and_iou_by_hand():
    predicted = np.zeros((4, 4, 4), bool)
    truth = np.zeros((4, 4, 4), bool)
    predicted[0, 0, :3] = True
    truth[0, 0, 1:] = True  # I = 2, P = Q = 3
    predicted[1, 0, 0] = True  # no lesion
    truth[2, 0, 0] = True  # an empty prediction; slice 3: both are empty
    np.testing.assert_allclose(metrics.dice(predicted, truth), [4 / 6, 0, 0, 1], atol=1e-5)
    np.testing.assert_allclose(metrics.iou(predicted, truth), [2 / 4, 0, 0, 1], atol=1e-5)
    shares = metrics.pixel_shares(metrics.counts(predicted, truth))
    assert (shares["precision"], shares["recall"]) == ((2, 4), (2, 4))
    predicted[3] = True
    shares = metrics.pixel_shares(metrics.counts(predicted, truth))
    assert (shares["precision"], shares["recall"]) == ((2, 20), (2, 4))


def test_auroc_counts_the_foreground_only():
    truth = np.zeros((1, 2, 4), bool)
    truth[0, 0, :2] = True
    anomaly = np.array([[[4.0, 2, 3, 1], [9, 9, 9, 9]]])
    head = np.array([[[True] * 4, [False] * 4]])
    arguments = {"mask": truth, "mask_all": truth, "map": anomaly, "lesion": np.array([True]), "truth": truth,
                 "labels": np.array([1])}
    found = slice_metrics(**arguments, foreground=head)["all_slices"]
    assert found["auroc"] == pytest.approx(3 / 4)  # of the four pairs, (2, 3) is in the wrong order
    assert found["auprc"] == pytest.approx((1 / 1 + 2 / 3) / 2)
    everywhere = slice_metrics(**arguments, foreground=np.ones_like(head))["all_slices"]
    assert everywhere["auroc"] < found["auroc"]


def test_foreground_is_strictly_above_the_limit():
    image = np.full((1, 1, 3, 4), -1, np.float32)
    image[0, 0, 1] = -0.95
    image[0, 0, 2, 0] = -0.7  # mean -0.925
    assert metrics.foreground(image).tolist() == [[[False, False, True]]]


def test_undefined_values_are_null(slices):
    healthy_only = {name: values[[2, 5]] for name, values in slices.items()}
    found = slice_metrics(**healthy_only)
    assert found["all_slices"]["dice"] == 1
    assert found["all_slices"]["recall"] is found["all_slices"]["auroc"] is found["all_slices"]["auprc"] is None
    assert set(found["lesion_slices"].values()) == {None}
    assert found["slice_level"]["recall"] is None
    nothing = slice_metrics(**slices, valid=np.zeros(6, bool))
    assert nothing["shares"] == {"slices": 0, "healthy": None, "called_lesion": None}
    json.dumps([found, nothing], allow_nan=False)


def test_soft_masks_are_refused(slices):
    with pytest.raises(TypeError, match="threshold a soft mask"):
        slice_metrics(**{**slices, "truth": slices["truth"].astype(np.float32)})


def test_every_name_has_a_definition(slices):
    found = slice_metrics(**slices)
    assert {*found, *found["all_slices"]} <= set(metrics.DEFINITIONS)


def test_volumes():
    mask = np.zeros((10, 10, 10), bool)
    assert metrics.volume_dice(mask, mask) == 1
    mask[:5] = True
    assert metrics.volume_dice(mask, ~mask) == pytest.approx(0, abs=1e-8)
    assert metrics.volume_dice(mask, np.ones_like(mask)) == pytest.approx(2 / 3)
    oblique = np.array([[0, -2, 0, 90], [1, 0, 0, 80], [0, 0, 3, 70], [0, 0, 0, 1.0]])  # 6 mm3 per voxel, flipped
    assert metrics.volume_ml(mask, oblique) == pytest.approx(3.0)
