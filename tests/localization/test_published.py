"""The published masks from curves against the golden values, and the properties of each step."""

import dataclasses

import numpy as np
import pytest

from hae_jax.data.slices import SliceGrid
from hae_jax.errors import UserError
from hae_jax.localization import calibration as calibrations
from hae_jax.localization import published
from hae_jax.localization.calibration import Calibration
from hae_jax.localization.map_threshold import NO_FILTERS
from hae_jax.localization.published import (
    PixelFilters,
    calibrate,
    make_masks,
    median_filtered,
    quantile_thresholds,
    remove_small_components,
    similarity,
)

WITH_COMPONENTS = PixelFilters(median=True, remove_up_to=40)


@pytest.fixture(scope="module")
def stacks(golden):
    """(G - X)^2, (R - X)^2, (G - R)^2 of the golden values, [B, T, M, H, W] each, and the labels [B]."""
    z = np.load(golden / "masks.npz")
    x = z["source"][:, None, [0, 3]].astype(np.float64)  # B, 1, M, H, W
    g, r = z["xstart"].astype(np.float64), z["xstart_null"].astype(np.float64)
    return (g - x) ** 2, (r - x) ** 2, (g - r) ** 2, z["label"]


@pytest.fixture(scope="module")
def curves(stacks):
    """mse, ref, diff [B, T, M], and the labels [B]."""
    return *(stack.mean(axis=(-2, -1)) for stack in stacks[:3]), stacks[3]


@pytest.fixture(scope="module")
def inputs(stacks, curves):
    """mse, ref, diff [B, T, M], maps [B, H, W, M] and the calibration of the golden stacks."""
    return *curves[:3], running_maps(stacks[0], curves[2]), calibrate(*curves, modality=(0, 3))


def test_calibrate_golden(golden, curves):
    z = np.load(golden / "masks.npz")
    found = calibrate(*curves, modality=(0, 3))
    # The golden values use float32 sums, this code float64.
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


def test_similarity_is_the_clamped_cosine_over_time(rng):
    mse, ref = rng.random((2, 3, 7, 2))
    mse[2] = 0
    s = similarity(mse, ref)
    a, b = mse.mean(-1), ref.mean(-1)
    for i in range(2):
        assert s[i] == pytest.approx(a[i] @ b[i] / np.sqrt((a[i] @ a[i]) * (b[i] @ b[i])))
    assert s[2] == 0
    # Norms have a minimum of 1e-6, so two equal curves of norm 1e-7 have s = 0.01.
    tiny = np.full((1, 4, 1), 0.5e-7)
    assert similarity(tiny, tiny)[0] == pytest.approx(0.01)


def test_slice_threshold_takes_the_first_best():
    healthy, lesion = np.linspace(0.9, 1, 201), np.array([0.1, 0.95])
    threshold, errors = published.slice_threshold(healthy, lesion)
    # At the lowest level, 0.005, one healthy slice is below. The lesion slice at 0.95 is above all candidates.
    assert threshold == pytest.approx(0.9005)
    assert errors == 2


def test_slice_threshold_rises_where_lesions_ask_for_it():
    healthy = np.linspace(0.9, 1, 201)
    lesion = np.full(50, 0.9069)
    threshold, errors = published.slice_threshold(healthy, lesion)
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


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_published_values():
    found = {name: (own.threshold, own.diff_max, own.modality,
                    *(own.made_with[field] for field in ("guidance", "forward_steps")))
             for name, own in calibrations.PRESETS.items()}
    assert found == {"brats_600": (0.99488, (0.0509, 0.0397), (0, 3), 2, 600),
                     "brats_999": (0.99931, (0.0551, 0.0388), (0, 3), 2, 999),
                     "atlas_600": (0.72854, (0.8555,), (0,), 20, 600)}


def running_maps(mse, diff):
    """[B, T, M, H, W] squared errors and [B, T, M] curves -> [B, H, W, M]: the mean of mse_t over t < argmax diff."""
    t_e = np.maximum(diff.argmax(axis=1), 1)  # t_e = 0 uses only t = 0
    before = np.arange(mse.shape[1])[None, :, None] < t_e[:, None]
    return np.einsum("btm,btmhw->bhwm", before / t_e[:, None], mse)


