"""Winograd's form of 3x3 convolutions against the direct sum: both tile sizes, strips, several devices, accuracy."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from hae_jax.ops.cpu import winograd

TOLERANCE = 1e-5  # of the largest value


def direct(x, kernel, padding):
    return lax.conv_general_dilated(x, kernel, (1, 1), ((padding, padding),) * 2,
                                    dimension_numbers=("NHWC", "HWIO", "NHWC"))


def inputs(size, padding=1, batch=2, channels=24, outputs=20):
    """An image, a kernel, and an output's gradient, in which all values differ."""
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((3, 3, channels, outputs)) / np.sqrt(9 * channels)
    g = rng.standard_normal((batch, *(n + 2 * padding - 2 for n in size), outputs))
    return [jnp.asarray(a, jnp.float32) for a in (rng.standard_normal((batch, *size, channels)), kernel, g)]


def all_three(x, kernel, g, padding):
    """The output and both gradients. The program is compiled at each call, since the tests change the strips."""
    return jax.jit(lambda x, kernel, g: (
        winograd.convolve(x, kernel, padding), winograd.input_gradient(kernel, g, padding),
        winograd.kernel_gradient(x, g, padding)))(x, kernel, g)


@functools.partial(jax.jit, static_argnums=3)
def direct_all_three(x, kernel, g, padding):
    y, pull = jax.vjp(lambda x, kernel: direct(x, kernel, padding), x, kernel)
    return y, *pull(g)


def largest_errors(got, wanted):
    """The largest error of each array, as a share of its largest value."""
    for a, b in zip(got, wanted, strict=True):
        assert a.shape == b.shape
    return [np.abs(np.asarray(a, np.float64) - b).max() / np.abs(b).max() for a, b in zip(got, wanted, strict=True)]


@pytest.mark.parametrize("strip_tiles", [1, 40, 1000])
@pytest.mark.parametrize(("size", "padding"), [
    ((8, 7), 1), ((9, 10), 0), ((7, 8), 2),
    ((37, 34), 1), ((35, 34), 0), ((32, 33), 2),
])
def test_values_and_gradients_are_those_of_the_direct_sum(monkeypatch, size, padding, strip_tiles):
    monkeypatch.setattr(winograd, "_STRIP_POINTS", 36 * strip_tiles)
    arrays = inputs(size, padding)
    assert max(largest_errors(all_three(*arrays, padding), direct_all_three(*arrays, padding))) < TOLERANCE


@pytest.mark.parametrize("size", [16, 32])
def test_error_is_float32_s_rounding(size):
    arrays = inputs((size, size), batch=1, channels=128, outputs=128)
    with jax.enable_x64(True):
        exact = [np.asarray(a) for a in direct_all_three(*(a.astype(jnp.float64) for a in arrays), 1)]
    assert max(largest_errors(all_three(*arrays, 1), exact)) < TOLERANCE


@pytest.mark.parametrize("size", [16, 32])
def test_an_image_s_output_does_not_depend_on_its_batch(size):
    x, kernel, _ = inputs((size, size), batch=6)
    convolve = jax.jit(lambda x, kernel: winograd.convolve(x, kernel, 1))
    together = np.asarray(convolve(x, kernel))
    for i in (0, 5):
        assert largest_errors([convolve(x[i:i + 1], kernel)[0]], [together[i]])[0] < TOLERANCE


@pytest.mark.parametrize("strip_tiles", [8, 1000])
def test_devices_meet_once(monkeypatch, strip_tiles):
    """The kernel's gradient is summed over devices after the last strip and not after each strip."""
    monkeypatch.setattr(winograd, "_STRIP_POINTS", 36 * strip_tiles)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    by_batch, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    x, _, g = inputs((32, 32), batch=8)
    split = jax.jit(lambda x, g: winograd.kernel_gradient(x, g, 1), out_shardings=whole)
    arguments = jax.device_put((x, g), by_batch)
    assert largest_errors([split(*arguments)], [jax.jit(lambda x, g: winograd.kernel_gradient(x, g, 1))(x, g)])[0] \
        < TOLERANCE
    program = split.lower(*arguments).compile().as_text()
    assert program.count(" all-reduce(") == 1
    loops = [part for part in program.split("\n\n") if "all-reduce(" in part]
    assert len(loops) == 1
    assert "ENTRY" in loops[0]


def test_strips_save_memory(monkeypatch):
    def temporaries(strip_tiles):
        monkeypatch.setattr(winograd, "_STRIP_POINTS", 36 * strip_tiles)
        x, _, g = inputs((64, 64))
        function = jax.jit(lambda x, g: winograd.kernel_gradient(x, g, 1))
        return function.lower(x, g).compile().memory_analysis().temp_size_in_bytes

    assert 3 * temporaries(16) < 2 * temporaries(10_000)


def test_large_images_have_large_tiles_whatever_their_batch():
    """The kernel's shape shows it: 36 points instead of 16."""
    def points(size, batch):
        x, kernel, _ = inputs((size, size), batch=batch)
        text = str(jax.make_jaxpr(lambda x, kernel: winograd.convolve(x, kernel, 1))(x, kernel))
        return {int(n) for n in re.findall(r"f32\[(\d\d),\d+,24,20\]", text)}

    assert [points(size, batch) for size in (31, 32) for batch in (1, 8)] == [{16}, {16}, {36}, {36}]
