"""Attention with cuDNN's kernel, which stores no scores (FlashAttention, Dao et al. 2022, arXiv:2205.14135).

The kernel takes only queries, keys and values. So the class context is passed as two additional keys.
"""

import jax
import jax.numpy as jnp

_EXTRA = 8  # channels that the context adds to a head; kernels require a multiple of 8
_MOST_NUMBERS = 128  # channels per head, at most
_NOT_SEEN = -1e4  # a logit with weight zero; it is finite, so that zero times it is zero


def fits(q: jax.Array) -> bool:  # [B, T, h, d]
    """Whether the kernel supports heads of this size, with and without the context, and this number of tokens."""
    return q.shape[-1] % _EXTRA == 0 and q.shape[-1] + _EXTRA <= _MOST_NUMBERS and q.shape[1] % 2 == 0


def attend(
    q: jax.Array,  # [B, T, h, d]
    k: jax.Array,  # [B, S, h, d]
    v: jax.Array,  # [B, S, h, d]
) -> jax.Array:  # [B, T, h, d]
    """softmax(q.k / sqrt(d)) v."""
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")


def attend_rows(
    q: jax.Array,  # [B, n, T, h, d]
    k: jax.Array,  # [B, n, S, h, d]
    v: jax.Array,  # [B, n, S, h, d]
) -> jax.Array:  # [B, n, T, h, d]
    """`attend` for n rows of each sample."""
    rows = [a.reshape(-1, *a.shape[2:]) for a in (q, k, v)]
    return attend(*rows).reshape(q.shape)


def attend_with_token(
    q: jax.Array,  # [B, T, h, d]
    k: jax.Array,  # [B, T, h, d]
    v: jax.Array,  # [B, T, h, d]
    logit: jax.Array,  # [B, T, h] float32, of one additional token per query; minus infinity where it is not seen
    factor: jax.Array,  # [B, T, h] float32
    direction: jax.Array,  # [B, h, d] float32
    base: jax.Array,  # [h, d] float32
) -> jax.Array:  # [B, T, h, d]
    """Attention over T tokens and an additional token, with a logit per query and the value factor * direction + base.

    The queries are extended by the logit, and the token's key by a one, so that their product contains the logit.
    bfloat16 is too coarse for the logit, so its rounding error is a second additional channel. The token's value is
    `base`, extended by a one. So the output contains the token's weight, by which `direction` is then scaled. The token
    is added twice with half of the weight each, since kernels require an even number of keys.
    """
    batch, tokens, heads, depth = q.shape
    logit = (jnp.maximum(logit, _NOT_SEEN) - jnp.log(2.0)) * depth**0.5
    coarse = logit.astype(q.dtype)
    fine = (logit - coarse.astype(jnp.float32)).astype(q.dtype)
    empty = jnp.zeros((batch, tokens, heads, _EXTRA - 2), q.dtype)
    q = jnp.concatenate([q, coarse[..., None], fine[..., None], empty], -1)
    key = jnp.zeros(depth + _EXTRA).at[depth:depth + 2].set(1)
    value = jnp.pad(base, ((0, 0), (0, _EXTRA))).at[:, depth].set(1)
    k, v = _with_token(k, key), _with_token(v, value)
    out = jax.nn.dot_product_attention(q, k, v, scale=depth**-0.5, implementation="cudnn")
    weight = out[..., depth, None].astype(jnp.float32)
    return (out[..., :depth] + weight * factor[..., None] * direction[:, None]).astype(q.dtype)


def _with_token(
    a: jax.Array,  # [B, T, h, d]
    token: jax.Array,  # [d + extra] or [h, d + extra]
) -> jax.Array:  # [B, T + 2, h, d + extra]
    batch, _, heads, _ = a.shape
    a = jnp.pad(a, ((0, 0), (0, 0), (0, 0), (0, _EXTRA)))
    return jnp.concatenate([a, jnp.broadcast_to(token, (batch, 2, heads, a.shape[-1])).astype(a.dtype)], 1)
