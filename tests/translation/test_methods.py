"""The methods behind their interface: made from settings, calibrated, asked for masks; fixed thresholds by hand."""

import json
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import default
from hae_jax.data.store import open_store
from hae_jax.errors import UserError
from hae_jax.evaluation.metrics import FIXED_THRESHOLDS, best_threshold
from hae_jax.translation.calibration import calibrate
from hae_jax.translation.counterparts import AnoDdpm, Counterpart, Ddib
from hae_jax.translation.fixed_threshold import FixedThreshold
from hae_jax.translation.forward_process import Denoisers, forward_process, step_noise
from hae_jax.translation.masks import make_masks, remove_small_components
from hae_jax.translation.methods import METHODS, Hae, Intensity, IntensityThreshold, make_method


def made(**settings):
    config = default.get_config()
    config.translation.update(settings)
    return make_method(config)


@pytest.mark.parametrize(("name", "kind", "steps"), [
    ("hae", Hae, 600), ("ddib", Ddib, 600), ("anoddpm-simplex", AnoDdpm, 250), ("anoddpm-gaussian", AnoDdpm, 250),
    ("threshold", IntensityThreshold, None)])
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
        "clipping": "dynamic", "maps": "gradient", "t_e_ratio": 0.5, "every": 3})
    method = make_method(config)
    assert vars(method.settings) == {
        "steps": 400, "guidance": 1.5, "reference": "null", "d_reverse": False, "modality": (3, 1),
        "maps": "gradient", "t_e_ratio": 0.5, "last_step_only": False, "every": 3}
    assert method.process.clipping == "dynamic"
    config.translation.update({"method": "ddib", "ddib_steps": 300, "ddib_start": "level", "median": False})
    method = make_method(config)
    assert (method.steps, method.start, method.guidance, method.modality, method.median) == (
        300, "level", 1.5, (3, 1), False)


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
    ({"method": "gan"}, r"translation\.method is 'gan': choose hae, ddib, .* or threshold"),
    ({"clipping": "hard"}, r"translation\.clipping is 'hard'"),
    ({"forward_steps": 0}, r"translation\.forward_steps is 0: it must be in 1\.\.1000"),
    ({"method": "ddib", "ddib_steps": 1001}, r"translation\.ddib_steps is 1001"),
    ({"method": "ddib", "ddib_start": "end"}, r"translation\.ddib_start is 'end'"),
    ({"method": "ddib", "ddib_start": "level", "ddib_steps": 1000}, r"translation\.ddib_start is 'level'"),
    ({"method": "anoddpm-gaussian", "anoddpm_steps": -3}, r"translation\.anoddpm_steps is -3"),
    ({"modality": (0, 4)}, r"translation\.modality is \(0, 4\): the network has 4 channels, from 0 to 3"),
    ({"modality": (1, 1), "method": "threshold"}, r"translation\.modality"),
    ({"guidance": -2.0}, r"translation\.guidance is -2"),
    ({"every": 0}, r"translation\.every is 0"),
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
    if name in ("hae", "ddib"):
        with pytest.raises(UserError, match=r"translation\.method is .*model\.num_classes is None"):
            make_method(config)
    else:
        assert make_method(config).name == name


@pytest.fixture(scope="module")
def translated():
    """The forward process on six slices: the method, its results and made-up labels."""
    config = default.get_config()
    config.diffusion.steps = 50
    config.translation.forward_steps = 8
    method = make_method(config)
    eps = lambda x, t: 0.3 * x + 0.1 * jnp.sin(t / 20)[:, None, None, None]
    denoisers = Denoisers(eps, lambda x, t: (eps(x, t) + 0.1 * jnp.abs(x), eps(x, t)))
    x0, keys = jax.random.uniform(jax.random.key(0), (6, 12, 12, 4), minval=-1), jax.random.split(jax.random.key(1), 6)
    results = method(denoisers, x0, keys)
    expected = forward_process(method.process, denoisers, x0, step_noise(keys, x0.shape[1:]), method.settings)
    jax.tree.map(np.testing.assert_array_equal, results, expected)
    return method, type(results)(*map(np.asarray, results)), np.array([0, 1, 0, 1, 1, 0])


def rows_of(results, labels, truth) -> Iterator:
    """As the methods get them: once, slice after slice."""
    for i, label in enumerate(labels):
        yield type(results)(*(values[i] for values in results)), int(label), truth[i]


