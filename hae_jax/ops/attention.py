"""Softmax attention that stores no T x T array for its backward pass and also returns its log-sum-exp.

With the log-sum-exp, the softmax can be combined with another one afterwards.
"""

import functools

import jax
import jax.numpy as jnp

from hae_jax.ops.cpu import rows as cpu


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def attention(
    q: jax.Array,  # [B, h, T, d]
    k: jax.Array,  # [B, h, S, d]
    v: jax.Array,  # [B, h, S, d]
    by_rows: bool,
) -> tuple[jax.Array, jax.Array]:  # [B, h, T, d] and [B, h, T], float32
    """softmax(q.k / sqrt(d)) v, and log sum_s exp(q.k_s / sqrt(d)); scores, sums and outputs are float32.

    Args:
      by_rows: some queries at a time, for CPUs.
    """
    return _forward(q, k, v, by_rows)[0]


@functools.partial(jax.jit, static_argnums=3)  # traced once for each shape
def _forward(q, k, v, by_rows):
    out, lse = cpu.forward(_forward_block, q, k, v) if by_rows else _forward_block(q, k, v)
    return (out, lse), (q, k, v, out, lse)


@functools.partial(jax.jit, static_argnums=0)
def _backward(by_rows, residuals, cotangents):
    """FlashAttention's backward pass (Dao et al. 2022, arXiv:2205.14135, algorithm 4).

    It recomputes the weights from the log-sum-exp.
    """
    q, k, v, out, lse = residuals
    dout, dlse = cotangents
    arguments = q, dout.astype(v.dtype), lse, (dout * out).sum(-1) - dlse, k, v
    if by_rows:
        dq, dk, dv = cpu.backward(_backward_block, *arguments)
    else:  # without the barrier, XLA would store the scores of the forward pass
        dq, dk, dv = _backward_block(*jax.lax.optimization_barrier(arguments))
    return dq.astype(q.dtype), dk.swapaxes(2, 3).astype(k.dtype), dv.swapaxes(2, 3).astype(v.dtype)


attention.defvjp(_forward, _backward)


def _forward_block(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    scores = _scores(q, k)
    peak = scores.max(-1)
    p = jnp.exp(scores - peak[..., None])
    total = p.sum(-1)
    out = _product("bhts,bhsd->bhtd", p.astype(v.dtype), v) / total[..., None]
    return out, peak + jnp.log(total)


def _backward_block(q, dout, lse, shift, k, v) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The contribution of some queries to dq [B, h, T, d], dk and dv in float32, with ds = p (dp - shift).

    dk and dv are [B, h, d, S]. With S before d, these two products are three times slower in XLA's CPU backend.
    """
    p = jnp.exp(_scores(q, k) - lse[..., None])
    ds = p * (_product("bhtd,bhsd->bhts", dout, v) - shift[..., None]) * q.shape[-1] ** -0.5
    ds = ds.astype(q.dtype)
    dk = _product("bhtd,bhts->bhds", q, ds)
    dv = _product("bhtd,bhts->bhds", dout, p.astype(v.dtype))
    return _product("bhts,bhsd->bhtd", ds, k), dk, dv


def _scores(q: jax.Array, k: jax.Array) -> jax.Array:  # [B, h, T, S] float32
    return _product("bhtd,bhsd->bhts", q, k) * q.shape[-1] ** -0.5


_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
