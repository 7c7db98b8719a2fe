"""Attention over the class context in the published form, for `model.attention = "materialised"`."""

import jax
import jax.numpy as jnp


def attend_with_context(
    q: jax.Array,  # [B, T, h, d]
    k: jax.Array,  # [B, T, h, d]
    v: jax.Array,  # [B, T, h, d]
    c: jax.Array,  # [B, E]
    seen: jax.Array,  # [B] bool, rows that see the context
    kernel: jax.Array,  # [E, h * 2 * d], head-major: each head's k, then its v
    bias: jax.Array,  # [h * 2 * d]
) -> jax.Array:  # [B, T, h, d]
    """Builds the context as the E x E product c c^T. The E context tokens and T tokens share one softmax."""
    batch, _, heads, depth = q.shape
    c = c.astype(q.dtype)
    product = c[:, :, None] * c[:, None, :]  # [B, E, E]
    projected = product @ kernel.astype(q.dtype) + bias.astype(q.dtype)
    projected = projected.reshape(batch, -1, heads, 2, depth)
    k, v = (jnp.concatenate([projected[:, :, :, i], a], axis=1) for i, a in enumerate((k, v)))
    is_pixel = jnp.arange(k.shape[1]) >= c.shape[1]
    return attend(q, k, v, seen[:, None, None, None] | is_pixel)


def attend(
    q: jax.Array,  # [B, T, h, d]
    k: jax.Array,  # [B, S, h, d]
    v: jax.Array,  # [B, S, h, d]
    visible: jax.Array | bool = True,  # broadcast to [B, h, T, S]
) -> jax.Array:  # [B, T, h, d]
    """softmax(q.k / sqrt(d)) v. The scores are stored for the backward pass."""
    scale = q.shape[-1] ** -0.25
    scores = jnp.einsum("bthd,bshd->bhts", q * scale, k * scale, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf)).astype(v.dtype)
    return jnp.einsum("bhts,bshd->bthd", weights, v)
