"""Attention of each block of queries over its linked blocks of keys, whose backward pass computes the weights again.

It is the form for accelerators: all heads at the same time. The gradient of the gathered blocks is a matrix product,
since sums by index are slow on GPUs, and their order varies there.
"""

import functools

import jax
import jax.numpy as jnp

from hae_jax.ops.threefry import dropped


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def block_attention(
    q: jax.Array,  # [B, h, blocks, size, d]
    k: jax.Array,  # [B, h, blocks, size, d]
    v: jax.Array,  # [B, h, blocks, size, d]
    links: jax.Array,  # [blocks, seen] int32, the blocks of keys of each block of queries
    keys: jax.Array | None,  # [B, h] keys of the dropout
    rate: float,
    tokens: int,
) -> jax.Array:  # [B, h, blocks, size, d]
    """softmax(q.k / sqrt(d)) v over the keys of linked blocks. Scores and sums are float32.

    Args:
      rate: of the attention weights that are dropped, if there are keys.
      tokens: number of tokens. The last block may be filled up with others, which are not seen.
    """
    return _forward(q, k, v, links, keys, rate, tokens)[0]


@functools.partial(jax.jit, static_argnums=(5, 6))  # traced once for each shape
def _forward(q, k, v, links, keys, rate, tokens):
    scores = _scores(q, k, links, tokens)
    peak = scores.max(-1)
    p = jnp.exp(scores - peak[..., None])
    total = p.sum(-1)
    weights = p if keys is None else dropped(p, keys, rate)
    out = _product("bhnit,bhntd->bhnid", weights.astype(v.dtype), _gathered(v, links))
    out = (out / total[..., None]).astype(v.dtype)
    return out, (q, k, v, links, keys, out, peak + jnp.log(total))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _backward(rate, tokens, residuals, dout):
    """As in FlashAttention (Dao et al. 2022, arXiv:2205.14135, algorithm 4), the weights are computed again."""
    q, k, v, links, keys, out, lse = residuals
    # With a barrier, scores and dropout are computed again. Otherwise XLA would store those of the forward pass.
    q, k, v, keys, dout = jax.lax.optimization_barrier((q, k, v, keys, dout))
    p = jnp.exp(_scores(q, k, links, tokens) - lse[..., None])
    weights = p if keys is None else dropped(p, keys, rate)
    shift = (dout.astype(jnp.float32) * out).sum(-1)
    dp = _product("bhnid,bhntd->bhnit", dout, _gathered(v, links))
    ds = ((weights * dp - p * shift[..., None]) * q.shape[-1] ** -0.5).astype(q.dtype)
    dq = _product("bhnit,bhntd->bhnid", ds, _gathered(k, links))
    dk = _product("bhnit,bhnid->bhntd", ds, q)
    dv = _product("bhnit,bhnid->bhntd", weights.astype(v.dtype), dout)
    return dq.astype(q.dtype), _to_blocks(dk, k, links), _to_blocks(dv, v, links), None, None


block_attention.defvjp(_forward, _backward)


def _scores(q: jax.Array, k: jax.Array, links: jax.Array, tokens: int) -> jax.Array:
    """[B, h, blocks, size, seen * size] float32."""
    scores = _product("bhnid,bhntd->bhnit", q, _gathered(k, links)) * q.shape[-1] ** -0.5
    blocks, size = k.shape[2:4]
    if blocks * size != tokens:
        position = (links[:, :, None] * size + jnp.arange(size)).reshape(blocks, 1, -1)
        scores = jnp.where(position < tokens, scores, -jnp.inf)
    return scores


def _gathered(a: jax.Array, links: jax.Array) -> jax.Array:  # -> [B, h, blocks, seen * size, d]
    return a[:, :, links].reshape(*a.shape[:3], -1, a.shape[4])


def _to_blocks(da: jax.Array, a: jax.Array, links: jax.Array) -> jax.Array:  # -> [B, h, blocks, size, d]
    """The gradient of `_gathered`."""
    seen = (links[..., None] == jnp.arange(len(links))).astype(a.dtype)  # [blocks, seen, blocks]
    da = da.astype(a.dtype).reshape(*a.shape[:3], -1, *a.shape[3:])
    precision = "highest" if a.dtype == jnp.float32 else None  # the values are not to be rounded for the sum
    return _product("nsm,bhnsid->bhmid", seen, da, precision=precision).astype(a.dtype)


_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
