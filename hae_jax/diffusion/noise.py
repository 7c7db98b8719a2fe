"""Noise fields that depend on their own key alone."""

import jax


def gaussian(
    keys: jax.Array,  # [B] keys, one per sample
    shape: tuple[int, ...],  # of one sample
) -> jax.Array:  # [B, *shape] float32
    """Standard normal noise, each sample from its own key: the same whatever batch it shares."""
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
