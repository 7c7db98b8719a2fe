"""Attention with dropout of its weights in one kernel that writes no scores, for GPUs (Pallas, through Triton).

FlashAttention (Dao et al. 2022, arXiv:2205.14135, algorithms 2 and 4) for many short rows of queries. Which weights are
dropped is drawn within the kernel, in the forward and again in the backward pass, by the counter-based generator that
JAX uses (Threefry, Salmon et al. 2011), so the weights are those that `layers.kept` drops.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.custom_partitioning import custom_partitioning
from jax.experimental.pallas import triton
from jax.sharding import NamedSharding, PartitionSpec

from hae_jax.ops.platform import attention_kernels

INTERPRET = False  # tests run the kernel as an ordinary program, anywhere
_STEP = 64  # keys at a time
_SMALLEST = 16  # of the sides of a product on matrix units
_ROTATIONS = (13, 15, 26, 6), (17, 29, 16, 24)  # of Threefry-2x32
_PARITY = 0x1BD11BDA  # the same


def is_chosen(q: jax.Array, queries: int, keys: int) -> bool:  # [..., d]
    """Whether rows of so many queries and keys go to this kernel.

    Matrix units want sides that are powers of two. Keys come in halves, since each random word is for two of them.
    """
    sides = queries, q.shape[-1], _step_of(keys)
    fits = all(side >= _SMALLEST and side & (side - 1) == 0 for side in sides) and keys % 2 == 0
    return fits and q.dtype in (jnp.bfloat16, jnp.float16) and "pallas" in attention_kernels()


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend(
    q: jax.Array,  # [B, n, T, h, d], n rows of each sample
    k: jax.Array,  # [B, n, S, h, d]
    v: jax.Array,  # [B, n, S, h, d]
    keys: jax.Array,  # [B, h, 2] uint32, each head's key in each sample
    rate: float,
) -> jax.Array:  # [B, n, T, h, d]
    """softmax(q.k / sqrt(d)), dropout, times v, of shapes that `is_chosen` allows."""
    return _forward(q, k, v, keys, rate)[0]


def _forward(q, k, v, keys, rate):
    out, lse = _of_samples(_run_forward, "b h w, b n t h d, b n s h d, b n s h d -> b n t h d, b n h t", rate)(
        keys, q, k, v)
    return out, (q, k, v, keys, out, lse)


def _backward(rate, residuals, dout):
    q, k, v, keys, out, lse = residuals
    shift = jnp.einsum("bnthd,bnthd->bnht", dout, out, preferred_element_type=jnp.float32)
    rule = ("b h w, b n t h d, b n s h d, b n s h d, b n t h d, b n h t, b n h t"
            " -> b n t h d, b n s h d, b n s h d")
    gradients = _of_samples(_run_backward, rule, rate)(keys, q, k, v, dout.astype(q.dtype), lse, shift)
    return *gradients, None


attend.defvjp(_forward, _backward)


@functools.cache
def _of_samples(run: Callable[..., Any], rule: str, rate: float) -> Callable[..., Any]:
    """`run` on any mesh: each device works on its own samples, which nothing but this says of a kernel."""
    run = functools.partial(run, rate)

    def partition(mesh, arguments, results):
        spec = arguments[1].sharding.spec
        sharding = NamedSharding(mesh, PartitionSpec(spec[0] if spec else None))
        return mesh, run, jax.tree.map(lambda _: sharding, results), (sharding,) * len(arguments)

    partitioned = custom_partitioning(run)
    partitioned.def_partition(partition, sharding_rule=rule)
    return partitioned


def _run_forward(rate, keys, q, k, v):
    batch, rows, queries, heads, _ = q.shape
    lse = jax.ShapeDtypeStruct((batch, rows, heads, queries), jnp.float32)
    return _call(_forward_kernel, (keys, q, k, v), (jax.ShapeDtypeStruct(q.shape, q.dtype), lse), rate)


def _run_backward(rate, keys, *arrays):
    gradients = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays[:3]]
    return _call(_backward_kernel, (keys, *arrays), gradients, rate)


def _call(kernel, arguments, results, rate):
    """Runs a kernel once for each sample, row and head."""
    batch, rows, _, heads, _ = arguments[1].shape
    kernel = functools.partial(kernel, bound=kept_bound(rate), step=_step_of(arguments[2].shape[2]))
    return pl.pallas_call(
        kernel, out_shape=tuple(results), grid=(batch, rows, heads), in_specs=list(map(_part, arguments)),
        out_specs=tuple(map(_part, results)), interpret=INTERPRET,
        compiler_params=None if INTERPRET else triton.CompilerParams(num_warps=4, num_stages=2),
    )(*arguments)


def _part(array: Any) -> pl.BlockSpec:
    """What a kernel sees of an array: one head of one row, or of one sample."""
    if array.ndim == 3:
        return pl.BlockSpec((None, None, array.shape[2]), lambda sample, row, head: (sample, head, 0))
    if array.ndim == 4:
        return pl.BlockSpec((None, None, None, array.shape[3]), lambda sample, row, head: (sample, row, head, 0))
    return pl.BlockSpec((None, None, array.shape[2], None, array.shape[4]),
                        lambda sample, row, head: (sample, row, 0, head, 0))


def _forward_kernel(keys_ref, q_ref, k_ref, v_ref, out_ref, lse_ref, *, bound, step):
    q, scale = q_ref[...], q_ref.shape[1] ** -0.5
    half, first = k_ref.shape[0] // 2, _first_query(len(q))

    def add(i, carry):
        words = _words(keys_ref, first, i * step, q.shape[0], step, half)
        for start, keep in ((i * step, (words & 0xFFFF) < bound), (half + i * step, (words >> 16) < bound)):
            peak, total, out = carry
            here = pl.ds(start, step)
            scores = pl.dot(q, k_ref[here, :], trans_b=True) * scale
            new_peak = jnp.maximum(peak, scores.max(1))
            p, old = jnp.exp(scores - new_peak[:, None]), jnp.exp(peak - new_peak)
            dropped = jnp.where(keep, p, 0).astype(v_ref.dtype)
            carry = new_peak, total * old + p.sum(1), out * old[:, None] + pl.dot(dropped, v_ref[here, :])
        return carry

    zero = jnp.zeros(q.shape[0], jnp.float32)
    peak, total, out = jax.lax.fori_loop(0, half // step, add, (zero - jnp.inf, zero, jnp.zeros(q.shape, jnp.float32)))
    out_ref[...] = (out / (total * (bound / 2**16))[:, None]).astype(out_ref.dtype)
    lse_ref[...] = peak + jnp.log(total)


def _backward_kernel(keys_ref, q_ref, k_ref, v_ref, dout_ref, lse_ref, shift_ref, dq_ref, dk_ref, dv_ref, *,
                     bound, step):
    q, dout, lse, shift = q_ref[...], dout_ref[...], lse_ref[...][:, None], shift_ref[...][:, None]
    scale, half, share = q_ref.shape[1] ** -0.5, k_ref.shape[0] // 2, bound / 2**16
    first = _first_query(len(q))

    def add(i, dq):
        words = _words(keys_ref, first, i * step, q.shape[0], step, half)
        for start, keep in ((i * step, (words & 0xFFFF) < bound), (half + i * step, (words >> 16) < bound)):
            here = pl.ds(start, step)
            k, v = k_ref[here, :], v_ref[here, :]
            p = jnp.exp(pl.dot(q, k, trans_b=True) * scale - lse)
            dropped = jnp.where(keep, p / share, 0)
            ds = ((dropped * pl.dot(dout, v, trans_b=True) - p * shift) * scale).astype(q.dtype)
            dk_ref[here, :] = pl.dot(ds, q, trans_a=True).astype(dk_ref.dtype)
            dv_ref[here, :] = pl.dot(dropped.astype(q.dtype), dout, trans_a=True).astype(dv_ref.dtype)
            dq += pl.dot(ds, k)
        return dq

    dq = jax.lax.fori_loop(0, half // step, add, jnp.zeros(q.shape, jnp.float32))
    dq_ref[...] = dq.astype(dq_ref.dtype)


def _first_query(queries):  # [] uint32
    """Where this row's queries begin among those of its sample. Not to be asked for in a loop."""
    return (pl.program_id(1) * queries).astype(jnp.uint32)