# The published code truncates the index of the quantile level where rounding is meant, so a level may be one of 101 too
# high there. For the golden peaks, this has no effect: masks are equal pixel by pixel.
@pytest.mark.parametrize(("median", "suffix"), [(True, ""), (False, "_nomedian")])
def test_masks_golden(golden, inputs, median, suffix):
    z = np.load(golden / "masks.npz")
    found = make_masks(*inputs, PixelFilters(median=median))
    np.testing.assert_allclose(found.map, z[f"map{suffix}"][:, 0], atol=1e-7)
    np.testing.assert_array_equal(found.mask_all, z[f"mask_all{suffix}"][:, 0] > 0)
    np.testing.assert_array_equal(found.mask, z[f"mask_mixed{suffix}"][:, 0] > 0)
    np.testing.assert_array_equal(found.lesion, z[f"pred_label{suffix}"])
    assert found.map.dtype == np.float32
    assert found.mask.dtype == found.mask_all.dtype == found.lesion.dtype == bool


def test_component_filter_golden_after_the_median(golden, inputs):
    z = np.load(golden / "masks.npz")
    found = make_masks(*inputs, WITH_COMPONENTS)
    np.testing.assert_array_equal(found.mask_all, z["mask_all_cc_filtered"][:, 0] > 0)


def test_remove_small_components_golden(golden):
    z = np.load(golden / "extras.npz")
    found = remove_small_components(z["components_in"][:, 0] > 0)
    np.testing.assert_array_equal(found, z["components_out"][:, 0] > 0)


def test_components_do_not_join_across_slices_and_filtering_repeats():
    masks = np.zeros((3, 16, 16), bool)
    masks[:, 2:8, 2:8] = True  # 36 pixels in each of three neighbouring slices
    assert not remove_small_components(masks).any()
    noisy = np.random.default_rng(0).random((4, 64, 64)) < 0.35
    once = remove_small_components(noisy)
    assert 0 < once.sum() < noisy.sum()
    np.testing.assert_array_equal(remove_small_components(once), once)
    assert not remove_small_components(np.zeros((2, 8, 8), bool)).any()


def test_components_in_3d_join_across_slices_but_not_across_gaps():
    masks = np.zeros((4, 16, 16), bool)
    masks[:3, 2:8, 2:8] = True  # 36 pixels in each of three slices
    masks[3, 12, 12] = True
    masks[2, 11, 11] = True  # touches it by a corner
    assert not remove_small_components(masks, 40).any()
    kept = remove_small_components(masks, 40, np.arange(4))
    np.testing.assert_array_equal(kept[:3, 2:8, 2:8], True)
    assert kept.sum() == 3 * 36
    assert remove_small_components(masks, 1, np.arange(4))[3, 12, 12]
    assert not remove_small_components(masks, 1, np.array([7, 8, 9, 11]))[3, 12, 12]
    assert not remove_small_components(masks, 72, np.array([0, 1, 3, 4])).any()


def test_median_in_3d():
    maps = np.random.default_rng(3).random((4, 9, 11))
    where = np.array([3, 4, 5, 8])
    stack = np.zeros((6, 9, 11))
    stack[where - 3] = maps
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(stack, 2, mode="reflect"), (5, 5, 5))
    np.testing.assert_array_equal(median_filtered(maps, where), np.median(windows, axis=(-3, -2, -1))[where - 3])
    np.testing.assert_array_equal(median_filtered(maps[:1], where[:1]), median_filtered(maps[:1]))


def test_masks_filtered_in_3d(inputs):
    *arrays, calibration = inputs
    where = np.arange(len(arrays[0]))
    found = make_masks(*inputs, dataclasses.replace(WITH_COMPONENTS, dimensions=3), SliceGrid(where))
    plain = make_masks(*inputs, NO_FILTERS)
    thresholds = quantile_thresholds(arrays[3], arrays[2].max(axis=1), np.array(calibration.diff_max)).mean(axis=1)
    expected = median_filtered(arrays[3].mean(axis=-1), where) >= thresholds[:, None, None]
    np.testing.assert_array_equal(found.mask_all, remove_small_components(expected, 40, where))
    gated = expected & plain.lesion[:, None, None]
    np.testing.assert_array_equal(found.mask, remove_small_components(gated, 40, where))


