"""`conv2d` against `jax.lax`: each form for CPUs, and JAX's transformations of it."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from hae_jax.model import UNetConfig
from hae_jax.model.layers import ParameterKeys, conv
from hae_jax.ops import convolution

conv2d = functools.partial(convolution.conv2d, form="winograd")

TOLERANCE = 1e-5  # of the largest value; both forms round

# (H, W), C, D, kernel, stride, padding: shapes for each rule and at its limits
SHAPES = [
    ((6, 5), 7, 9, 1, 1, 0),
    ((6, 5), 7, 9, 1, 2, 0),
    ((6, 5), 7, 9, 1, 1, 1),
    ((9, 8), 24, 20, 3, 1, 1),
    ((9, 8), 24, 20, 3, 2, 1),
    ((9, 8), 24, 20, 3, 1, 0),
    ((9, 8), 4, 20, 3, 1, 1),
    ((9, 8), 4, 20, 3, 2, 1),
    ((9, 8), 20, 4, 3, 1, 1),
    ((9, 8), 20, 4, 3, 1, 2),
    ((9, 8), 20, 4, 3, 2, 1),
    ((9, 8), 20, 4, 5, 1, 2),
    ((9, 8), 128, 130, 3, 2, 1),
    ((16, 16), 128, 130, 3, 1, 1),
    ((17, 18), 130, 128, 3, 1, 1),
    ((18, 19), 128, 128, 3, 1, 0),
    ((15, 16), 128, 128, 3, 1, 2),
    ((34, 33), 64, 66, 3, 1, 1),
    ((64, 66), 32, 34, 3, 1, 1),
]


def xla(x, kernel, stride, padding):
    return lax.conv_general_dilated(x, kernel, (stride, stride), ((padding, padding),) * 2,
                                    dimension_numbers=("NHWC", "HWIO", "NHWC"))


def inputs(size=(16, 16), channels=128, outputs=128, kernel=3, batch=1, dtype=np.float32):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((batch, *size, channels))
    scale = 1 / np.sqrt(channels * kernel**2)
    return jnp.asarray(x, dtype), jnp.asarray(rng.standard_normal((kernel, kernel, channels, outputs)) * scale, dtype)


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def value_and_gradients(function, x, kernel, stride=1, padding=1):
    """The output, and the gradients of a loss in which the gradients of all outputs differ."""
    y, pull = jax.vjp(lambda x, kernel: function(x, kernel, stride, padding), x, kernel)
    weights = np.random.default_rng(1).standard_normal(y.shape)
    return y, *pull(jnp.asarray(weights, y.dtype))


def assert_close(got, wanted, tolerance=TOLERANCE):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


@pytest.mark.parametrize(("size", "channels", "outputs", "kernel", "stride", "padding"), SHAPES)
def test_values_and_gradients_are_those_of_lax(size, channels, outputs, kernel, stride, padding):
    arrays = inputs(size, channels, outputs, kernel, batch=2 if channels < 128 else 1)
    assert_close(value_and_gradients(conv2d, *arrays, stride, padding),
                 value_and_gradients(xla, *arrays, stride, padding))


@pytest.mark.parametrize(("channels", "kernel"), [(128, 3), (8, 3), (8, 1)])
def test_bfloat16_is_computed_in_float32(channels, kernel):
    arrays = inputs(channels=channels, outputs=channels, kernel=kernel, dtype=jnp.bfloat16)
    own = value_and_gradients(conv2d, *arrays, padding=kernel // 2)
    assert all(array.dtype == jnp.bfloat16 for array in own)
    in_float32 = value_and_gradients(xla, *(array.astype(jnp.float32) for array in arrays), padding=kernel // 2)
    # The output's gradient and the results are both rounded, with errors of 2^-9 each.
    assert_close([array.astype(jnp.float32) for array in own], in_float32, 2 / 2**9)


def test_vmap_is_a_loop():
    x, kernel = inputs(batch=4)
    x = x.reshape(2, 2, *x.shape[1:])
    kernels = jnp.stack([kernel, 2 * kernel])
    both = jax.vmap(functools.partial(value_and_gradients, conv2d))(x, kernels)
    for i in range(2):
        assert_close([array[i] for array in both], value_and_gradients(conv2d, x[i], kernels[i]))


def test_remat_changes_nothing():
    x, kernel = inputs()
    rematerialised = jax.checkpoint(lambda x, kernel, *how: conv2d(x, kernel, *how), static_argnums=(2, 3))
    assert_close(jax.jit(functools.partial(value_and_gradients, rematerialised))(x, kernel),
                 value_and_gradients(conv2d, x, kernel))


@pytest.mark.parametrize(("channels", "outputs", "kernel"), [(128, 128, 3), (20, 4, 3), (4, 20, 3), (8, 8, 1)])
def test_batch_over_four_devices(channels, outputs, kernel):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    x, weights = inputs((16, 16), channels, outputs, kernel, batch=4)
    by_batch, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    function = functools.partial(value_and_gradients, conv2d, padding=kernel // 2)
    split = jax.jit(function, out_shardings=(by_batch, by_batch, whole))
    assert_close(split(jax.device_put(x, by_batch), jax.device_put(weights, whole)), function(x, weights))


@pytest.mark.parametrize("stride", [1, 2])
def test_the_layer_is_flax_s_with_the_same_parameters(stride):
    layer = conv(8, 12, 3, UNetConfig(), ParameterKeys(jax.random.key(0)), stride=stride)
    assert sorted(nnx.to_flat_state(nnx.state(layer)).paths) == [("bias",), ("kernel",)]
    x = inputs(channels=8)[0]
    assert_close(layer(x), nnx.Conv.__call__(layer, x))


@pytest.mark.parametrize(("shape", "kernel", "left"), [
    ((2, 32, 32, 64), (3, 3, 64, 64), 0),  # Winograd's large tiles, both gradients
    ((1, 16, 16, 128), (3, 3, 128, 128), 1),  # its small ones: XLA's gradient for the kernel
    ((8, 15, 16, 128), (3, 3, 128, 128), 3),  # too small for these with any batch
    ((2, 64, 64, 32), (3, 3, 32, 64), 2),  # only the gradient for the kernel is Winograd's
    ((2, 128, 128, 31), (3, 3, 31, 64), 3),  # too few channels for this in any image
    ((2, 32, 32, 32), (3, 3, 32, 64), 3),  # too few channels: XLA's convolution and both its gradients
    ((2, 16, 16, 32), (1, 1, 32, 8), 0),  # one matrix product
])
def test_a_cpu_s_program_has_the_form_for_its_shape(shape, kernel, left):
    x, k = jnp.zeros(shape), jnp.zeros(kernel)

    def convolutions(form):
        def both(x, k):
            y, gradients = jax.vjp(lambda x, k: convolution.conv2d(x, k, padding=kernel[0] // 2, form=form), x, k)
            return y, gradients(y)

        return jax.jit(both).lower(x, k).as_text().count("stablehlo.convolution")

    assert convolutions("winograd") == left
    assert convolutions("xla") == 3


@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_in_a_loop_have_the_axes_that_cpus_compute_fast(stride):
    """In a loop, XLA computes convolutions with other orders of axes many times slower."""
    xs, kernel = inputs((8, 8), 20, 24, batch=2)[0][:, None], inputs((8, 8), 20, 24)[1]

    def gradients(xs, kernel):
        return lax.map(lambda x: value_and_gradients(conv2d, x, kernel, stride)[1:], xs)

    orders = re.findall(r"dim_labels=(\S+?),", jax.jit(gradients).lower(xs, kernel).compile().as_text())
    assert orders
    assert set(orders) == {"b01f_01io->b01f"}