def _words(keys_ref, first, start, queries, step, half):  # [queries, step] uint32
    """The random words of some weights, of `jax.random.bits(key, (queries of the sample, half))`."""
    query = first + jax.lax.broadcasted_iota(jnp.uint32, (queries, step), 0)
    word = jnp.asarray(start, jnp.uint32) + jax.lax.broadcasted_iota(jnp.uint32, (queries, step), 1)
    return _threefry(keys_ref[0], keys_ref[1], query * jnp.uint32(half) + word)


def _threefry(k0, k1, count):
    """Threefry-2x32 of the counter (0, count): its two words, joined as JAX joins them."""
    def four_rounds(i, carry):
        x0, x1, keys, (now, then) = carry
        for rotation in now:
            x0 = x0 + x1
            x1 = ((x1 << rotation) | (x1 >> (jnp.uint32(32) - rotation))) ^ x0
        k0, k1, k2 = keys
        return x0 + k1, x1 + k2 + (i + 1).astype(jnp.uint32), (k1, k2, k0), (then, now)

    # A loop: Triton's compiler never ends with the long chain, as it tries to move all of it to where it is used.
    rotations = tuple(tuple(map(jnp.uint32, four)) for four in _ROTATIONS)
    keys = k0, k1, k0 ^ k1 ^ jnp.uint32(_PARITY)
    x0, x1, _, _ = jax.lax.fori_loop(0, 5, four_rounds, (jnp.zeros_like(count) + k0, count + k1, keys, rotations))
    return x0 ^ x1


def _step_of(keys: int) -> int:
    """How many of so many keys are worked on at a time: a power of two that divides their half."""
    half = keys // 2
    return min(_STEP, half & -half)


def kept_bound(rate: float) -> int:
    """Below which 16 random bits say that dropout keeps a number; at least one number in 2^16 is kept."""
    return max(1, round((1 - rate) * 2**16))
