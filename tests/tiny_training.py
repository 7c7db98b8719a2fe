"""A prepared dataset of 24 synthetic slices of 16 px, and the smallest config that trains on it."""

import numpy as np
import pytest

from hae_jax.configs import default
from hae_jax.data.slices import CaseSlices
from hae_jax.data.store import StoreWriter


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory):
    root = tmp_path_factory.mktemp("store")
    rng = np.random.default_rng(0)
    writer = StoreWriter(root)
    for i, (split, count) in enumerate((("train", 24), ("val", 6), ("test", 6))):
        images = rng.random((count, 16, 16, 4), np.float32)
        masks = np.zeros((count, 16, 16), np.float32)
        masks[::2, 4:8, 4:8] = 1
        images[::2, 4:8, 4:8] += 1
        writer.add(f"case_{i}", split, CaseSlices(images, masks, np.arange(count), (16, 16, count)), np.eye(4))
    writer.finish({"modalities": ["flair", "t1", "t1ce", "t2"]})
    return root


@pytest.fixture(scope="session")
def tiny_settings(tiny_store):
    """A function that makes a new config at each call."""
    return lambda: _tiny_config(tiny_store)


@pytest.fixture
def tiny_config(tiny_settings):
    return tiny_settings()


@pytest.fixture(scope="session")
def one_level_settings(tiny_settings):
    """The same with a network of one level, which compiles in a quarter of the time."""

    def make():
        config = tiny_settings()
        config.model.channel_mult = (1,)
        config.model.attention_resolutions = ()  # the middle has attention nevertheless
        return config

    return make


@pytest.fixture
def one_level_config(one_level_settings):
    return one_level_settings()


def _tiny_config(store):
    config = default.get_config()
    config.data.root = str(store)
    config.model.image_size = 16
    config.model.model_channels = 32
    config.model.num_res_blocks = 1
    config.model.channel_mult = (1, 1)
    config.model.attention_resolutions = (2,)
    config.training.batch_size = 8
    config.training.steps = 3
    config.training.log_every = 1
    config.training.save_every = 100
    config.training.sample_every = 0
    config.training.validate_every = 0
    config.training.localization_every = 0
    config.training.learning_rate = 1e-3
    config.training.ema_rates = (0.9,)
    return config
