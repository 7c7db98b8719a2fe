"""Calibration against the golden values, its properties, and what it says to wrong input."""

import json

import numpy as np
import pytest

from hae_jax.errors import UserError
from hae_jax.localization import calibration
from hae_jax.localization.calibration import Calibration, calibrate, similarity


@pytest.fixture(scope="module")
def curves(golden):
    """mse, ref, diff [B, T, M] of the golden stacks, and the labels [B]."""
    z = np.load(golden / "masks.npz")
    x = z["source"][:, None, [0, 3]].astype(np.float64)  # B, 1, M, H, W
    g, r = z["xstart"].astype(np.float64), z["xstart_null"].astype(np.float64)
    return (*(((a - b) ** 2).mean(axis=(-2, -1)) for a, b in ((g, x), (r, x), (g, r))), z["label"])


def test_calibrate_golden(golden, curves):
    z = np.load(golden / "masks.npz")
    found = calibrate(*curves, modality=(0, 3))
    # float32 sums there, float64 here
    assert found.threshold == pytest.approx(float(z["thr_01"]), abs=1e-7)
    np.testing.assert_allclose(found.diff_max, z["diff_max"], rtol=1e-6)
    np.testing.assert_allclose(found.diff_min, z["diff_min"], rtol=1e-6)
    assert found.errors == int(z["n_min"])
    assert (found.healthy_slices, found.lesion_slices) == (2, 4)


def test_float32_curves_give_the_same(curves):
    *arrays, labels = curves
    exact = calibrate(*arrays, labels, modality=(0, 3))
    rounded = calibrate(*(a.astype(np.float32) for a in arrays), labels, modality=(0, 3))
    assert rounded.threshold == pytest.approx(exact.threshold, abs=1e-7)


def test_padding_does_not_count(curves):
    *arrays, labels = curves
    exact = calibrate(*arrays, labels, modality=(0, 3))
    padded = [np.concatenate([a, 9 * a[:2]]) for a in arrays]
    valid = np.arange(len(labels) + 2) < len(labels)
    assert calibrate(*padded, np.append(labels, [1, 0]), modality=(0, 3), valid=valid) == exact


def test_similarity_is_the_clamped_cosine_over_time(rng):
    mse, ref = rng.random((2, 3, 7, 2))
    mse[2] = 0
    s = similarity(mse, ref)
    a, b = mse.mean(-1), ref.mean(-1)
    for i in range(2):
        assert s[i] == pytest.approx(a[i] @ b[i] / np.sqrt((a[i] @ a[i]) * (b[i] @ b[i])))
    assert s[2] == 0
    # norms below 1e-6 are raised to it: two equal curves of norm 1e-7 have s = 0.01
    tiny = np.full((1, 4, 1), 0.5e-7)
    assert similarity(tiny, tiny)[0] == pytest.approx(0.01)


def test_slice_threshold_takes_the_first_best():
    healthy, lesion = np.linspace(0.9, 1, 201), np.array([0.1, 0.95])
    threshold, errors = calibration.slice_threshold(healthy, lesion)
    # the lowest level, 0.005, leaves one healthy slice below; the lesion slice at 0.95 is above every candidate
    assert threshold == pytest.approx(0.9005)
    assert errors == 2


def test_slice_threshold_rises_where_lesions_ask_for_it():
    healthy = np.linspace(0.9, 1, 201)
    lesion = np.full(50, 0.9069)
    threshold, errors = calibration.slice_threshold(healthy, lesion)
    candidates = np.quantile(healthy, np.linspace(0.005, 0.095, 100))
    counted = [(lesion > q).sum() + (healthy < q).sum() for q in candidates]
    assert (threshold, errors) == (candidates[np.argmin(counted)], min(counted))
    assert threshold >= 0.9069


@pytest.mark.parametrize(("label", "missing"), [(0, "no lesion"), (1, "no healthy")])
def test_one_kind_of_slice_is_not_enough(curves, label, missing):
    mse, ref, diff, labels = curves
    with pytest.raises(UserError, match=missing):
        calibrate(mse, ref, diff, np.full_like(labels, label), modality=(0, 3))


def test_curves_must_be_finite(curves):
    mse, ref, diff, labels = curves
    mse = mse.copy()
    mse[1, 3, 0] = np.nan
    with pytest.raises(UserError, match="1 of 6 slices are not finite"):
        calibrate(mse, ref, diff, labels, modality=(0, 3))


def test_round_trip(tmp_path, curves):
    made = calibrate(*curves, modality=(0, 3), made_with={"checkpoint": "runs/a", "guidance": 2.0})
    made.save(tmp_path / "calibration.json")
    assert Calibration.load(tmp_path / "calibration.json") == made


def _edited(**changes):
    fields = {"threshold": 0.9, "diff_max": [0.1, 0.2], "diff_min": [], "modality": [0, 3], "healthy_slices": None,
              "lesion_slices": None, "errors": None, "made_with": {}}
    return {name: value for name, value in (fields | changes).items() if value != "gone"}


@pytest.mark.parametrize(("fields", "message"), [
    (_edited(threshold="gone"), "threshold is missing"),
    (_edited(speed=3), "speed is not known"),
    (_edited(threshold="high"), "threshold has the wrong kind"),
    (_edited(threshold=None), "threshold has the wrong kind"),
    (_edited(diff_max="12"), "diff_max has the wrong kind"),
    (_edited(modality=[0, 1.5]), "modality has the wrong kind"),
    (_edited(errors=-1), "errors has the wrong kind"),
    (_edited(made_with=[]), "made_with has the wrong kind"),
    (_edited(diff_max=[0.1]), "1 values for 2 modalities"),
    (_edited(diff_max=[0.1, -0.1]), "negative"),
    (_edited(threshold=float("nan")), "NaN is no number"),
    (_edited(threshold=10**400), "too large"),
    ([], "not a JSON object"),
])
def test_a_damaged_file_is_named(tmp_path, fields, message):
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps(fields))
    with pytest.raises(UserError, match=message) as caught:
        Calibration.load(path)
    assert str(path) in str(caught.value)


def test_a_missing_or_cut_file_is_named(tmp_path):
    path = tmp_path / "calibration.json"
    with pytest.raises(UserError, match=r"calibration\.json: cannot be read"):
        Calibration.load(path)
    path.write_text('{"threshold": 0.9')
    with pytest.raises(UserError, match=r"calibration\.json: is not JSON"):
        Calibration.load(path)


def test_presets(tmp_path):
    found = {name: (own.threshold, own.diff_max, own.modality,
                    *(own.made_with[field] for field in ("guidance", "forward_steps")))
             for name, own in calibration.PRESETS.items()}
    assert found == {"brats_600": (0.99488, (0.0509, 0.0397), (0, 3), 2, 600),
                     "brats_999": (0.99931, (0.0551, 0.0388), (0, 3), 2, 999),
                     "atlas_600": (0.72854, (0.8555,), (0,), 20, 600)}
    for name, published in calibration.PRESETS.items():
        published.save(tmp_path / name)
        assert Calibration.load(tmp_path / name) == published
    with pytest.raises(UserError, match="brats_600, brats_999, atlas_600"):
        calibration.preset("brats")


@pytest.fixture
def rng():
    return np.random.default_rng(0)
