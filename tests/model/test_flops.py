"""The count of operations against manual counts and XLA's counts."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from network_helpers import SMALL, abstract

from hae_jax.model import UNetConfig
from hae_jax.model.flops import count_flops, device_peak_flops, forward_flops, training_flops
from hae_jax.model.sparse import block_links, block_size

SQUARE = jax.ShapeDtypeStruct((4, 4), jnp.float32)
PRODUCT = 2 * 4**3


def test_a_dense_network_counted_by_hand():
    """One level of 8 x 8 pixels: an encoder block, the middle, two decoder blocks, attention everywhere."""
    config = UNetConfig(variant="fpdm", image_size=8, in_channels=2, model_channels=32, channel_mult=(1,),
                        num_res_blocks=1, attention_resolutions=(1,), use_scale_shift_norm=True)
    pixels, c, e = 64, 32, 128
    embedding = c * e + e * e

    def res_block(inputs):
        skip = 0 if inputs == c else pixels * inputs * c
        return 9 * pixels * (inputs * c + c * c) + e * 2 * c + skip

    attention = pixels * c * 3 * c + 2 * pixels * pixels * c + pixels * c * c
    blocks = 3 * res_block(c) + 2 * res_block(2 * c) + 4 * attention
    ends = 9 * pixels * (2 * c + c * 2)
    assert forward_flops(config) == 2 * (embedding + blocks + ends)
    assert training_flops(config) == 3 * forward_flops(config)


def test_sparse_attention_costs_what_it_computes():
    blocks = UNetConfig(variant="hae_v2c", **SMALL)
    dense = dataclasses.replace(blocks, sparse_pattern="dense")
    tokens = 12 * 12  # of the only masked scale
    count, seen = block_links(tokens, jax.random.key(0)).shape
    computed = count * seen * block_size(tokens) ** 2
    assert computed < 0.2 * tokens**2
    assert forward_flops(dense) - forward_flops(blocks) == 2 * 2 * 32 * (tokens**2 - computed)


@pytest.mark.parametrize("variant", ["fpdm", "hae", "hae_v2", "hae_v2c"])
def test_xla_counts_about_the_same(variant):
    """XLA also counts elementwise operations and does not count products with padding. Both are small."""
    config = UNetConfig(variant=variant, **SMALL)
    graph, params = abstract(config)
    image = jax.ShapeDtypeStruct((1, 24, 24, 2), jnp.float32)
    row = jax.ShapeDtypeStruct((1,), jnp.int32)
    program = jax.jit(lambda params, x, t, y: nnx.merge(graph, params)(x, t, y)).lower(params, image, row, row)
    assert forward_flops(config) == pytest.approx(program.cost_analysis()["flops"], rel=0.1)


def test_recomputation_does_not_count():
    config = UNetConfig(variant="hae_v2c", **SMALL)
    assert forward_flops(dataclasses.replace(config, remat="block")) == forward_flops(config)


@pytest.mark.parametrize(("f", "products"), [
    (lambda x: x @ x, 1),
    (jax.jit(jax.checkpoint(lambda x: x @ x)), 1),
    (lambda x: jax.lax.scan(lambda c, _: (c @ x, None), x, length=5)[0], 5),
    (lambda x: jax.lax.cond(x[0, 0] > 0, lambda: x @ x @ x, lambda: x), 2),
    (jax.vmap(lambda row: jax.nn.relu(jnp.ones((4, 4)) @ row)), 1),
    (jax.grad(lambda x: (jnp.sin(x) @ x).sum()), 3),
])
def test_products_inside_of_other_functions(f, products):
    assert count_flops(f, SQUARE) == products * PRODUCT


def test_convolutions_in_groups_and_with_strides():
    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (2, 2), "SAME", feature_group_count=2,
                                            dimension_numbers=("NHWC", "HWIO", "NHWC"))

    x, kernel = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, 8, 8, 6), (3, 3, 3, 10)))
    assert count_flops(convolve, x, kernel) == 2 * (4 * 4 * 10) * (3 * 3 * 3)


def test_a_loop_of_unknown_length_is_refused():
    with pytest.raises(ValueError, match="while loop"):
        count_flops(lambda x: jax.lax.while_loop(lambda y: y[0, 0] < 1, lambda y: y @ y, x), SQUARE)


@pytest.mark.parametrize(("kind", "dtype", "peak"), [
    ("NVIDIA H100 80GB HBM3", "bfloat16", 989e12),
    ("NVIDIA H100 PCIe", "bfloat16", 756e12),
    ("NVIDIA A100-SXM4-80GB", "float32", 156e12),
    ("NVIDIA L40S", "bfloat16", 362e12),
    ("TPU v5 lite", "bfloat16", 197e12),
    ("cpu", "float32", None),
])
def test_peaks_are_known_by_the_device_s_name(kind, dtype, peak):
    assert device_peak_flops(SimpleNamespace(device_kind=kind), dtype) == peak
