"""Localization metrics during training, for a network that finds lesions, and export of the best weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hae_jax.data.slices import CaseSlices
from hae_jax.data.store import StoreWriter, open_store
from hae_jax.diffusion.process import Process
from hae_jax.diffusion.schedule import make_schedule
from hae_jax.errors import UserError
from hae_jax.training.localization import Localization
from hae_jax.training.mesh import make_mesh, replicated
from hae_jax.training.settings import check_settings
from hae_jax.training.watch import localization_score

PROCESS = Process(make_schedule("linear", 1000))


class Knower(nnx.Module):
    """Predicts the same x0 for every input. If `level` is None, it predicts the input, so that the residual is 0."""

    def __init__(self, level):
        self.level = nnx.Param(jnp.full((), level))

    def __call__(self, x, t, y=None, null=False):
        alpha_bar = jnp.asarray(PROCESS.schedule.alpha_bar, jnp.float32)[t][:, None, None, None]
        return (x - jnp.sqrt(alpha_bar) * self.level[...]) / jnp.sqrt(1 - alpha_bar)


@pytest.fixture
def settings(tiny_config):
    tiny_config.data.scaling = "volume"
    tiny_config.training.update({"localization_every": 2, "localization_slices": 6})
    tiny_config.translation.update({"weights": (1.0, 1.0, 1.0, 1.0), "smoothing": 0.0, "across_mm": 0.0})
    return tiny_config


def measured(settings, level, devices=1):
    mesh = make_mesh((-1, 1), jax.devices()[:devices])
    graph, params = nnx.split(Knower(level))
    shardings = jax.tree.map(lambda _: replicated(mesh), params)
    store = open_store(settings.data.root)
    return Localization(mesh, shardings, graph, settings, store, batch_size=4)(params)


def test_a_network_that_finds_lesions(settings):
    found = measured(settings, -0.2)
    assert found.keys() == {"localization_expected_dice", "localization_auc", "localization_dice",
                            "reconstruction_error"}
    assert found["localization_expected_dice"] > 0.8
    assert found["localization_dice"] > 0.9
    assert found["localization_auc"] == 1
    reader = open_store(settings.data.root).split("val")
    rows = reader.read(np.arange(6))
    healthy = rows["image"][rows["label"] == 0] * 2 / 1.5 - 1
    assert found["reconstruction_error"] == pytest.approx(np.abs(healthy + 0.2).mean(), rel=1e-4)
    assert localization_score(found) == pytest.approx(found["localization_expected_dice"])


def test_the_measures_do_not_depend_on_the_devices(settings):
    one, two = (measured(settings, -0.2, devices) for devices in (1, 2))
    assert one == pytest.approx(two, rel=1e-5)


def test_slices_of_unknown_size_are_measured_without_filters(settings, tmp_path):
    """Slices that were prepared for the PyTorch code have no affine."""
    reader, writer = open_store(settings.data.root).split("val"), StoreWriter(tmp_path)
    rows = reader.read(np.arange(6))
    writer.add("case", "val", CaseSlices(rows["image"], rows["mask"], rows["slice"], None), None)
    writer.finish({})
    wanted = measured(settings, -0.2)
    settings.data.root = str(tmp_path)
    settings.translation.update({"across_mm": 2.0, "smallest_ml": 0.1})
    assert measured(settings, -0.2) == pytest.approx(wanted)


def test_a_network_that_finds_nothing(settings):
    found = measured(settings, 1.0)  # all slices are darker than their reconstruction, so the map is 0
    assert np.isnan(found["localization_expected_dice"])
    assert found["localization_dice"] == 0
    assert found["localization_auc"] < 0.9
    assert np.isnan(localization_score(found))
    assert np.isnan(localization_score({"loss": 0.5}))


@pytest.mark.parametrize(("changes", "message"), [
    ({"training.localization_every": -1}, r"training\.localization_every is -1"),
    ({"training.localization_slices": 0}, r"training\.localization_slices is 0"),
    ({"diffusion.steps": 200}, r"translation\.timesteps .* below diffusion\.steps, 200; or set training\.localization"),
    ({"data.modalities": ("a", "b", "c", "d"), "translation.weights": None},
     r"translation\.weights is None, and the sign of a lesion in a, b, c, d is not known"),
])
def test_settings_that_cannot_be(settings, changes, message):
    with settings.unlocked():
        for name, value in changes.items():
            section, field = name.split(".")
            settings[section][field] = value
    with pytest.raises(UserError, match=message):
        check_settings(settings)


def test_a_network_without_classes_is_not_measured(settings):
    settings.model.num_classes = None
    settings.diffusion.steps = 200  # too few for the default timesteps
    check_settings(settings)
