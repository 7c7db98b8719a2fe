"""Every option works in every variant in training, with odd token grids."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from network_helpers import SMALL, abstract, assert_close, filled, inputs

from hae_jax.model import VARIANTS, UNetConfig
from hae_jax.model.layers import Randomness

# With 18 pixels and two levels, hybrid blocks have 9 x 9 tokens, which neither 4 nor 8 divides.
ODD = {"image_size": 18, "model_channels": 32, "channel_mult": (1, 1), "num_res_blocks": 1,
       "attention_resolutions": (2,), "dropout": 0.2, "sparse_redraw": True, "num_classes": 2, "num_heads": 4,
       "use_scale_shift_norm": True}
COMBINATIONS = {
    "fpdm": {"in_channels": 1, "num_classes": None},
    "hae": {"in_channels": 3, "out_channels": 6, "num_classes": 3, "conv_resample": False},
    "hae_lite": {"in_channels": 1, "num_classes": None, "resblock_updown": True,
                 "num_head_channels": 16},
    "hae_v2": {"in_channels": 3, "num_heads_upsample": 2, "use_scale_shift_norm": False, "null_context": "sample",
               "sparse_pattern": "trained", "bottleneck_ratio": 0.001},
    "hae_v2c": {"in_channels": 1, "out_channels": 2, "num_classes": 3},
}


def training_pass(config: UNetConfig) -> Callable:
    """(state, x, t, y, key) -> (loss, output), gradients, as in training: with dropout and a row's label dropped."""
    graph, _ = abstract(config)

    def loss(state, x, t, y, key):
        keys = Randomness(jax.random.split(key, len(x)), key)
        out = nnx.merge(graph, state)(x, t, y, drop=jnp.arange(len(x)) == 0, rngs=keys)
        return jnp.mean(jnp.square(out - 1)), out

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@pytest.mark.parametrize("variant", list(COMBINATIONS))
def test_odd_token_grids_train_in_every_variant(variant: str):
    config = UNetConfig(variant=variant, **ODD | COMBINATIONS[variant])
    state = filled(config)[1]
    run, arrays = training_pass(config), inputs(config, 2)
    (_, out), gradients = run(state, *arrays, jax.random.key(0))
    assert out.shape == (2, 18, 18, config.out_channels)
    assert all(np.isfinite(a).all() for a in jax.tree.leaves((out, gradients)))
    # Patch sizes that do not divide the grid have no regional tokens. Without classes, there is no context.
    allowed = ("regional_norms", "patch_projections") + (("encoder_kv",) if config.num_classes is None else ())
    idle = [jax.tree_util.keystr(path) for path, a in jax.tree_util.tree_leaves_with_path(gradients) if not a.any()]
    assert not [name for name in idle if not any(part in name for part in allowed)]
    (_, other), _ = run(state, *arrays, jax.random.key(1))
    assert np.abs(other - out).max() > 1e-3  # dropout and the pattern depend on the key


@pytest.mark.parametrize("size", [(20, 36), (4, 4)])
def test_images_need_not_have_the_configured_size(size: tuple[int, int]):
    for variant in VARIANTS:
        config = UNetConfig(variant=variant, **ODD)
        x = jnp.zeros((2, *size, config.in_channels))
        graph, state = abstract(config)
        t = jnp.zeros(2, jnp.int32)
        out = jax.eval_shape(lambda state, graph=graph, x=x, t=t: nnx.merge(graph, state)(x, t, t), state)
        assert out.shape == x.shape


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_without_hybrid_blocks_every_variant_has_the_plain_networks_parameters(variant: str):
    describe = lambda config: jax.tree.map(lambda a: (a.shape, str(a.dtype)), abstract(config)[1])
    plain = describe(UNetConfig(variant="fpdm", **SMALL))
    assert describe(UNetConfig(variant=variant, use_hae=False, **SMALL)) == plain


@pytest.fixture(scope="module")
def reference():
    """config, state, inputs, and the results of the plain network in training."""
    config = UNetConfig(variant="hae", **SMALL, dropout=0.2)  # of the variants with hybrid blocks, quick to compile
    state = filled(config)[1]
    arrays = (*inputs(config, 2), jax.random.key(0))
    return config, state, arrays, training_pass(config)(state, *arrays)


@pytest.mark.parametrize("remat", ["block", "full"])
def test_rematerialisation_changes_nothing(reference, remat: str):
    config, state, arrays, ((_, expected), expected_gradients) = reference
    (_, out), gradients = training_pass(dataclasses.replace(config, remat=remat))(state, *arrays)
    assert_close(out, expected, 1e-5)
    largest = max(np.abs(a).max() for a in jax.tree.leaves(expected_gradients))
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * largest)


def test_rematerialisation_is_in_the_program():
    """Layers are recomputed; with "full", blocks of the U-Net as well, and their layers within them."""
    config = UNetConfig(**SMALL, dropout=0.2)
    state, (x, t, y), depths = filled(config)[1], inputs(config, 2), {}
    for remat in ("none", "block", "full"):
        graph, _ = abstract(dataclasses.replace(config, remat=remat))
        program = jax.make_jaxpr(lambda state, graph=graph: nnx.merge(graph, state)(x, t, y))(state).jaxpr
        depths[remat] = remat_depths(program)
    assert depths["none"] == []
    layers = len(depths["block"])
    assert depths["block"] == [1] * layers
    # The encoder has a convolution, two blocks and a Downsample, the decoder two blocks on each of two levels.
    # Between them is the middle block.
    assert sorted(depths["full"]) == [1] * 9 + [2] * layers


def remat_depths(jaxpr, depth: int = 0) -> list[int]:
    """The nesting depth of each recomputed part of a program, without those in loops, which attention always has."""
    found = []
    for equation in jaxpr.eqns:
        here = depth + (equation.primitive.name in ("remat2", "checkpoint") and equation.params["prevent_cse"])
        found += [here] * (here - depth)
        for value in jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            found += remat_depths(inner, here) if hasattr(inner, "eqns") else []
    return found


def test_bfloat16_is_close_and_keeps_float32_parameters(reference):
    config, state, arrays, ((_, expected), expected_gradients) = reference
    low = dataclasses.replace(config, dtype="bfloat16")
    assert all(a.dtype == jnp.float32 for a in jax.tree.leaves(abstract(low)[1]))
    (_, out), gradients = training_pass(low)(state, *arrays)
    assert out.dtype == jnp.float32
    assert 1e-4 < relative(out, expected) < 0.03  # computed in bfloat16, with a small error
    assert (out != out.astype(jnp.bfloat16)).any()  # the head is not rounded
    assert relative(gradients, expected_gradients) < 0.02
    assert all(a.dtype == jnp.float32 for a in jax.tree.leaves(gradients))


def relative(actual, expected) -> float:
    """L2 distance of two trees, relative to the expected one's norm."""
    pairs = [(np.asarray(a, np.float64), np.asarray(b, np.float64))
             for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)]
    return (sum(np.sum((a - b) ** 2) for a, b in pairs) / sum(np.sum(b**2) for _, b in pairs)) ** 0.5
