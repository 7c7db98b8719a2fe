"""The softmax over rank-one logits a c_s, known by its log-sum-exp and its mean, without keeping a T x E array.

What an AttentionBlock wants of its E context tokens is, for each query, a function of one number a, the query's slope:

    L(a) = log sum_s exp(a c_s)        L'(a) = sum_s p_s c_s        p_s = exp(a c_s - L(a))

and the gradient with respect to a needs only L''(a), the variance of c under p, a third sum in the same pass.
Every sum is taken from the largest logit's own c: exponents a (c_s - c*) are at most zero and keep their relative
precision, and mean and variance are differences from c*, so nothing cancels where the softmax is concentrated.
"""

import jax
import jax.numpy as jnp

from hae_jax.ops.platform import by_platform


@jax.custom_vjp
def log_sum_exp(
    a: jax.Array,  # [B, h, T] float32 slopes
    c: jax.Array,  # [B, E] float32
) -> tuple[jax.Array, jax.Array]:  # [B, h, T] each
    """L(a) and L'(a) over the E values of c; exact, at any a, with gradients for both arguments."""
    return _forward(a, c)[0]


def _forward(a: jax.Array, c: jax.Array) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, ...]]:
    top = _value_at_the_peak(a, c)
    s0, s1, s2 = by_platform(a, c, top, cpu=_sums_by_columns, default=_sums)
    mean = s1 / s0
    variance = s2 / s0 - mean**2
    return (a * top + jnp.log(s0), top + mean), (a, c, jnp.log(s0), mean, variance)


def _backward(residuals: tuple[jax.Array, ...], cotangents: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """dL/dc_s = a p_s and dL'/dc_s = p_s (1 + a (c_s - L')): one more pass over T x E, reduced over T."""
    a, c, log_s0, mean, variance = residuals
    dl, dm = cotangents
    top = _value_at_the_peak(a, c)
    # p_s (alpha + beta (c_s - c*)) is what a query adds to the gradient of c_s.
    beta = dm * a
    alpha = dl * a + dm - beta * mean
    dc = by_platform(a, top, log_s0, alpha, beta, c, cpu=_gradient_by_rows, default=_gradient)
    return dl * (top + mean) + dm * variance, dc


log_sum_exp.defvjp(_forward, _backward)


def _value_at_the_peak(a: jax.Array, c: jax.Array) -> jax.Array:  # [B, h, T]
    """c*, the value of c with the largest logit: the maximum of c, or its minimum where the slope is negative."""
    return jnp.where(a >= 0, c.max(-1)[:, None, None], c.min(-1)[:, None, None])


# Two schedules of the same sums. Accelerators fuse exponentials and reductions into one kernel that keeps nothing.
# XLA's CPU backend would write the T x E exponentials out, or reduce them without vector instructions, so there a loop
# walks over single values of c (over queries in the gradient) and adds whole vectors that stay in cache: 10x faster.


def _sums(a: jax.Array, c: jax.Array, top: jax.Array) -> tuple[jax.Array, ...]:
    """sum_s p_s d_s^n for n = 0, 1, 2, with d = c - c* and p = exp(a d)."""
    d = c[:, None, None, :] - top[..., None]
    p = jnp.exp(a[..., None] * d)
    return p.sum(-1), (p * d).sum(-1), (p * d * d).sum(-1)


def _sums_by_columns(a: jax.Array, c: jax.Array, top: jax.Array) -> tuple[jax.Array, ...]:
    def add(sums, c_s):
        s0, s1, s2 = sums
        d = c_s[:, None, None] - top
        p = jnp.exp(a * d)
        return (s0 + p, s1 + p * d, s2 + p * d * d), None

    return jax.lax.scan(add, (jnp.zeros_like(a),) * 3, c.T)[0]


def _gradient(a, top, log_s0, alpha, beta, c) -> jax.Array:  # five of [B, h, T], c [B, E] -> [B, E]
    """sum_t p_ts (alpha_t + beta_t d_ts)."""
    d = c[:, None, None, :] - top[..., None]
    p = jnp.exp(a[..., None] * d - log_s0[..., None])
    return (p * (alpha[..., None] + beta[..., None] * d)).sum((1, 2))


def _gradient_by_rows(*arguments: jax.Array) -> jax.Array:
    *rows, c = arguments

    def add(dc, row):
        a, top, log_s0, alpha, beta = (x[..., None] for x in row)  # [B, h, 1]
        d = c[:, None, :] - top
        return dc + jnp.exp(a * d - log_s0) * (alpha + beta * d), None

    zero = jnp.zeros((*rows[0].shape[:2], c.shape[-1]), c.dtype)  # [B, h, E]
    return jax.lax.scan(add, zero, tuple(jnp.moveaxis(x, -1, 0) for x in rows))[0].sum(1)
