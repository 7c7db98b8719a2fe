"""The naive baselines compute the same values as our forms, with the additional work that defines them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hae_jax.benchmark import naive
from hae_jax.diffusion.process import Process
from hae_jax.diffusion.schedule import make_schedule
from hae_jax.errors import UserError
from hae_jax.localization.denoisers import network_denoisers, step_noise
from hae_jax.localization.forward_process import ForwardSettings, forward_process
from hae_jax.model import UNet, UNetConfig, attention
from hae_jax.model.conditioning import Context
from hae_jax.ops import group_norm

# The hybrid block has 12 x 12 tokens, enough to be sparse. Two of the four rows have no label.
NETWORK = {"image_size": 24, "in_channels": 2, "model_channels": 32, "channel_mult": (1, 1), "num_res_blocks": 1,
           "attention_resolutions": (2,), "num_classes": 2, "num_heads": 4, "use_scale_shift_norm": True}


def test_the_network_is_the_same_with_its_gradients():
    ours = UNetConfig(variant="hae_v2c", **NETWORK)
    theirs = dataclasses.replace(ours, **naive.fields_of(naive.PIECES))
    assert (theirs.attention, theirs.convolution) == ("materialised", "xla")
    # No parameter is zero, so that every path affects the output.
    shapes, rng = nnx.state(nnx.eval_shape(lambda: UNet(ours, rngs=nnx.Rngs(0)))), np.random.default_rng(0)
    params = jax.tree.map(lambda a: jnp.asarray(rng.normal(0, 0.1, a.shape), jnp.float32), shapes)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(4, 24, 24, 2)), jnp.float32)
    t, y, drop = jnp.arange(4) * 200, jnp.array([0, 1, 0, 1]), jnp.array([False, True, False, True])

    def output_and_gradients(network):
        graph = nnx.graphdef(nnx.eval_shape(lambda: UNet(network, rngs=nnx.Rngs(0))))

        def half_square(params):
            out = nnx.merge(graph, params)(x, t, y, drop=drop)
            return jnp.square(out).mean() / 2, out

        return jax.jit(jax.grad(half_square, has_aux=True))(params)

    for one, other in zip(output_and_gradients(theirs), output_and_gradients(ours), strict=True):
        assert_same_tree(one, other)


@pytest.mark.parametrize("silu", [True, False])
def test_norm_is_the_same(silu):
    rng = np.random.default_rng(0)
    inputs = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 8, 8, 12), (2, 12), (2, 12)))
    fixed = 3, 1e-5, silu, jnp.dtype("float32")
    assert_same(lambda norm, *inputs: norm(*inputs, *fixed), group_norm.group_norm, naive.plain_group_norm, *inputs)


@pytest.mark.parametrize("seen", [True, False])
def test_context_is_the_same(seen):
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, 2, 20, 4, 8)).astype(np.float32)
    c, kernel, bias = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 16), (16, 64), (64,)))

    def attend(form, q, k, v, c, kernel, bias):
        return attention.attend_with_context(q, k, v, Context(c, jnp.array([True, seen])), kernel, bias, form)

    assert_same(attend, "xla", "materialised", q, k, v, c, kernel, bias)


def assert_same(call, ours, theirs, *inputs):
    """Asserts that outputs and gradients of `call(function, *inputs)` agree."""
    results = []
    for function in (ours, theirs):
        @jax.jit
        def both(*inputs, function=function):
            out, pull = jax.vjp(lambda *inputs: call(function, *inputs), *inputs)
            return out, pull(jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape))

        results.append(both(*inputs))
    assert_same_tree(*results)


def assert_same_tree(actual, desired):
    """Asserts that all arrays agree, relative to the largest value in the tree."""
    largest = max(np.abs(a).max() for a in jax.tree.leaves(desired))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * largest), actual, desired)


def small_model(x, t, y=None, null=False):
    """A replacement for a network: a matrix product over the pixels. The label's effect decreases with t."""
    size = x.shape[1]
    shift = 0 * t if null is True else jnp.where(null, 0, (1 + y) * jnp.exp(-t / 80))
    mixing = jnp.asarray(np.random.default_rng(0).normal(0, 1 / size, (size, size)), jnp.float32)
    shift, t = (a[:, None, None, None] for a in (shift, t))
    return jnp.einsum("ij,bjwc->biwc", mixing, jnp.tanh(x + t / 1000 + shift * jnp.cos(t / 100 + 3 * x)))


def translations(settings):
    """The compiled forward process with the small model, ours and naive, and its slices."""
    process = Process(make_schedule("linear", 1000, "20"))
    x0 = jnp.asarray(np.random.default_rng(2).uniform(-1, 1, (3, 8, 8, 4)), jnp.float32)
    noise = step_noise(jax.random.split(jax.random.key(0), 3), x0.shape[1:])
    denoisers = network_denoisers(small_model)
    forms = (lambda x0: forward_process(process, denoisers, x0, noise, settings),
             lambda x0: naive.translate(process, small_model, x0, noise, settings))
    return [jax.jit(form).lower(x0).compile() for form in forms], x0


@pytest.mark.parametrize("fields", [{}, {"reference": "null"}, {"inversion": "exact"}, {"d_reverse": False}])
def test_translation_is_the_same(fields):
    (ours, theirs), x0 = translations(ForwardSettings(12, **fields))
    ours, theirs = ours(x0), theirs(x0)
    assert len(np.unique(ours.t_e)) > 1
    np.testing.assert_array_equal(theirs.t_e, ours.t_e)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5), ours, theirs)


def test_compiler_keeps_the_fourth_pass():
    compiled, _ = translations(ForwardSettings(2))
    products = [program.as_text().count(" dot(") for program in compiled]
    assert products == [2, 4]  # two of our products are one with twice the rows


def test_pieces_are_those_that_change_something(monkeypatch):
    network = UNetConfig(num_classes=2)
    assert naive.pieces_of("naive", network, translation=False) == ("attention", "convolution")
    assert naive.pieces_of("naive", network, translation=True) == naive.PIECES
    assert naive.pieces_of("translation", network, translation=False) == ()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")  # where our form of convolution is XLA's
    assert naive.pieces_of("naive", network, translation=False) == ("attention",)
    with pytest.raises(UserError, match="choose among naive, attention"):
        naive.pieces_of("speed", network, translation=False)
