"""Gaussian and simplex noise against their definition, the original program, and their expected statistics."""

import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from opensimplex.constants import GRADIENTS3
from opensimplex.internals import _init as seeded_permutation
from opensimplex.internals import _noise3 as original_noise
from opensimplex.internals import _noise3a as original_grid

from hae_jax.diffusion.noise import _permutations, coarse, gaussian, simplex
from hae_jax.diffusion.simplex import open_simplex

PERMUTATION, GRADIENT_INDEX = seeded_permutation(7)
ROUNDING = 1e-5  # of float32, on values of order 1
RIM = 2e-4  # largest contribution of a lattice point that the original program leaves out

# One lattice point per volume of 2, and E[g g^T] = (11^2 + 2 * 4^2) / 3 = 51 on the diagonal:
# 51 / 103^2 / 2 * 4 pi * int_0^sqrt(2) (2 - r^2)^8 r^4 dr, the integral being 2^9.5 B(5/2, 9).
FIELD_VARIANCE = 51 / 103**2 / 2 * 4 * math.pi * 2**9.5 * math.gamma(2.5) * math.gamma(9) / math.gamma(11.5)

field = partial(jax.jit(open_simplex), jnp.asarray(PERMUTATION, jnp.int32))
fields = jax.jit(simplex, static_argnames=("shape", "frequency", "octaves", "persistence"))


@pytest.fixture(scope="module")
def positions():
    """[3, N] float32: random, distant, and on the borders of cells (multiples of a quarter, lattice points)."""
    rng = np.random.default_rng(0)
    anywhere = rng.uniform(-40, 40, (3, 3000))
    far = rng.uniform(-1000, 1000, (3, 500))
    borders = rng.integers(-40, 40, (3, 500)) / 4
    lattice = rng.integers(-20, 20, (3, 200)).astype(float)
    lattice += lattice.sum(0) / 3
    return np.concatenate([anywhere, far, borders, lattice], axis=1).astype(np.float32)


@pytest.fixture(scope="module")
def slices():
    """[32, 128, 128, 2] simplex noise at the default settings, t from 0 to 999."""
    return np.asarray(fields(jax.random.split(jax.random.key(0), 32), (128, 128, 2), jnp.linspace(0, 999, 32)))


def lattice_sum(position):  # [3] -> the field by its definition, in float64, over all lattice points around
    position = position.astype(float)
    offsets = np.array(list(itertools.product(range(-2, 4), repeat=3)))
    points = np.floor(position - position.sum() / 6).astype(int) + offsets
    distance = position - (points + points.sum(1, keepdims=True) / 3)
    kernel = np.maximum(2 - (distance**2).sum(1), 0) ** 4
    entry = 0
    for coordinate in points.T:
        entry = PERMUTATION[(entry + coordinate) % 256]
    gradient = GRADIENTS3.reshape(24, 3)[entry % 24]
    return (kernel * (gradient * distance).sum(1)).sum() / 103


def test_gaussian_of_a_sample_depends_on_its_key_alone():
    keys = jax.random.split(jax.random.key(1), 4)
    np.testing.assert_allclose(gaussian(keys, (5, 3))[2], gaussian(keys[2:3], (5, 3))[0], atol=1e-5)


def test_field_is_the_sum_over_the_lattice(positions):
    np.testing.assert_allclose(field(positions), [lattice_sum(p) for p in positions.T], rtol=0, atol=ROUNDING)


def test_field_equals_the_original_program(positions):
    original = np.array([original_noise(*map(float, p), PERMUTATION, GRADIENT_INDEX) for p in positions.T])
    error = np.abs(np.asarray(field(positions)) - original)
    assert np.mean(error < ROUNDING) > 0.98
    assert error.max() < RIM


def test_field_has_no_jumps():
    # Second differences of a smooth field are step^2 |f''|, here below 2e-5. A discontinuity would be much larger.
    step = 2.0**-10
    line = np.arange(2**15) * step
    values = field(np.stack([line - 7, 0.4 - 0.7 * line, 0.3 + 0.2 * line]).astype(np.float32))
    assert np.abs(np.diff(values, 2)).max() < 2e-5 + 2 * ROUNDING


def test_variance_of_the_field_is_the_integral_of_its_kernel():
    # 20000 positions in many cells give it to about 1%. The 24 gradients are not exactly equally frequent among 256.
    values = field(np.random.default_rng(3).uniform(-100, 100, (3, 20000)).astype(np.float32))
    assert float(jnp.var(values)) == pytest.approx(FIELD_VARIANCE, rel=0.04)
    assert abs(float(jnp.mean(values))) < 0.02


