"""Time and class embeddings, and the class context, a rank-one matrix that is not built.

Every AttentionBlock uses the outer product c c^T of the class embedding as E context tokens. Its key/value projection
(weight W, bias b) of token s is (W c) c_s + b. It can be computed from the embedding without the product.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from hae_jax.model.config import UNetConfig
from hae_jax.model.layers import linear


class Context(NamedTuple):
    """The class context in its rank-one form."""

    c: jax.Array  # [B, E] float32 class embeddings; zero rows are null
    seen: jax.Array  # [B] bool: rows that attend to their context


def timestep_embedding(
    t: jax.Array,  # [B] timesteps, not rescaled
    width: int,
) -> jax.Array:  # [B, width] float32
    """Sinusoidal embedding (Ho et al. 2020), cosines first: angles t * exp(-ln(10000) i / half)."""
    half = width // 2
    frequencies = jnp.exp(-math.log(10000) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = t.astype(jnp.float32)[:, None] * frequencies
    embedding = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
    return jnp.pad(embedding, ((0, 0), (0, width % 2)))


class EmbeddingMLP(nnx.Module):
    """Linear, SiLU, Linear, from model_channels to E, in float32, since its cost is negligible."""

    def __init__(self, config: UNetConfig, rngs: nnx.Rngs):
        self.linear1 = linear(config.model_channels, config.embedding_width, rngs, dtype=jnp.float32)
        self.linear2 = linear(config.embedding_width, config.embedding_width, rngs, dtype=jnp.float32)

    def __call__(self, x: jax.Array) -> jax.Array:  # [B, model_channels] -> [B, E]
        return self.linear2(nnx.silu(self.linear1(x)))


def context_rule(config: UNetConfig) -> str:
    """The effective rule. "batch" has no effect if the variant or its settings never skip a context."""
    if config.null_context == "batch" and not (config.rules.skips_zero_context and config.memory_optimization):
        return "keep"
    return config.null_context


def class_context(
    c: jax.Array,  # [B, E] float32, zero where null or dropped
    null: jax.Array,  # [B] bool: rows of a null pass in the same batch as a conditional pass
    config: UNetConfig,
) -> Context:
    """Decides which rows see their context (`UNetConfig.null_context`).

    "batch" is the rule of the published `hae_v2c`: the context is absent if all rows of the batch are zero. If a null
    pass shares the batch with a conditional pass, its rows see no context, and the rule is applied to the other rows
    only. Under jit with a batch that is sharded over devices, the rule uses the global batch.
    """
    rule = context_rule(config)
    zero = jnp.all(jnp.abs(c) <= config.zero_threshold, axis=-1)
    if rule == "keep":
        absent = jnp.zeros_like(zero)
    elif rule == "sample":
        absent = zero
    else:
        absent = null | jnp.all(zero | null)
    return Context(c, ~absent)