def test_the_forward_process_as_a_method(translated, tmp_path):
    method, results, labels = translated
    found = method.calibrate(rows_of(results, labels, np.zeros((6, 12, 12), bool)), {"seed": 0})
    curves = results.mse, results.ref, results.diff
    assert found == calibrate(*curves, labels, modality=(0, 3), made_with={"seed": 0})
    found.save(tmp_path / "calibration.json")
    assert method.load_calibration(tmp_path / "calibration.json") == found
    masks = method.masks(results, found, median=False, remove_up_to=3)
    expected = make_masks(*curves, results.map, found, median=False, remove_up_to=3)
    for ours, theirs in zip(masks, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(method.healthy(results), results.healthy)


def test_the_forward_process_needs_both_kinds_of_slices(translated):
    method, results, labels = translated
    truth = np.zeros((6, 12, 12), bool)
    with pytest.raises(UserError, match="no lesion"):
        method.calibrate(rows_of(results, 0 * labels, truth), {})
    with pytest.raises(UserError, match=r"no healthy .* and no lesion"):
        method.calibrate(iter(()), {})


@pytest.fixture
def counterparts():
    """Maps of twelve slices, brighter in the lesion; three slices have none."""
    rng = np.random.default_rng(0)
    truth = np.zeros((12, 20, 20), bool)
    for i in range(9):
        truth[i, 4:6 + i, 5:12] = True
    maps = (rng.gamma(2, 0.08, truth.shape) + 0.25 * truth * rng.random(truth.shape)).astype(np.float32)
    return Counterpart(maps, rng.random((12, 20, 20, 2), np.float32)), truth


@pytest.mark.parametrize("median", [True, False])
def test_fixed_threshold_against_a_search_over_the_lesion_slices(counterparts, median, tmp_path):
    results, truth = counterparts
    method = made(method="ddib", median=median)
    found = method.calibrate(rows_of(results, truth.any((1, 2)), truth), {"seed": 1})
    maps = results.map.astype(np.float64)
    if median:
        padded = np.pad(maps, ((0, 0), (2, 2), (2, 2)), mode="reflect")
        maps = np.median(np.lib.stride_tricks.sliding_window_view(padded, (5, 5), axis=(1, 2)), axis=(-2, -1))
    threshold, dice = best_threshold(maps[:9], truth[:9])
    assert FIXED_THRESHOLDS[0] < threshold < FIXED_THRESHOLDS[-1]
    assert found.validation_dice == pytest.approx(dice)
    assert found == FixedThreshold("ddib", threshold, found.validation_dice, 9, {"seed": 1})
    found.save(tmp_path / "threshold.json")
    assert method.load_calibration(tmp_path / "threshold.json") == found

    masks = method.masks(results, found, median=median, remove_up_to=5)
    mask = remove_small_components(maps >= threshold, 5)
    np.testing.assert_array_equal(masks.mask_all, mask)
    np.testing.assert_array_equal(masks.mask, mask)
    np.testing.assert_array_equal(masks.lesion, mask.any((1, 2)))
    np.testing.assert_array_equal(masks.score, -maps.max((1, 2)))
    np.testing.assert_array_equal(masks.map, maps.astype(np.float32))
    np.testing.assert_array_equal(method.healthy(results), results.healthy)


@pytest.mark.parametrize("name", ["ddib", "anoddpm-simplex", "anoddpm-gaussian", "threshold"])
def test_many_healthy_slices_do_not_drive_a_threshold_out_of_reach(name):
    """An empty mask scores 1 in a healthy slice: over all slices, a threshold above every value would be the best."""
    rng = np.random.default_rng(0)
    truth = np.zeros((50, 12, 12), bool)
    truth[:4, 3:8, 3:8] = True
    maps = (0.2 * rng.random(truth.shape) + 0.3 * truth).astype(np.float32)
    maps[4:, 0, 0] = 0.6  # a single pixel, brighter than every lesion
    assert best_threshold(maps, truth)[0] > maps.max()
    found = made(method=name, median=False).calibrate(
        ((Intensity(values), label, mask) for values, label, mask in zip(maps, truth.any((1, 2)), truth, strict=True)),
        {})
    assert found.slices == 4
    assert found.validation_dice > 0.9
    assert found.threshold <= 0.32


@pytest.mark.parametrize("percent", [10, 29, 30, 57])
def test_values_next_to_a_threshold_fall_on_the_same_side_in_masks_as_in_its_choice(percent):
    """Some of these percentages lie below themselves when rounded to float32, some above."""
    truth = np.zeros((1, 8, 8), bool)
    truth[:, 2:6, 2:6] = True
    results = Counterpart(np.where(truth, np.float32(0.8), np.float32(percent / 100)), None)
    method = made(method="anoddpm-simplex", median=False)
    found = method.calibrate([(Counterpart(results.map[0], None), 1, truth[0])], {})
    assert found.validation_dice == pytest.approx(1)
    np.testing.assert_array_equal(method.masks(results, found, median=False).mask, truth)


def test_what_cannot_be_calibrated_is_said(counterparts):
    results, truth = counterparts
    method = made(method="anoddpm-gaussian")
    with pytest.raises(UserError, match="none has a lesion in its mask, and the method anoddpm-gaussian"):
        method.calibrate(rows_of(results, np.zeros(12), 0 * truth), {})
    broken = results._replace(map=np.where(truth, np.nan, results.map))
    with pytest.raises(UserError, match="not finite"):
        method.calibrate(rows_of(broken, truth.any((1, 2)), truth), {})
    with pytest.raises(UserError, match="9 of 12 slices are not finite"):
        method.masks(broken, FixedThreshold(method.name, 0.1, 0.5, 3), median=False)


def _edited(**changes):
    fields = {"method": "ddib", "threshold": 0.2, "validation_dice": 0.5, "slices": 7, "made_with": {}}
    return {name: value for name, value in (fields | changes).items() if value != "gone"}


@pytest.mark.parametrize(("fields", "message"), [
    (_edited(threshold="gone"), "field threshold is missing"),
    (_edited(speed=3), "field speed is not known"),
    (_edited(threshold="high"), "threshold has the wrong kind"),
    (_edited(threshold=float("nan")), "finite"),
    (_edited(validation_dice=None), "validation_dice has the wrong kind"),
    (_edited(slices=0), "slices has the wrong kind"),
    (_edited(method=3), "method has the wrong kind"),
    (_edited(made_with=[]), "made_with has the wrong kind"),
    (_edited(method="anoddpm-simplex"), "is a threshold of the method anoddpm-simplex, not of ddib"),
    ([], "not a JSON object"),
])
def test_a_damaged_file_is_named(tmp_path, fields, message):
    path = tmp_path / "threshold.json"
    path.write_text(json.dumps(fields))
    with pytest.raises(UserError, match=message) as caught:
        made(method="ddib").load_calibration(path)
    assert str(path) in str(caught.value)


def test_a_missing_or_cut_file_is_named(tmp_path):
    path = tmp_path / "threshold.json"
    with pytest.raises(UserError, match=r"threshold\.json: cannot be read"):
        FixedThreshold.load(path)
    path.write_text('{"threshold": 0.9')
    with pytest.raises(UserError, match=r"threshold\.json: is not JSON"):
        FixedThreshold.load(path)


def test_intensity_threshold_is_chosen_on_lesion_slices(prepared):
    reader = open_store(prepared / "store").split("val")
    rows = reader.read(np.arange(len(reader)))
    assert 0 < rows["label"].sum() < len(reader)
    flair, truth = (values[rows["label"] > 0] for values in (rows["image"][..., 0], rows["mask"] > 0))
    method = IntensityThreshold()
    found = method.calibrate(rows_of(method.intensity(rows["image"]), rows["label"], rows["mask"] > 0), {})

    def dice(threshold):
        mask = flair >= threshold
        both = (mask & truth).sum((1, 2))
        return (2 * both / (mask.sum((1, 2)) + truth.sum((1, 2)))).mean()

    tried = np.arange(0.3, 2.001, 0.02)
    assert found.validation_dice == pytest.approx(max(map(dice, tried)), abs=1e-6)
    assert dice(found.threshold) == pytest.approx(found.validation_dice, abs=1e-6)
    assert found.validation_dice > 0.9  # the balls are bright
    assert found.slices == len(flair)


def test_intensity_masks_are_not_filtered():
    images = np.zeros((3, 12, 12, 4), np.float32)
    images[0, 2:5, 2:5, 0] = 1.5  # nine pixels
    images[1, 2, 2, 0] = 1.5  # one
    images[2, :, :, 1:] = 9  # not flair
    method, threshold = IntensityThreshold(), FixedThreshold("threshold", 1.5, 0.0, 1)
    results = method.intensity(images)
    found = method.masks(results, threshold, median=True, remove_up_to=3)
    np.testing.assert_array_equal(found.mask_all, images[..., 0] * [[[1]], [[0]], [[0]]] > 0)
    np.testing.assert_array_equal(found.mask, found.mask_all)
    np.testing.assert_array_equal(found.lesion, [True, False, False])
    np.testing.assert_array_equal(found.map, images[..., 0])
    np.testing.assert_array_equal(found.score, [-1.5, -1.5, 0])
    assert method.masks(results, threshold).lesion.tolist() == [True, True, False]
    assert method.healthy(results) is None


@pytest.mark.parametrize(("modalities", "channel"), [(("t1", "flair"), 1), (("t1",), 0), (("flair", "t2"), 0)])
def test_intensity_looks_at_flair_or_the_first_channel(modalities, channel):
    config = default.get_config()
    config.data.modalities = modalities
    method = IntensityThreshold.of(config)
    images = np.random.default_rng(0).random((2, 4, 4, len(modalities)), np.float32)
    found = method.intensity(images)
    assert isinstance(found, Intensity)
    np.testing.assert_array_equal(found.map, images[..., channel])
