"""Values and gradients of the fused GroupNorm (scale, shift, SiLU) against the plain equations in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from network_helpers import assert_close

from hae_jax.ops.group_norm import GroupNorm

GROUPS, CHANNELS, EPSILON = 2, 6, 1e-5


def norm(dtype="float32"):
    module = GroupNorm(CHANNELS, GROUPS, epsilon=EPSILON, dtype=dtype, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    module.scale.value, module.bias.value = (jnp.asarray(rng.normal(size=CHANNELS), "float32") for _ in range(2))
    return module


def plain(module, x, scale, shift, silu):
    """The plain equations in float64 with NumPy."""
    x = np.asarray(x, np.float64)
    grouped = x.reshape(len(x), -1, GROUPS, CHANNELS // GROUPS)
    mean, variance = grouped.mean((1, 3), keepdims=True), grouped.var((1, 3), keepdims=True)
    z = ((grouped - mean) / np.sqrt(variance + EPSILON)).reshape(x.shape)
    z = z * np.asarray(module.scale[...], np.float64) + np.asarray(module.bias[...], np.float64)
    if scale is not None:
        z = z * (1 + np.asarray(scale, np.float64)[:, None, None]) + np.asarray(shift, np.float64)[:, None, None]
    return z / (1 + np.exp(-z)) if silu else z


def flax_form(module, x, scale, shift, silu):
    """Flax's norm with automatic differentiation."""
    z = nnx.GroupNorm.__call__(module, x)
    z = z if scale is None else z * (1 + scale[:, None, None]) + shift[:, None, None]
    return nnx.silu(z) if silu else z


def inputs(side, dtype="float32"):
    rng = np.random.default_rng(2)
    x = rng.normal(size=(2, side, side, CHANNELS)) * rng.uniform(0.5, 2, CHANNELS) + rng.normal(size=CHANNELS)
    x[1] /= 30  # a variance of 1e-3, for which an epsilon of 1e-6 instead of 1e-5 would fail
    return tuple(jnp.asarray(a, dtype) for a in (x, *rng.normal(size=(2, 2, CHANNELS))))


@pytest.mark.parametrize("side", [6, 68], ids=["small", "large, its mean guessed first, its side ragged"])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("silu", [False, True])
def test_values_and_gradients(side, scaled, silu):
    module, (x, scale, shift) = norm(), inputs(side)
    scale, shift = (scale, shift) if scaled else (None, None)
    out = jax.jit(functools.partial(module, silu=silu))(x, scale, shift)
    assert_close(out, plain(module, x, scale, shift, silu), 1e-5)
    graph, params = nnx.split(module)
    weight = jnp.asarray(np.random.default_rng(3).normal(size=x.shape), "float32")

    def gradients(f):
        arguments = (params, x) if scale is None else (params, x, scale, shift)
        pad = (None,) * (4 - len(arguments))
        scalar = lambda *a: (weight * f(nnx.merge(graph, a[0]), *a[1:], *pad, silu=silu)).sum()
        return jax.jit(jax.grad(scalar, argnums=tuple(range(len(arguments)))))(*arguments)

    ours, theirs = gradients(GroupNorm.__call__), gradients(lambda *a, silu: flax_form(*a, silu))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert_close(a, b, 1e-5)


@pytest.mark.parametrize("spike", [0, 1], ids=["where the mean is guessed from", "elsewhere"])
def test_a_bad_guess_of_the_mean_loses_few_digits(spike):
    # All pixels except a few are equal, so that the estimate is at the largest possible distance from the mean.
    x = np.full((1, 64, 64, CHANNELS), 10_000, np.float32)
    x[0, spike::4, spike::4] += 50
    module = norm()
    np.testing.assert_allclose(module(jnp.asarray(x)), plain(module, x, None, None, False), atol=1e-3)


def test_bfloat16_is_rounded_once():
    module, (x, scale, shift) = norm("bfloat16"), inputs(16, "bfloat16")
    out = module(x, scale, shift, silu=True)
    assert out.dtype == jnp.bfloat16
    exact = plain(module, *(np.asarray(a, np.float64) for a in (x, scale, shift)), True)
    np.testing.assert_allclose(np.asarray(out, np.float64), exact, rtol=2**-8, atol=1e-5 * np.abs(exact).max())


def test_a_float32_norm_of_bfloat16_keeps_its_digits():
    module, (x, _, _) = norm(), inputs(6, "bfloat16")
    out = module(x)
    assert out.dtype == jnp.float32
    assert_close(out, plain(module, x, None, None, False), 1e-5)
    assert jax.grad(lambda x: module(x).sum())(x).dtype == jnp.bfloat16
