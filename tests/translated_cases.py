"""A folder of small cases, the dataset prepared from it, a config for both, and a toy network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh
from run_helpers import IDENTITY, write_case

from hae_jax.configs import default
from hae_jax.data.prepare import prepare
from hae_jax.pipeline.cache_key import weights_hash
from hae_jax.pipeline.translate import translate


class ToyNetwork(nnx.Module):
    """A network with the interface of the U-Net. Outputs depend on x, t and y; samples are independent."""

    def __init__(self, seed=0, channels=4):
        self.kernel = nnx.Param(0.3 * jax.random.normal(jax.random.key(seed), (channels, channels)))

    def __call__(self, x, t, y=None, null=False):
        healthy = jnp.broadcast_to(~jnp.asarray(null), x.shape[:1])[:, None, None, None]
        return jnp.tanh(x @ self.kernel[...] + 0.01 * t[:, None, None, None]) + 0.2 * healthy * x


@pytest.fixture(scope="session")
def case_writer():
    return write_case


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """Four cases, (train, train), (val), (test), and their dataset at 16 px."""
    folder = tmp_path_factory.mktemp("prepared")
    for i in range(4):
        write_case(folder / "cases", f"case_{i}", seed=i)
    prepare(folder / "cases", folder / "store", image_size=16, train_fraction=0.5, val_fraction=0.25)
    return folder


@pytest.fixture
def config(prepared):
    config = default.get_config()
    config.data.root = str(prepared / "store")
    config.model.image_size = 16
    config.diffusion.steps = 50
    config.translation.method = "hae"
    config.translation.timesteps = (3, 6)
    config.translation.forward_steps = 5
    config.translation.batch_size = 4
    config.translation.components = 3
    config.evaluation.overlay_slices, config.evaluation.report = 0, False
    return config


@pytest.fixture(scope="session")
def toy_network():
    return ToyNetwork


@pytest.fixture(scope="session")
def mesh_of():
    """A mesh of the first n devices, as in training."""
    return lambda n: Mesh(np.array(jax.devices()[:n]).reshape(n, 1), ("data", "model"))


@pytest.fixture
def run(config, toy_network, mesh_of, tmp_path):
    def call(source=None, seed=0, devices=1, **options):
        options = {"output": tmp_path / "out"} | options
        network = toy_network(seed, config.model.in_channels)
        identity = IDENTITY | {"sha256": weights_hash(network, config)}
        return translate(network, identity, config, mesh_of(devices), source=source, **options)

    return call


@pytest.fixture
def three_cases(tmp_path, case_writer):
    for i, name in enumerate(("a", "b", "c")):
        case_writer(tmp_path / "in", name, seed=i, lesion=name == "a", segmented=name != "c")
    return tmp_path / "in"
