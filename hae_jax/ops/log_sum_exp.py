"""Log-sum-exp and mean of the softmax over rank-one logits a c_s, without storing a T x E array.

For each query, an AttentionBlock needs functions of one number a, the query's slope, over its E context tokens:

    L(a) = log sum_s exp(a c_s)        L'(a) = sum_s p_s c_s        p_s = exp(a c_s - L(a))

The gradient with respect to a needs only L''(a), the variance of c under p. It is a third sum in the same pass.
All sums use differences from c*, the value of c with the largest logit. The exponents a (c_s - c*) are at most zero and
keep their relative precision. Mean and variance are differences from c*, so no digits cancel if the softmax is
concentrated.
"""

import functools

import jax
import jax.numpy as jnp

from hae_jax.ops.cpu import log_sum_exp as cpu


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def log_sum_exp(
    a: jax.Array,  # [B, h, T] float32 slopes
    c: jax.Array,  # [B, E] float32
    by_rows: bool,
) -> tuple[jax.Array, jax.Array]:  # [B, h, T] each
    """L(a) and L'(a) over the E values of c, exact for every a, with gradients for both arguments.

    Args:
      by_rows: by the loops for CPUs.
    """
    return _forward(a, c, by_rows)[0]


def _forward(a, c, by_rows):
    top = _value_at_the_peak(a, c)
    s0, s1, s2 = (cpu.sums if by_rows else _sums)(a, c, top)
    mean = s1 / s0
    variance = s2 / s0 - mean**2
    return (a * top + jnp.log(s0), top + mean), (a, c, jnp.log(s0), mean, variance)


def _backward(by_rows, residuals, cotangents):
    """dL/dc_s = a p_s and dL'/dc_s = p_s (1 + a (c_s - L')). It takes one more pass over T x E, reduced over T."""
    a, c, log_s0, mean, variance = residuals
    dl, dm = cotangents
    top = _value_at_the_peak(a, c)
    # The contribution of a query to the gradient of c_s is p_s (alpha + beta (c_s - c*)).
    beta = dm * a
    alpha = dl * a + dm - beta * mean
    dc = (cpu.gradient if by_rows else _gradient)(a, top, log_s0, alpha, beta, c)
    return dl * (top + mean) + dm * variance, dc


log_sum_exp.defvjp(_forward, _backward)


def _value_at_the_peak(a: jax.Array, c: jax.Array) -> jax.Array:  # [B, h, T]
    """c*, the value of c with the largest logit: the maximum of c, or its minimum if the slope is negative."""
    return jnp.where(a >= 0, c.max(-1)[:, None, None], c.min(-1)[:, None, None])


def _sums(a: jax.Array, c: jax.Array, top: jax.Array) -> tuple[jax.Array, ...]:
    """sum_s p_s d_s^n for n = 0, 1, 2, with d = c - c* and p = exp(a d)."""
    d = c[:, None, None, :] - top[..., None]
    p = jnp.exp(a[..., None] * d)
    return p.sum(-1), (p * d).sum(-1), (p * d * d).sum(-1)


def _gradient(a, top, log_s0, alpha, beta, c) -> jax.Array:  # five of [B, h, T], c [B, E] -> [B, E]
    """sum_t p_ts (alpha_t + beta_t d_ts)."""
    d = c[:, None, None, :] - top[..., None]
    p = jnp.exp(a[..., None] * d - log_s0[..., None])
    return (p * (alpha[..., None] + beta[..., None] * d)).sum((1, 2))