def test_simplex_is_the_octaves_of_the_original_program():
    keys, t, shape = jax.random.split(jax.random.key(5), 2), jnp.array([0, 700]), (12, 20, 2)
    noise = fields(keys, shape, t, frequency=32, octaves=3, persistence=0.7)
    for sample, channel in np.ndindex(2, 2):
        permutation = np.asarray(_permutations(keys[sample], 2)[channel], np.int64)
        assert sorted(permutation) == list(range(256))
        expected = sum(
            0.7**k * original_grid(np.arange(20) / f, np.arange(12) / f, np.array([t[sample] / f]),
                                   permutation, permutation % 24 * 3)[0]
            for k, f in enumerate((32.0, 16.0, 8.0)))
        np.testing.assert_allclose(noise[sample, :, :, channel], expected, rtol=0, atol=3 * RIM)


def test_simplex_of_a_sample_depends_on_its_key_and_timestep_alone(slices):
    keys, t = jax.random.split(jax.random.key(0), 32), jnp.linspace(0, 999, 32)
    np.testing.assert_allclose(fields(keys[9:10], (128, 128, 2), t[9:10])[0], slices[9], rtol=0, atol=ROUNDING)


def test_samples_and_channels_are_uncorrelated(slices):
    # Correlations of independent fields have mean 0 and deviation 1 / sqrt(number of independent features).
    flat = slices.transpose(0, 3, 1, 2).reshape(64, -1)
    correlation = np.corrcoef(flat)[np.triu_indices(64, 1)]
    assert abs(correlation.mean()) < 0.01
    assert np.abs(correlation).max() < 0.7
    assert np.sqrt(np.mean(correlation**2)) < 0.25


def test_mean_and_variance_are_those_of_the_original_program(slices):
    rows = np.arange(0.0, 128, 8)
    original = np.array([
        sum(0.8**k * original_grid(rows / f, rows / f, np.array([t / f]), *seeded_permutation(seed))[0]
            for k, f in enumerate(64 / 2.0 ** np.arange(6)))
        for seed, t in enumerate(np.linspace(0, 999, 16))])
    # The coarsest octave has about ten features in a slice. So 16 slices of the original program give the variance to
    # about 5%, and 64 slices give the mean to 0.02.
    assert abs(slices.mean()) < 0.06
    assert slices.var() == pytest.approx(original.var(), rel=0.15)
    # The variances of octaves add up to the variance of the field times the sum of 0.64^k.
    assert slices.var() == pytest.approx(FIELD_VARIANCE * (1 - 0.64**6) / (1 - 0.64), rel=0.1)


def test_spectrum_falls_as_its_octaves(slices):
    # Octave k is the base field scaled down by 2^k, times 0.8^k: its power density in the plane is
    # (0.64 / 4)^k S(q / 2^k). In the middle of the band, where the ends of the sum have little effect, the sum over k
    # is self-similar: P(2 q) = 0.16 P(q). The slope is log2(0.16) = -2.64, and about 0.05 steeper since there is no
    # seventh octave. With an amplitude of 0.7 or 0.9 per octave, it would be -3.03 or -2.30.
    window = np.hanning(128)[:, None] * np.hanning(128)
    images = slices.transpose(0, 3, 1, 2).reshape(-1, 128, 128)
    power = (np.abs(np.fft.fft2(images * window)) ** 2).mean(0)
    cycles = np.fft.fftfreq(128, 1 / 128)
    q = np.hypot(cycles[:, None], cycles)
    ring = [np.log2(power[np.abs(q / centre - 1) < 0.1].mean()) for centre in (8, 8 * 2**0.5, 16, 16 * 2**0.5)]
    slope = (ring[2] - ring[0] + ring[3] - ring[1]) / 2
    assert slope == pytest.approx(math.log2(0.16), abs=0.2)


def test_coarse_noise_is_smooth_and_has_no_seam_at_a_fixed_place():
    """It is interpolated from a grid that is eight times coarser. The grid has a random shift for each key."""
    keys = jax.random.split(jax.random.key(0), 200)
    fields = np.asarray(jax.jit(lambda k: coarse(k, (32, 32, 2)))(keys))
    assert abs(fields.mean()) < 0.05
    assert 0.4 < fields.var(axis=0).mean() < 0.9  # less than 1 between the grid's points
    assert np.ptp(fields.var(axis=0)) < 0.6  # no pixel is always on a grid point
    steps = np.abs(np.diff(fields, axis=1))
    assert np.median(steps) < 0.15  # 0.95 for independent pixels
    alone = coarse(keys[7:8], (32, 32, 2))[0]
    np.testing.assert_allclose(alone, fields[7], atol=1e-6)