def test_thresholds_are_each_maps_own_quantile():
    rng = np.random.default_rng(1)
    maps, diff_max = rng.random((5, 9, 11, 2)), np.array([0.5, 0.25])
    peaks = rng.random((5, 2)) * 0.6
    found = quantile_thresholds(maps, peaks, diff_max)
    for b in range(5):
        for m in range(2):
            r = round(min(peaks[b, m] / diff_max[m], 1), 2)
            assert found[b, m] == pytest.approx(np.quantile(maps[b, ..., m], 0.98 - 0.08 * r), rel=1e-12)


@pytest.mark.parametrize(("peak", "diff_max", "level"), [
    (0.29, 1, 0.98 - 0.08 * 0.29),  # 0.29 * 100 = 28.99...: truncation would give 0.28
    (0.0, 1, 0.98),
    (5.0, 1, 0.90),
    (0.5, 0, 0.90),  # no reference, so r = 1
    (0.0, 0, 0.90),
])
def test_quantile_level(peak, diff_max, level):
    maps = np.random.default_rng(2).random((1, 40, 40, 1))
    found = quantile_thresholds(maps, np.array([[peak]]), np.array([float(diff_max)]))
    assert found[0, 0] == pytest.approx(np.quantile(maps, level), rel=1e-12)


def test_thresholds_come_from_unfiltered_maps_and_the_border_is_mirrored(inputs):
    *_, diff, maps, calibration = inputs
    found = make_masks(*inputs)
    thresholds = quantile_thresholds(maps, diff.max(axis=1), np.array(calibration.diff_max)).mean(axis=1)
    padded = np.pad(maps.mean(axis=-1), ((0, 0), (2, 2), (2, 2)), mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (5, 5), axis=(1, 2))
    filtered = np.median(windows, axis=(-2, -1))
    np.testing.assert_array_equal(found.map, filtered.astype(np.float32))
    np.testing.assert_array_equal(found.mask_all, filtered >= thresholds[:, None, None])


def test_mask_is_gated_by_the_score(inputs):
    *arrays, calibration = inputs
    plain = make_masks(*inputs)
    for threshold, lesion in ((-1.0, False), (1.1, True)):
        found = make_masks(*arrays, dataclasses.replace(calibration, threshold=threshold))
        assert (found.lesion == lesion).all()
        np.testing.assert_array_equal(found.mask_all, plain.mask_all)
        np.testing.assert_array_equal(found.mask, plain.mask_all & lesion)
    at_score = make_masks(*arrays, dataclasses.replace(calibration, threshold=1 - float(plain.score[2])))
    assert at_score.lesion[2]  # at most the threshold


def test_a_slice_does_not_depend_on_its_company(inputs):
    *arrays, calibration = inputs
    order = np.array([4, 2, 0])
    whole = make_masks(*inputs, WITH_COMPONENTS)
    part = make_masks(*(a[order] for a in arrays), calibration, WITH_COMPONENTS)
    for name in whole._fields:
        np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[order], err_msg=name)


def test_single_modality_and_flat_map():
    curve = np.ones((1, 3, 1))
    calibration = Calibration(0.5, (1.0,), (), (0,))
    found = make_masks(curve, curve, curve, np.zeros((1, 8, 8, 1)), calibration)
    assert found.mask_all.all()  # all pixels of a constant map are at its quantile
    assert not found.mask.any()  # the slice is healthy, since both curves agree
    assert found.score[0] == pytest.approx(0, abs=1e-6)


def test_wrong_number_of_modalities_is_said(inputs):
    *arrays, _ = inputs
    with pytest.raises(UserError, match="2 of them"):
        make_masks(*arrays, Calibration(0.5, (1.0,), (), (0,)))


def test_not_finite_is_said(inputs):
    mse, *rest = inputs
    mse = mse.copy()
    mse[0] = np.inf
    with pytest.raises(UserError, match="not finite"):
        make_masks(mse, *rest)
