"""Resampling, dropout and initialisation equal PyTorch's. A sample's randomness does not depend on the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from network_helpers import SMALL, abstract, assert_close, inputs
from scipy import signal

from hae_jax.model import UNet, UNetConfig
from hae_jax.model.hybrid import MultiHeadAttention
from hae_jax.model.layers import (
    Downsample,
    Dropout,
    LayerKeys,
    Randomness,
    Upsample,
    group_norm,
    layer_norm,
    pool,
)
from hae_jax.ops.threefry import kept
from hae_jax.torch_interop.weights import torch_state

CONFIG = UNetConfig(**SMALL)


def test_pool_counts_the_zeros_that_fill_up_an_odd_size():
    x = jnp.arange(1.0, 16.0).reshape(1, 3, 5, 1)
    expected = np.array([[(1 + 2 + 6 + 7) / 4, (3 + 4 + 8 + 9) / 4, (5 + 10) / 4],
                         [(11 + 12) / 4, (13 + 14) / 4, 15 / 4]])
    np.testing.assert_allclose(pool(x, 2)[0, ..., 0], expected, rtol=1e-6)
    assert pool(x, 8).shape == (1, 1, 1, 1)
    assert pool(x, 8).item() == pytest.approx(120 / 64)
    assert pool(x, 1) is x


def test_pool_means_in_float32():
    x = jnp.full((1, 8, 8, 1), 1 + 2**-7, jnp.bfloat16)  # a bfloat16 sum of 64 such values would be rounded
    assert pool(x, 8).dtype == jnp.bfloat16
    assert pool(x, 8).item() == 1 + 2**-7


@pytest.mark.parametrize("size", [6, 7])
def test_downsample_pads_one_on_all_sides(size: int):
    layer = Downsample(2, CONFIG, nnx.Rngs(0))
    x = np.random.default_rng(0).standard_normal((size, size, 2)).astype(np.float32)
    kernel, bias = np.asarray(layer.op.kernel[...]), np.asarray(layer.op.bias[...])
    expected = np.stack([
        sum(signal.correlate2d(np.pad(x[..., i], 1), kernel[..., i, o], "valid")[::2, ::2] for i in range(2)) + bias[o]
        for o in range(2)], axis=-1)
    assert_close(layer(x[None], None)[0], expected, 1e-5)


def test_upsample_repeats_pixels():
    x = np.arange(6.0).reshape(1, 2, 3, 1)
    layer = Upsample(1, UNetConfig(**SMALL, conv_resample=False), nnx.Rngs(0))
    np.testing.assert_array_equal(layer(x, None)[0, ..., 0], np.kron(x[0, ..., 0], np.ones((2, 2))))


@pytest.mark.parametrize("make", [group_norm, layer_norm])
def test_norms_keep_small_variances_beside_large_means(make):
    """E[x^2] - E[x]^2 in float32, an epsilon of 1e-6, or bfloat16 statistics would each fail."""
    x = 1000 + 0.01 * np.random.default_rng(0).standard_normal((1, 4, 4, 32)).astype(np.float32)
    norm = make(32, nnx.Rngs(0), dtype="float32", **({"groups": 1} if make is group_norm else {}))
    exact = x.astype(np.float64)
    axes = (1, 2, 3) if make is group_norm else 3
    centred = exact - exact.mean(axes, keepdims=True)
    assert_close(norm(x), centred / np.sqrt((centred**2).mean(axes, keepdims=True) + 1e-5), 1e-2)


def randomness(samples: int, seed: int = 0) -> LayerKeys:
    return Randomness.from_rngs(nnx.Rngs(dropout=seed), samples).of_layers(2)


def test_dropout_rate_and_mean():
    dropout = Dropout(0.3)
    out = np.asarray(dropout(jnp.ones((4, 200, 200)), randomness(4)))
    deviation = (0.3 * 0.7 / out.size) ** 0.5
    assert (out == 0).mean() == pytest.approx(0.3, abs=5 * deviation)
    assert out.mean() == pytest.approx(1, abs=5 * deviation / 0.7)
    np.testing.assert_allclose(np.unique(out), [0, 1 / 0.7], rtol=2**-16)
    x = jnp.ones((2, 8))
    assert dropout(x, None) is x
    assert Dropout(0.0)(x, randomness(2)) is x


def test_dropout_differs_between_samples_layers_and_steps():
    x = jnp.ones((2, 100))
    first, second = Dropout(0.5), Dropout(0.5)
    second.layer = 1
    out = first(x, randomness(2))
    assert (out[0] != out[1]).any()
    assert (out != second(x, randomness(2))).any()
    assert (out != first(x, randomness(2, seed=1))).any()


def test_a_samples_dropout_does_not_depend_on_its_company():
    x, keys = jnp.ones((5, 100)), randomness(5)
    together = Dropout(0.5)(x, keys)
    alone = Dropout(0.5)(x[3:4], keys._replace(samples=keys.samples[:, 3:4]))
    np.testing.assert_array_equal(alone[0], together[3])


@pytest.mark.parametrize("channels", [1, 7, 8])
def test_numbers_are_kept_independently_of_each_other(channels):
    """Two values share a random word. The masks of a sample's channels must nevertheless be independent."""
    keep, share = kept(randomness(1).samples[0], 0.3, (20000, channels))
    assert keep.shape == (1, 20000, channels)
    assert share == pytest.approx(0.7, abs=2**-17)
    x = np.asarray(keep[0], float)
    deviation = (share * (1 - share) / 20000) ** 0.5
    np.testing.assert_allclose(x.mean(0), share, atol=5 * deviation)
    both = x.T @ x / 20000 - share**2
    np.testing.assert_allclose(both[~np.eye(channels, dtype=bool)], 0, atol=5 * deviation)


