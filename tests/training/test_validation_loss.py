"""The validation loss uses a fixed set and does not depend on devices and batches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hae_jax.data.slices import to_model_range
from hae_jax.data.store import SplitReader, open_store
from hae_jax.diffusion.process import Process
from hae_jax.diffusion.schedule import make_schedule
from hae_jax.training.mesh import make_mesh, state_shardings
from hae_jax.training.state import abstract_network, network_config
from hae_jax.training.validation import Validation, fixed_samples

STEPS = 50


@pytest.fixture(scope="module")
def reader(tiny_store):
    return open_store(tiny_store).split("val")


@pytest.fixture(scope="module")
def trained(one_level_settings):
    """The network with changed parameters, since the output is zero with the initial ones."""
    network = network_config(one_level_settings().to_dict())
    graph, shapes = abstract_network(network)
    rng = np.random.default_rng(0)
    return network, graph, jax.tree.map(lambda a: jnp.asarray(rng.normal(0.02, 0.1, a.shape), a.dtype), shapes)


@pytest.fixture(scope="module")
def loss(trained, reader):
    """The loss as a function of the number of devices, the mesh's shape and the batch size."""
    network, graph, params = trained

    def compute(shape, rows, slices=6, **fields):
        mesh = make_mesh(shape, jax.devices()[:abs(np.prod(shape))])
        shardings = state_shardings(mesh, params)
        process = Process(make_schedule("linear", STEPS))
        validation = Validation(mesh, shardings, graph, dataclasses.replace(network, **fields), process, reader,
                                slices=slices, batch_size=rows)
        return validation(jax.device_put(params, shardings))

    return compute


@pytest.fixture(scope="module")
def reference(loss):
    return loss((1, 1), 4)


@pytest.mark.parametrize(("shape", "rows"), [((4, 1), 8), ((2, 2), 4)])
def test_devices_and_batches_do_not_matter(loss, reference, shape, rows):
    assert loss(shape, rows) == pytest.approx(reference, rel=1e-5)


def test_the_mean_over_the_samples_one_by_one(trained, reader, reference):
    _, graph, params = trained
    model, process = nnx.merge(graph, params), Process(make_schedule("linear", STEPS))
    samples = fixed_samples(reader, 6, STEPS, conditional=True)
    call = jax.jit(lambda x, t, y, null: model(x, t, y, null=null))
    losses = {False: [], True: []}
    for i, (row, label, t, null) in enumerate(zip(*samples, strict=True)):
        image = to_model_range(reader.read([row])["image"])
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), i % 6), image.shape[1:])[None]
        x_t = process.noised(image, jnp.array([t]), noise)
        eps = call(x_t, jnp.array([t]), jnp.array([label]), jnp.array([null]))
        losses[bool(null)].append(float(np.square(eps - noise).mean()))
    expected = {"validation_loss": np.mean(losses[False]), "validation_loss_null": np.mean(losses[True])}
    assert reference == pytest.approx(expected, rel=1e-5)
    assert reference["validation_loss"] != pytest.approx(reference["validation_loss_null"], rel=1e-3)


class Rows(SplitReader):
    """A split with synthetic labels."""

    def __init__(self, length):
        super().__init__("", length, ())

    @property
    def rows(self):
        return {"labels": np.arange(len(self), dtype=np.int32) % 2}


def test_slices_and_timesteps_are_spread_evenly():
    samples = fixed_samples(Rows(1000), 50, 200, conditional=True)
    assert samples.row[:50].tolist() == list(range(10, 1000, 20))
    assert sorted(samples.t[:50]) == list(range(2, 200, 4))
    assert abs(np.corrcoef(samples.row[:50], samples.t[:50])[0, 1]) < 0.3
    np.testing.assert_array_equal(samples.label, samples.row % 2)
    assert samples.null.tolist() == [False] * 50 + [True] * 50
    np.testing.assert_array_equal(samples.t[:50], samples.t[50:])


def test_a_small_split_is_taken_whole():
    samples = fixed_samples(Rows(3), 64, 1000, conditional=False)
    assert samples.row.tolist() == [0, 1, 2]
    assert not samples.null.any()
