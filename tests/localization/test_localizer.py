"""The localizer gives the same results for arrays as `translate.py` for files, for any orientation and network."""

import contextlib
import doctest

import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
from run_helpers import IDENTITY, read_volume

import hae_jax
from hae_jax.data.cases import MODALITIES
from hae_jax.diffusion.process import Process
from hae_jax.diffusion.schedule import make_schedule
from hae_jax.errors import UserError
from hae_jax.localization import localizer as localizer_module
from hae_jax.localization.calibration import MapThreshold
from hae_jax.localization.denoisers import Denoisers
from hae_jax.localization.localizer import Localizer, numpy_denoisers
from hae_jax.localization.methods import make_method
from hae_jax.localization.residual import Residual, ResidualSettings
from hae_jax.pipeline.calibrations import load_calibration
from hae_jax.pipeline.translate import translate

PROCESS = Process(make_schedule("linear", 1000))
SETTINGS = ResidualSettings((100, 200), modality=(0,), weights=(1.0,), smoothing=0.0)


def volume_of(folder, name):
    images = [nib.load(folder / name / f"{name}_{modality}.nii.gz") for modality in MODALITIES]
    return np.stack([image.get_fdata(dtype=np.float32) for image in images], axis=-1), images[0].affine


@pytest.fixture
def translated(config, toy_network, mesh_of, three_cases, tmp_path):
    """NIfTI masks of three cases, and a localizer with the same network, settings and calibration."""
    config.translation.update({"method": "residual", "save_healthy": True, "rule": "healthy_fpr", "healthy_fpr": 0.01,
                               "weights": (1.0, 0.0, 0.0, -0.5), "across_mm": 4.0})
    translate(toy_network(0), IDENTITY, config, mesh_of(1), output=tmp_path / "out", source=three_cases)
    method = make_method(config)
    calibration = load_calibration(method, tmp_path / "out" / "calibration.json")
    return tmp_path / "out", Localizer(toy_network(0), method.process, calibration, image_size=16, channels=4,
                                       scaling=config.data.scaling, method=method, batch_size=4)


def test_array_in_equals_nifti_out(translated, three_cases):
    folder, localizer = translated
    for name in ("a", "b"):
        volume, affine = volume_of(three_cases, name)
        found = localizer(volume, affine, name=name)
        np.testing.assert_array_equal(found.mask, read_volume(folder / f"{name}_mask.nii.gz") > 0)
        np.testing.assert_array_equal(found.anomaly_map, read_volume(folder / f"{name}_map.nii.gz"))
        for m, channel in enumerate(found.modality):
            np.testing.assert_array_equal(found.pseudo_healthy[..., m],
                                          read_volume(folder / f"{name}_healthy_{MODALITIES[channel]}.nii.gz"))
        assert len(found.slice_scores) == len(found.lesion_slices) == len(found.slice_index) == 7
        as_list = localizer(list(np.moveaxis(volume, -1, 0)), affine, name=name)
        np.testing.assert_array_equal(as_list.mask, found.mask)


def test_the_orientation_does_not_matter(translated, three_cases):
    _, localizer = translated
    volume, affine = volume_of(three_cases, "a")
    expected = localizer(volume, affine, name="a")
    image = nib.Nifti1Image(volume[..., 0], affine)
    turned = nib.orientations.axcodes2ornt("SAR")
    transform = nib.orientations.ornt_transform(nib.io_orientation(affine), turned)
    other = image.as_reoriented(transform)
    channels = [nib.Nifti1Image(c, affine).as_reoriented(transform).get_fdata(dtype=np.float32)
                for c in np.moveaxis(volume, -1, 0)]
    found = localizer(channels, other.affine, name="a")
    back = nib.Nifti1Image(found.mask.astype(np.uint8), other.affine).as_reoriented(
        nib.orientations.ornt_transform(turned, nib.io_orientation(affine)))
    np.testing.assert_array_equal(np.asarray(back.dataobj) > 0, expected.mask)
    np.testing.assert_array_equal(found.slice_scores, expected.slice_scores)


@pytest.fixture(scope="module")
def slices():
    """Forty slices of four patients, 24 x 20 pixels, two channels. Every second slice has a bright square."""
    rng = np.random.default_rng(0)
    images = rng.uniform(200, 300, (40, 24, 20, 2)).astype(np.float32)
    images[:, :2] = 0
    truth = np.zeros((40, 24, 20), bool)
    truth[::2, 8:14, 6:12] = True
    images[truth] += 300
    return images, truth


def predicts(level):
    alpha_bar = jnp.asarray(PROCESS.schedule.alpha_bar, jnp.float32)

    def eps(x, t):
        a = alpha_bar[t][:, None, None, None]
        return (x - jnp.sqrt(a) * level) / jnp.sqrt(1 - a)

    return eps


def test_one_s_own_denoiser_calibrated_on_labels_alone(slices):
    images, truth = slices
    eps = predicts(-0.4)
    localizer = Localizer(Denoisers(eps, lambda x, t: (eps(x, t), eps(x, t))), PROCESS, settings=SETTINGS,
                          image_size=16, channels=2)
    with pytest.raises(UserError, match="not calibrated: call calibrate"):
        localizer(images)
    patients = [f"p{i // 10}" for i in range(40)]
    made = localizer.calibrate(images, truth.any((1, 2)), patients=patients)
    assert (made.rule, made.labels, made.slice_auc) == ("healthy_fpr", "image labels", 1)
    found = localizer(images)
    assert found.mask.shape == truth.shape
    assert found.lesion_slices.tolist() == truth.any((1, 2)).tolist()
    overlap = 2 * (found.mask & truth).sum() / (found.mask.sum() + truth.sum())
    assert overlap > 0.8
    assert not found.mask[:, :2].any()
    assert found.pseudo_healthy.shape == (40, 24, 20, 1)
    with_mm = localizer(images, spacing=(1.0, 1.0, 2.0))
    assert with_mm.mask.shape == truth.shape


