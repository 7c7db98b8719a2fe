"""`ops.attention` on CPUs, for some queries at a time, so that their scores stay in cache.

With all T x T scores at once, most of the time would be spent on memory traffic.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

ROWS = 256  # queries per step; with fewer, the matrix products are too small to be fast


def forward(block: Callable, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Computes `block(q, k, v)` for some of the queries [B, h, T, d] at a time."""
    split = _split(q, _rows(q.shape[2]))
    return jax.tree.map(_joined, jax.lax.map(lambda q: block(q, k, v), split))


def backward(block: Callable, *arguments: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of q, k and v, from `block(*arrays of some queries, k, v)`."""
    *of_queries, k, v = arguments
    split = functools.partial(_split, rows=_rows(of_queries[0].shape[2]))

    def step(carry, some):
        dq, dk, dv = block(*some, k, v)
        return (carry[0] + dk, carry[1] + dv), dq

    zero = jnp.zeros(k.swapaxes(2, 3).shape, jnp.float32)
    (dk, dv), dq = jax.lax.scan(step, (zero, zero), tuple(map(split, of_queries)))
    return _joined(dq), dk, dv


def _rows(count: int) -> int:
    """The largest number of queries per step that divides `count`."""
    return max(rows for rows in range(1, ROWS + 1) if count % rows == 0)


def _split(x: jax.Array, rows: int) -> jax.Array:  # [B, h, T, ...] -> [T / rows, B, h, rows, ...]
    return jnp.moveaxis(x.reshape(*x.shape[:2], -1, rows, *x.shape[3:]), 2, 0)


def _joined(x: jax.Array) -> jax.Array:  # the inverse of _split
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])
