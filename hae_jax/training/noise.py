"""Noise as the config asks for it; training, validation and samples draw it here."""

import jax
import jax.numpy as jnp

from hae_jax.diffusion.noise import coarse, gaussian, simplex
from hae_jax.diffusion.process import Process


def draw_noise(
    kind: str,  # "gaussian", "simplex" or "coarse" (diffusion.noise)
    process: Process,
    keys: jax.Array,  # [B] keys, one per sample
    shape: tuple[int, int, int],  # (H, W, C) of one sample
    t: jax.Array,  # [B] steps of the schedule
) -> jax.Array:  # [B, H, W, C] float32
    """Noise fields, each a function of its own key, and of t where it is simplex noise."""
    if kind == "simplex":
        return simplex(keys, shape, process.original(t).astype(jnp.float32))
    return coarse(keys, shape) if kind == "coarse" else gaussian(keys, shape)
