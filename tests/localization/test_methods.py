"""The interface of methods: making from settings, calibration, masks; thresholds against manual computation."""

import dataclasses
import json
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hae_jax.configs import default
from hae_jax.data.slices import SliceGrid
from hae_jax.data.store import open_store
from hae_jax.errors import UserError
from hae_jax.evaluation.metrics import dice
from hae_jax.localization.calibration import MapThreshold
from hae_jax.localization.counterparts import AnoDdpm, ClassifierGuidance, Counterpart, Ddib
from hae_jax.localization.denoisers import Denoisers, step_noise
from hae_jax.localization.forward_process import forward_process
from hae_jax.localization.map_threshold import NO_FILTERS, PhysicalFilters, ValidationSlice
from hae_jax.localization.methods import METHODS, Intensity, IntensityThreshold, make_method
from hae_jax.localization.published import Hae, PixelFilters, calibrate, make_masks, remove_small_components
from hae_jax.localization.residual import Residual


def made(**settings):
    config = default.get_config()
    config.translation.update(settings)
    return make_method(config)


@pytest.mark.parametrize(("name", "kind", "steps"), [
    ("residual", Residual, None), ("hae", Hae, 600),
    ("ddib", Ddib, 600), ("anoddpm-simplex", AnoDdpm, 250), ("anoddpm-gaussian", AnoDdpm, 250),
    ("classifier", ClassifierGuidance, 500), ("threshold", IntensityThreshold, None)])
def test_every_method_can_be_made(name, kind, steps):
    method = made(method=name)
    assert isinstance(method, kind)
    assert (method.name, method.network) == (name, name != "threshold")
    if steps:
        assert (method.settings if name == "hae" else method).steps == steps
    assert name in METHODS


def test_settings_arrive():
    config = default.get_config()
    config.translation.update({
        "forward_steps": 400, "guidance": 1.5, "reference": "null", "d_reverse": False, "modality": (3, 1),
        "clipping": "dynamic", "maps": "gradient", "t_e_ratio": 0.5, "every": 3, "inversion": "exact", "method": "hae"})
    method = make_method(config)
    assert vars(method.settings) == {
        "steps": 400, "guidance": 1.5, "reference": "null", "d_reverse": False, "modality": (3, 1),
        "maps": "gradient", "t_e_ratio": 0.5, "last_step_only": False, "every": 3, "inversion": "exact"}
    assert method.process.clipping == "dynamic"
    config.translation.update({"method": "ddib", "ddib_steps": 300, "ddib_start": "level", "median": False})
    method = make_method(config)
    assert (method.steps, method.start, method.guidance, method.modality, method.filters) == (
        300, "level", 1.5, (3, 1), PixelFilters(False, 40))
    config.translation.update({"method": "residual", "timesteps": (10, 30), "draws": 2, "rounds": 3,
                               "weights": (0, -1.0, 0, 2.0), "smoothing": 1.5, "rule": "healthy_fpr",
                               "healthy_fpr": 0.01, "smallest_ml": 0.3})
    method = make_method(config)
    assert vars(method.settings) == {
        "timesteps": (10, 30), "guidance": 1.5, "draws": 2, "rounds": 3, "modality": (1, 3), "weights": (-1, 2),
        "smoothing": 1.5, "rectify": "after"}
    assert (method.rule, method.healthy_fpr, method.passes) == ("healthy_fpr", 0.01, 24)
    assert method.filters == PhysicalFilters(2.0, 0, 0, 0.3)
    config.translation.filters = "pixels"
    assert make_method(config).filters == PixelFilters(False, 40)


@pytest.mark.parametrize(("respacing", "forward_steps", "expected"), [
    ("", 30, 30), ("10", 30, 6), ("ddim10", 30, 6), ("10", 50, 10), ("10", 1, 1)])
@pytest.mark.parametrize(("method", "field"), [
    ("hae", "forward_steps"), ("ddib", "ddib_steps"), ("anoddpm-simplex", "anoddpm_steps")])
def test_steps_are_original_steps(config, method, field, respacing, forward_steps, expected):
    config.translation.update({"method": method, "respacing": respacing, field: forward_steps})
    found = make_method(config)
    steps = found.settings.steps if method == "hae" else found.steps
    assert steps == expected
    assert found.process.schedule.timesteps[steps - 1] < forward_steps
    assert all(found.process.schedule.timesteps[steps:] >= forward_steps)