def test_a_stream_gives_new_keys_at_each_call():
    rngs = nnx.Rngs(dropout=0)
    first, second = Randomness.from_rngs(rngs, 2), Randomness.from_rngs(rngs, 2)
    keys = jax.random.key_data(jnp.concatenate([*first.samples[:, None], *second.samples[:, None],
                                                first.shared[None], second.shared[None]]))
    assert len(np.unique(keys, axis=0)) == 6


@pytest.mark.parametrize("is_sparse", [True, False])
def test_attention_weights_are_dropped_in_training_without_bias(is_sparse: bool):
    """The output is linear in the dropped weights, so its mean over many samples equals the output without dropout."""
    attention = MultiHeadAttention(8, UNetConfig(**SMALL, dropout=0.5), nnx.Rngs(0))
    tokens = jnp.broadcast_to(jax.random.normal(jax.random.key(0), (1, 20, 8)), (1000, 20, 8))
    run = jax.jit(lambda tokens, keys: attention(tokens, keys, None, is_sparse=is_sparse))
    out = np.asarray(run(tokens, randomness(1000)))
    spread = out.std(0)
    assert (spread > 1e-3).all()
    without = attention(tokens[:1], None, None, is_sparse=is_sparse)[0]
    assert (np.abs(out.mean(0) - without) < 6 * spread / 1000**0.5).all()


@pytest.fixture(scope="module")
def drawn() -> UNet:
    """A network after initialisation."""
    return nnx.merge(abstract(CONFIG)[0], jax.jit(lambda: nnx.state(UNet(CONFIG, nnx.Rngs(0))))())


def test_the_network_starts_at_zero(drawn: UNet):
    x, t, y = inputs(drawn.config, 2)
    graph, state = nnx.split(drawn)
    out = jax.jit(lambda state, x, t, y: nnx.merge(graph, state)(x, t, y))(state, x, t, y)
    assert out.dtype == np.float32
    assert not out.any()


ZERO = ("out_layers.3.", "proj_out.", "in_proj_bias", "out_proj.bias")


def test_initialisation_is_that_of_pytorch(drawn: UNet):
    state = torch_state(drawn)
    for name, value in state.items():
        if any(part in name for part in ZERO) or name.startswith("out.2."):
            assert not value.any(), name
        elif name.startswith("label_emb"):
            assert value.std() == pytest.approx(1, abs=0.3), name
        elif name.endswith("in_proj_weight"):
            assert_uniform(value, (6 / sum(value.shape)) ** 0.5, name)
        elif f"{name.rpartition('.')[0]}.weight" in state and state[f"{name.rpartition('.')[0]}.weight"].ndim == 1:
            assert (value == name.endswith("weight")).all(), name
        else:
            weight = state[f"{name.rpartition('.')[0]}.weight"]
            assert_uniform(value, np.prod(weight.shape[1:]) ** -0.5, name)


def assert_uniform(value: np.ndarray, bound: float, name: str) -> None:
    assert np.abs(value).max() <= bound * 1.000001, name
    if value.size >= 100:  # enough to estimate moments
        assert value.std() == pytest.approx(bound / 3**0.5, rel=0.2), name
        assert abs(value.mean()) < 5 * bound / value.size**0.5, name