def test_a_network_outside_jax_gives_the_same(slices):
    images, truth = slices
    eps = predicts(-0.4)
    inside = Localizer(Denoisers(eps, lambda x, t: (eps(x, t), eps(x, t))), PROCESS, settings=SETTINGS, image_size=16,
                       channels=2)
    labels = []

    def outside(x, t, y):
        labels.append(None if y is None else y.tolist())
        a = PROCESS.schedule.alpha_bar[t][:, None, None, None]
        return (x - np.sqrt(a) * -0.4) / np.sqrt(1 - a)

    other = Localizer(numpy_denoisers(outside), PROCESS, settings=SETTINGS, image_size=16, channels=2)
    for localizer in (inside, other):
        localizer.calibrate(images, truth.any((1, 2)))
    np.testing.assert_allclose(other(images).anomaly_map, inside(images).anomaly_map, atol=1e-4)
    assert None in labels
    assert [0] * 32 in labels


@pytest.mark.parametrize(("images", "arguments", "message"), [
    (np.ones((4, 4, 4)), {}, r"images: have shape \(4, 4, 4\), the network takes \[X, Y, Z, 4\]"),
    (np.ones((4, 4, 4, 3)), {}, "images: have shape"),
    (np.full((4, 4, 4, 4), np.nan), {}, "images: hold NaN"),
    ([np.ones((4, 4, 4))] * 3 + [np.ones((4, 4, 5))], {}, "different shapes"),
    ([nib.Nifti1Image(np.ones((4, 4, 4), np.float32), np.eye(4))] * 4, {}, "objects, not numbers"),
    ([], {}, "images: have shape"),
    (np.zeros((4, 4, 4, 4)), {}, "a channel has no positive value"),
    (np.ones((4, 4, 4, 4)), {"affine": np.eye(3)}, r"affine: has shape \(3, 3\)"),
    (np.ones((4, 4, 4, 4)), {"affine": np.zeros((4, 4))}, "affine: .* cannot be inverted"),
])
def test_arrays_that_do_not_fit_are_named(toy_network, images, arguments, message):
    calibration = MapThreshold("residual", "mixture", "image labels", 0.1, 0.1, 0, None, 1, 1)
    localizer = Localizer(toy_network(0), PROCESS, calibration, image_size=16, channels=4)
    with pytest.raises(UserError, match=message):
        localizer(images, **arguments)


def test_calibration_arrays_that_do_not_fit_are_named(toy_network):
    localizer = Localizer(toy_network(0), PROCESS, image_size=16, channels=4)
    with pytest.raises(UserError, match="labels: 2 for 4 slices"):
        localizer.calibrate(np.ones((4, 4, 4, 4)), [0, 1])
    images = np.ones((4, 4, 4, 4))
    images[2:, ..., 1] = 0
    with pytest.raises(UserError, match="slices of b: channel 1 has no positive voxel"):
        localizer.calibrate(images, [0, 1, 0, 1], patients=["a", "a", "b", "b"])


def test_every_label_of_a_mask_is_lesion(slices):
    images, truth = slices
    eps = predicts(-0.4)
    localizer = Localizer(Denoisers(eps, lambda x, t: (eps(x, t), eps(x, t))), PROCESS,
                          method=Residual(PROCESS, SETTINGS, rule="dice"), image_size=16, channels=2)
    made = [localizer.calibrate(images, truth.any((1, 2)), masks=label * truth.astype(np.uint8)) for label in (1, 4)]
    assert made[0] == made[1]


def test_the_batch_can_be_chosen_by_memory(toy_network):
    localizer = Localizer(toy_network(0), PROCESS, image_size=16, channels=4, max_memory_gb=1e-6)
    with pytest.raises(UserError, match="--max-memory 1e-06: a batch of 1 slices"):
        localizer.calibrate(np.ones((4, 4, 4, 4)), [0, 1, 0, 1])


def test_calibration_translates_the_slices_of_all_patients_together(toy_network, monkeypatch):
    localizer, sizes = Localizer(toy_network(0), PROCESS, image_size=16, channels=4, batch_size=4), []
    start = localizer._translator._start
    monkeypatch.setattr(localizer._translator, "_start", lambda batch: sizes.append(len(batch)) or start(batch))
    with contextlib.suppress(UserError):  # too few slices for a threshold
        localizer.calibrate(np.ones((4, 4, 4, 4)), [0, 1, 0, 1], patients=["a", "a", "b", "c"])
    assert sizes == [4]


def test_the_package_has_a_public_face():
    assert set(hae_jax.__all__) <= set(dir(hae_jax))
    for name in hae_jax.__all__:
        assert getattr(hae_jax, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Lokalizer'"):
        hae_jax.Lokalizer  # noqa: B018
    with pytest.raises(UserError, match=r"translation\.speed: no such setting"):
        hae_jax.Localizer.load("phantom", speed=3)


def test_the_example_of_the_docstring_runs():
    failed, tried = doctest.testmod(localizer_module)
    assert (failed, tried > 3) == (0, True)
