"""Softmax attention that keeps no T x T array for its backward pass and also returns its log-sum-exp.

The log-sum-exp is what a softmax needs to be joined with another one afterwards.
"""

import functools

import jax
import jax.numpy as jnp

from hae_jax.ops.platform import by_platform

# Queries to a step on CPU: their scores (rows x T x batch x heads) then live in cache, and most of the time of the
# whole T x T form is memory traffic. Fewer make the matrix products too thin.
CPU_ROWS = 256


@jax.custom_vjp
def attention(
    q: jax.Array,  # [B, h, T, d]
    k: jax.Array,  # [B, h, S, d]
    v: jax.Array,  # [B, h, S, d]
) -> tuple[jax.Array, jax.Array]:  # [B, h, T, d] and [B, h, T], float32
    """softmax(q.k / sqrt(d)) v, and log sum_s exp(q.k_s / sqrt(d)); scores, sums and outputs are float32."""
    return _forward(q, k, v)[0]


def _forward(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, ...]]:
    out, lse = by_platform(q, k, v, cpu=_forward_by_rows, default=_forward_block)
    return (out, lse), (q, k, v, out, lse)


def _backward(residuals: tuple[jax.Array, ...], cotangents: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
    """FlashAttention's backward pass (Dao et al. 2022, algorithm 4): weights recomputed from the log-sum-exp."""
    q, k, v, out, lse = residuals
    dout, dlse = cotangents
    shift = (dout * out).sum(-1) - dlse
    arguments = q, dout.astype(v.dtype), lse, shift, k, v
    dq, dk, dv = by_platform(*arguments, cpu=_backward_by_rows, default=_backward_block)
    return dq.astype(q.dtype), dk.swapaxes(2, 3).astype(k.dtype), dv.swapaxes(2, 3).astype(v.dtype)


attention.defvjp(_forward, _backward)


def _forward_block(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    scores = _scores(q, k)
    peak = scores.max(-1)
    p = jnp.exp(scores - peak[..., None])
    total = p.sum(-1)
    out = _product("bhts,bhsd->bhtd", p.astype(v.dtype), v) / total[..., None]
    return out, peak + jnp.log(total)


def _forward_by_rows(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    rows = _rows(q.shape[2])
    return jax.tree.map(_joined, jax.lax.map(lambda q: _forward_block(q, k, v), _split(q, rows)))


def _backward_block(q, dout, lse, shift, k, v) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What some of the queries add to dq [B, h, T, d], dk and dv, float32, through ds = p (dp - shift).

    dk and dv are [B, h, d, S]: with S first these two products are three times slower in XLA's CPU backend.
    """
    p = jnp.exp(_scores(q, k) - lse[..., None])
    ds = p * (_product("bhtd,bhsd->bhts", dout, v) - shift[..., None]) * q.shape[-1] ** -0.5
    ds = ds.astype(q.dtype)
    dk = _product("bhtd,bhts->bhds", q, ds)
    dv = _product("bhtd,bhts->bhds", dout, p.astype(v.dtype))
    return _product("bhts,bhsd->bhtd", ds, k), dk, dv


def _backward_by_rows(*arguments: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    *of_queries, k, v = arguments
    split = functools.partial(_split, rows=_rows(of_queries[0].shape[2]))

    def step(carry, block):
        dq, dk, dv = _backward_block(*block, k, v)
        return (carry[0] + dk, carry[1] + dv), dq

    zero = jnp.zeros(k.swapaxes(2, 3).shape, jnp.float32)
    (dk, dv), dq = jax.lax.scan(step, (zero, zero), tuple(map(split, of_queries)))
    return _joined(dq), dk, dv


def _scores(q: jax.Array, k: jax.Array) -> jax.Array:  # [B, h, T, S] float32
    return _product("bhtd,bhsd->bhts", q, k) * q.shape[-1] ** -0.5


_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _rows(count: int) -> int:
    """The most queries to a step that divide them all."""
    return max(rows for rows in range(1, CPU_ROWS + 1) if count % rows == 0)


def _split(x: jax.Array, rows: int) -> jax.Array:  # [B, h, T, ...] -> [T / rows, B, h, rows, ...]
    return jnp.moveaxis(x.reshape(*x.shape[:2], -1, rows, *x.shape[3:]), 2, 0)


def _joined(x: jax.Array) -> jax.Array:  # the inverse of _split
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])
