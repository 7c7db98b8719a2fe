"""Noise fields. The field of a sample depends on the key of the sample alone.

Sources: Wyatt et al. 2022, "AnoDDPM: Anomaly Detection with Denoising Diffusion Probabilistic Models using Simplex
Noise", CVPR Workshops; Kascenas et al. 2022, "Denoising Autoencoders for Unsupervised Anomaly Detection in Brain MRI",
MIDL.
"""

import functools

import jax
import jax.numpy as jnp

from hae_jax.diffusion.process import Process
from hae_jax.diffusion.simplex import open_simplex


def gaussian(
    keys: jax.Array,  # [B] keys, one per sample
    shape: tuple[int, ...],  # of one sample
) -> jax.Array:  # [B, *shape] float32
    """eps ~ N(0, I) (Ho et al. 2020, arXiv:2006.11239, eq. 4).

    Each sample has its own key, so it does not depend on the other samples of its batch.
    """
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


@functools.partial(jax.jit, static_argnames=("shape", "frequency", "octaves", "persistence"))  # slow to trace
def simplex(
    keys: jax.Array,  # [B] keys, one per sample
    shape: tuple[int, ...],  # (H, W, C) of one sample
    t: jax.Array,  # [B] timesteps, the field's third coordinate
    *,
    frequency: float = 64,
    octaves: int = 6,
    persistence: float = 0.8,
) -> jax.Array:  # [B, H, W, C] float32
    """Simplex noise of several octaves (AnoDDPM, Wyatt et al. 2022, section 3.2), not normalised.

    sum_k persistence^k OpenSimplex(x / f_k, y / f_k, t / f_k), f_k = frequency / 2^k pixels, x along W and y along H;
    mean 0 and standard deviation about 0.51 by default. Each sample and channel has one permutation, drawn from the
    sample's key, for all octaves and timesteps. The same key at a neighbouring t therefore gives a similar field.
    """
    height, width, channels = shape
    y, x = jnp.meshgrid(jnp.arange(height, dtype=jnp.float32), jnp.arange(width, dtype=jnp.float32), indexing="ij")

    def one_sample(key: jax.Array, t: jax.Array) -> jax.Array:  # [H, W, C]
        permutations = _permutations(key, channels)
        position = jnp.stack([x, y, jnp.full_like(x, t)])

        def add_octave(value, octave):
            scaled = position * (2.0**octave / frequency)
            field = jax.vmap(open_simplex, in_axes=(0, None), out_axes=-1)(permutations, scaled)
            return value + persistence**octave * field, None

        return jax.lax.scan(add_octave, jnp.zeros(shape, jnp.float32), jnp.arange(octaves, dtype=jnp.float32))[0]

    return jax.vmap(one_sample)(keys, t)


def coarse(
    keys: jax.Array,  # [B] keys, one per sample
    shape: tuple[int, ...],  # (H, W, C) of one sample
    *,
    factor: int = 8,
) -> jax.Array:  # [B, H, W, C] float32
    """Gaussian noise on a grid `factor` times as coarse, interpolated, then shifted cyclically at random.

    The noise of the denoising autoencoder (Kascenas et al. 2022, section 2): 16 x 16 points for 128 x 128 pixels.
    """
    height, width, channels = shape
    grid = (max(1, height // factor), max(1, width // factor), channels)

    def one_sample(key: jax.Array) -> jax.Array:  # [H, W, C]
        values, down, right = jax.random.split(key, 3)
        field = jax.image.resize(jax.random.normal(values, grid), shape, "bilinear")
        shift = jnp.stack([jax.random.randint(down, (), 0, height), jax.random.randint(right, (), 0, width)])
        return jnp.roll(field, shift, axis=(0, 1))

    return jax.vmap(one_sample)(keys)


def draw_noise(
    kind: str,  # "gaussian", "simplex" or "coarse" (diffusion.noise)
    process: Process,
    keys: jax.Array,  # [B] keys, one per sample
    shape: tuple[int, ...],  # (H, W, C) of one sample
    t: jax.Array,  # [B] steps of the schedule
) -> jax.Array:  # [B, H, W, C] float32
    """Noise of the configured kind. Simplex noise also depends on t."""
    if kind == "simplex":
        return simplex(keys, shape, process.original(t).astype(jnp.float32))
    return coarse(keys, shape) if kind == "coarse" else gaussian(keys, shape)


def _permutations(key: jax.Array, count: int) -> jax.Array:  # [count, 256]
    return jax.vmap(lambda key: jax.random.permutation(key, 256))(jax.random.split(key, count))