@pytest.mark.parametrize(("settings", "message"), [
    ({"method": "gan"}, r"translation\.method is 'gan': choose residual, hae, ddib, .* or threshold"),
    ({"clipping": "hard"}, r"translation\.clipping is 'hard'"),
    ({"rule": "best"}, r"translation\.rule is 'best': choose mixture"),
    ({"filters": "cm"}, r"translation\.filters is 'cm': choose pixels or mm"),
    ({"timesteps": (5, 1000)}, r"translation\.timesteps is \(5, 1000\): they must be below diffusion\.steps, 1000"),
    ({"timesteps": ()}, r"translation\.timesteps is \(\)"),
    ({"draws": 0}, r"translation\.draws is 0"),
    ({"rectify": "no"}, r"translation\.rectify is 'no'"),
    ({"smoothing": -1.0}, r"translation\.smoothing is -1"),
    ({"weights": (1.0, 0.0)}, r"translation\.weights is \(1\.0, 0\.0\): give 4 numbers, one for each of flair, t1"),
    ({"weights": (0.0, 0.0, 0.0, 0.0)}, r"translation\.weights .* not all 0"),
    ({"smallest_ml": -0.1}, r"translation\.smallest_ml is -0\.1"),
    ({"method": "dae"}, r"translation\.method is 'dae': it needs a denoising autoencoder"),
    ({"method": "classifier", "classifier_scale": -1.0}, r"translation\.classifier_scale is -1"),
    ({"method": "classifier", "classifier_steps": 0}, r"translation\.classifier_steps is 0"),
    ({"method": "hae", "inversion": "no"}, r"translation\.inversion is 'no'"),
    ({"method": "hae", "forward_steps": 0}, r"translation\.forward_steps is 0: it must be in 1\.\.1000"),
    ({"method": "ddib", "ddib_steps": 1001}, r"translation\.ddib_steps is 1001"),
    ({"method": "ddib", "ddib_start": "end"}, r"translation\.ddib_start is 'end'"),
    ({"method": "ddib", "ddib_start": "level", "ddib_steps": 1000}, r"translation\.ddib_start is 'level'"),
    ({"method": "anoddpm-gaussian", "anoddpm_steps": -3}, r"translation\.anoddpm_steps is -3"),
    ({"modality": (0, 4)}, r"translation\.modality is \(0, 4\): the network has 4 channels, from 0 to 3"),
    ({"modality": (1, 1), "method": "threshold"}, r"translation\.modality"),
    ({"guidance": -2.0}, r"translation\.guidance is -2"),
    ({"every": 0, "method": "hae"}, r"translation\.every is 0"),
])
def test_bad_settings_are_named_in_one_line(settings, message):
    with pytest.raises(UserError, match=message) as caught:
        made(**settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", METHODS)
def test_methods_that_need_classes_say_so(name):
    config = default.get_config()
    config.model.num_classes = None
    config.translation.method = name
    if name == "dae":
        config.diffusion.update({"schedule": "single", "steps": 1, "predicts": "x0"})
    if name in ("residual", "hae", "ddib"):
        with pytest.raises(UserError, match=r"translation\.method is .*model\.num_classes is None"):
            make_method(config)
    else:
        assert make_method(config).name == name


@pytest.fixture(scope="module")
def translated():
    """The forward process on six slices: the method, its results and made-up labels."""
    config = default.get_config()
    config.diffusion.steps = 50
    config.translation.update({"method": "hae", "forward_steps": 8})
    method = make_method(config)
    eps = lambda x, t: 0.3 * x + 0.1 * jnp.sin(t / 20)[:, None, None, None]
    denoisers = Denoisers(eps, lambda x, t: (eps(x, t) + 0.1 * jnp.abs(x), eps(x, t)))
    x0, keys = jax.random.uniform(jax.random.key(0), (6, 12, 12, 4), minval=-1), jax.random.split(jax.random.key(1), 6)
    results = method(denoisers, x0, keys)
    expected = forward_process(method.process, denoisers, x0, step_noise(keys, x0.shape[1:]), method.settings)
    jax.tree.map(np.testing.assert_array_equal, results, expected)
    return method, type(results)(*map(np.asarray, results)), np.array([0, 1, 0, 1, 1, 0])


def rows_of(results, labels, truth, heads=None) -> Iterator:
    """An iterator of results, as methods get them. Two patients alternate, with increasing height."""
    for i, label in enumerate(labels):
        head = np.ones(truth[i].shape, bool) if heads is None else heads[i]
        yield type(results)(*(None if values is None else values[i] for values in results)), ValidationSlice(
            int(label), truth[i], head, i / max(len(labels) - 1, 1), f"patient {i % 2}", "case", i, (1.0, 1.0, 1.0))


def everywhere(truth):
    return np.ones(truth.shape, bool)


def test_the_forward_process_as_a_method(translated):
    method, results, labels = translated
    truth = np.zeros((6, 12, 12), bool)
    found = method.calibrate(rows_of(results, labels, truth), {"seed": 0})
    curves = results.mse, results.ref, results.diff
    assert found == calibrate(*curves, labels, modality=(0, 3), made_with={"seed": 0})
    assert method.read_calibration(json.loads(json.dumps(dataclasses.asdict(found)))) == found
    method = dataclasses.replace(method, filters=PixelFilters(False, 3))
    masks = method.masks(results, found, everywhere(truth), SliceGrid())
    expected = make_masks(*curves, results.map, found, PixelFilters(False, 3))
    for ours, theirs in zip(masks, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(method.healthy(results), results.healthy)


def test_the_forward_process_with_a_rule_of_another_method(translated):
    """The rule uses one threshold on maps that are averaged over the modalities."""
    method, results, labels = translated
    method = dataclasses.replace(method, rule="healthy_fpr", healthy_fpr=0.1, filters=NO_FILTERS)
    truth = np.zeros((6, 12, 12), bool)
    found = method.calibrate(rows_of(results, labels, truth), {})
    assert (found.rule, found.labels) == ("healthy_fpr", "image labels")
    masks = method.masks(results, found, everywhere(truth), SliceGrid())
    maps = results.map.astype(np.float64).mean(-1)
    np.testing.assert_array_equal(masks.mask_all, maps >= found.threshold)
    assert 0 < (maps[labels == 0] >= found.threshold).mean() <= 0.12


def test_the_forward_process_needs_both_kinds_of_slices(translated):
    method, results, labels = translated
    truth = np.zeros((6, 12, 12), bool)
    with pytest.raises(UserError, match="no lesion"):
        method.calibrate(rows_of(results, 0 * labels, truth), {})
    with pytest.raises(UserError, match=r"no healthy .* and no lesion"):
        method.calibrate(iter(()), {})


@pytest.fixture
def counterparts():
    """Maps of twelve slices that are brighter in the lesion. Three slices have no lesion."""
    rng = np.random.default_rng(0)
    truth = np.zeros((12, 20, 20), bool)
    for i in range(9):
        truth[i, 4:6 + i, 5:12] = True
    maps = (rng.gamma(2, 0.08, truth.shape) + 0.25 * truth * rng.random(truth.shape)).astype(np.float32)
    return Counterpart(maps, rng.random((12, 20, 20, 2), np.float32)), truth


@pytest.mark.parametrize("median", [True, False])
def test_a_threshold_from_ground_truth_against_a_search(counterparts, median):
    results, truth = counterparts
    method = made(method="ddib", median=median, components=5)
    heads = everywhere(truth)
    heads[:, :3] = False
    found = method.calibrate(rows_of(results, truth.any((1, 2)), truth, heads), {"seed": 1})
    maps = results.map.astype(np.float64)
    if median:
        padded = np.pad(maps, ((0, 0), (2, 2), (2, 2)), mode="reflect")
        maps = np.median(np.lib.stride_tricks.sliding_window_view(padded, (5, 5), axis=(1, 2)), axis=(-2, -1))
    best = max(dice((maps[:9] >= level) & heads[:9], truth[:9]).mean() for level in np.unique(maps[:9][heads[:9]]))
    reached = dice((maps[:9] >= found.threshold) & heads[:9], truth[:9]).mean()
    assert found.expected_dice == pytest.approx(reached, abs=1e-6)
    assert reached == pytest.approx(best, abs=5e-3)  # 400 candidates
    assert (found.method, found.rule, found.labels) == ("ddib", "dice", "ground truth")
    assert (found.healthy_slices, found.lesion_slices, found.made_with) == (3, 9, {"seed": 1})
    assert method.read_calibration(json.loads(json.dumps(dataclasses.asdict(found)))) == found

    masks = method.masks(results, found, heads, SliceGrid())
    scores = np.array([np.sort(own[head])[-3:].mean() for own, head in zip(maps, heads, strict=True)])  # of 340 pixels
    np.testing.assert_allclose(masks.score, scores)
    np.testing.assert_array_equal(masks.lesion, scores >= found.slice_threshold)
    mask = remove_small_components((maps >= found.threshold) & heads, 5)
    np.testing.assert_array_equal(masks.mask_all, mask)
    np.testing.assert_array_equal(masks.mask, mask & masks.lesion[:, None, None])
    np.testing.assert_array_equal(masks.map, (maps * heads).astype(np.float32))
    np.testing.assert_array_equal(method.healthy(results), results.healthy)


def test_the_published_rule_for_any_map(counterparts):
    """The marked share of a slice is 2 % for the least and 10 % for the most anomalous slice."""
    results, truth = counterparts
    method = made(method="ddib", rule="quantile", median=False, components=0)
    found = method.calibrate(rows_of(results, truth.any((1, 2)), truth), {})
    masks = method.masks(results, found, everywhere(truth), SliceGrid())
    shares = masks.mask_all.mean((1, 2))
    assert found.threshold == masks.score[:9].max()
    assert shares[masks.score.argmax()] == pytest.approx(0.1, abs=0.003)
    assert (np.diff(shares[np.argsort(masks.score)]) >= -1e-9).all()
    assert shares.min() >= 0.02


@pytest.mark.parametrize("rule", ["mixture", "healthy_fpr", "quantile"])
def test_rules_of_image_labels_do_not_look_at_the_ground_truth(rule):
    rng = np.random.default_rng(0)
    truth = np.zeros((40, 16, 16), bool)
    truth[::2, 3:8, 3:8] = True
    results = Counterpart((0.2 * rng.random(truth.shape) + 0.5 * truth).astype(np.float32), None)
    method = made(method="ddib", rule=rule, median=False)
    labels = truth.any((1, 2))
    found = method.calibrate(rows_of(results, labels, truth), {})
    assert found == method.calibrate(rows_of(results, labels, np.zeros_like(truth)), {})
    assert found.labels == "image labels"
    if rule == "mixture":
        assert found.lesion_share == pytest.approx(25 / 256, rel=0.1)
        assert found.expected_dice > 0.9
        assert 0.19 <= found.threshold <= 0.55


@pytest.mark.parametrize("name", ["ddib", "anoddpm-simplex", "anoddpm-gaussian", "threshold"])
def test_many_healthy_slices_do_not_drive_a_threshold_out_of_reach(name):
    """An empty mask scores 1 in a healthy slice. Over all slices, a threshold above all values would be the best."""
    rng = np.random.default_rng(0)
    truth = np.zeros((50, 12, 12), bool)
    truth[:4, 3:8, 3:8] = True
    maps = (0.2 * rng.random(truth.shape) + 0.3 * truth).astype(np.float32)
    maps[4:, 0, 0] = 0.6  # a single pixel, brighter than every lesion
    found = made(method=name, median=False).calibrate(rows_of(Intensity(maps), truth.any((1, 2)), truth), {})
    assert found.lesion_slices == 4
    assert found.expected_dice > 0.9
    assert found.threshold <= 0.32


@pytest.mark.parametrize("percent", [10, 29, 30, 57])
def test_values_next_to_a_threshold_fall_on_the_same_side_in_masks_as_in_its_choice(percent):
    """Some of these percentages become smaller when rounded to float32, some become larger."""
    truth = np.zeros((1, 8, 8), bool)
    truth[:, 2:6, 2:6] = True
    results = Counterpart(np.where(truth, np.float32(0.8), np.float32(percent / 100)), None)
    method = made(method="anoddpm-simplex", median=False, components=0)
    found = method.calibrate(rows_of(results, [1], truth), {})
    assert found.expected_dice == pytest.approx(1)
    np.testing.assert_array_equal(method.masks(results, found, everywhere(truth), SliceGrid()).mask, truth)


def test_what_cannot_be_calibrated_is_said(counterparts):
    results, truth = counterparts
    method = made(method="anoddpm-gaussian")
    with pytest.raises(UserError, match="no validation slice has a lesion in its mask"):
        method.calibrate(rows_of(results, np.zeros(12), 0 * truth), {})
    broken = results._replace(map=np.where(truth, np.nan, results.map))
    with pytest.raises(UserError, match="not finite"):
        method.calibrate(rows_of(broken, truth.any((1, 2)), truth), {})
    with pytest.raises(UserError, match="9 of 12 slices are not finite"):
        method.masks(broken, _threshold(method=method.name), everywhere(truth), SliceGrid())
    with pytest.raises(UserError, match="12 healthy and 0 with a lesion"):
        made(method="ddib", rule="mixture").calibrate(rows_of(results, np.zeros(12), truth), {})


def _threshold(**changes):
    return MapThreshold(**{"method": "ddib", "rule": "dice", "labels": "ground truth", "threshold": 0.2,
                           "slice_threshold": 0.3, "slice_errors": 0, "slice_auc": None, "healthy_slices": 0,
                           "lesion_slices": 7, "expected_dice": 0.5} | changes)


def test_intensity_threshold_is_chosen_on_lesion_slices(prepared):
    reader = open_store(prepared / "store").split("val")
    rows = reader.read(np.arange(len(reader)))
    assert 0 < rows["label"].sum() < len(reader)
    flair, truth = (values[rows["label"] > 0] for values in (rows["image"][..., 0], rows["mask"] > 0))
    method = IntensityThreshold()
    found = method.calibrate(rows_of(method.intensity(rows["image"]), rows["label"], rows["mask"] > 0), {})
    best = max(dice(flair >= level, truth).mean() for level in np.unique(flair))
    assert found.expected_dice == pytest.approx(best, abs=5e-3)
    assert found.expected_dice > 0.9  # the balls are bright


def test_intensity_masks_are_not_filtered_by_a_median():
    images = np.zeros((3, 12, 12, 4), np.float32)
    images[0, 2:5, 2:5, 0] = 1.5  # nine pixels
    images[1, 2, 2, 0] = 1.5  # one
    images[2, :, :, 1:] = 9  # not flair
    config = default.get_config()
    config.translation.update({"method": "threshold", "components": 3})
    method = make_method(config)
    threshold = _threshold(method="threshold", threshold=1.5, slice_threshold=1.0)
    results, heads = method.intensity(images), np.ones((3, 12, 12), bool)
    found = method.masks(results, threshold, heads, SliceGrid())
    np.testing.assert_array_equal(found.mask_all, images[..., 0] * [[[1]], [[0]], [[0]]] > 0)
    np.testing.assert_array_equal(found.lesion, [True, True, False])  # decided by the score and not by the mask
    np.testing.assert_array_equal(found.map, images[..., 0])
    np.testing.assert_allclose(found.score, [1.5, 1.5, 0])
    assert method.healthy(results) is None


def test_intensity_of_dark_lesions():
    config = default.get_config()
    config.data.modalities = ("t1",)
    method = IntensityThreshold.of(config)
    assert (method.channel, method.dark) == (0, True)
    found = method.intensity(np.array([0.0, 0.2, 1.0, 2.0], np.float32).reshape(1, 1, 4, 1))
    np.testing.assert_allclose(found.map[0, 0], [1.5, 1.3, 0.5, 0])
    config.translation.weights = (1.0,)
    assert not IntensityThreshold.of(config).dark


@pytest.mark.parametrize(("modalities", "channel"), [(("t1", "flair"), 1), (("t2",), 0), (("flair", "t2"), 0)])
def test_intensity_looks_at_flair_or_the_heaviest_channel(modalities, channel):
    config = default.get_config()
    config.data.modalities = modalities
    method = IntensityThreshold.of(config)
    images = np.random.default_rng(0).random((2, 4, 4, len(modalities)), np.float32)
    found = method.intensity(images)
    assert isinstance(found, Intensity)
    np.testing.assert_array_equal(found.map, images[..., channel])
