"""Random words by the hash Threefry-2x32 (Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3", SC).

Also dropout with these words.
"""

import functools
import math

import jax
import jax.numpy as jnp

_ROTATIONS = (13, 15, 26, 6), (17, 29, 16, 24)
_PARITY = 0x1BD11BDA  # of the key schedule


@functools.partial(jax.jit, static_argnames="shape")  # traced once for each shape
def words(
    keys: jax.Array,  # [*B] keys
    shape: tuple[int, ...],  # of one key's words, fewer than 2^32
) -> jax.Array:  # [*B, *shape] uint32
    """Equals `jax.random.bits` with 32 bits for each key.

    XLA fuses it with the operations that use the words. `jax.random.bits` is a loop on CPUs, which takes nine times as
    long there and twice the time to compile. Keys of other generators than Threefry are given to JAX.
    """
    key = jax.random.key_data(keys)
    if key.shape[-1] != 2:
        draw = lambda key: jax.random.bits(key, shape, jnp.uint32)
        for _ in range(keys.ndim):
            draw = jax.vmap(draw)
        return draw(keys)
    first, second = key[..., :1], key[..., 1:]
    schedule = first, second, first ^ second ^ jnp.uint32(_PARITY)
    # Words are counted along one axis, since XLA's CPU backend would unroll loops over several short axes.
    right = jax.lax.iota(jnp.uint32, math.prod(shape)) + second
    left = jnp.broadcast_to(first, right.shape)
    for block in range(5):
        for rotation in _ROTATIONS[block % 2]:
            left += right
            right = (right << rotation | right >> (32 - rotation)) ^ left
        left += schedule[(block + 1) % 3]
        right += schedule[(block + 2) % 3] + jnp.uint32(block + 1)
    return (left ^ right).reshape(*keys.shape, *shape)


def dropped(
    x: jax.Array,  # [*B, ...]
    keys: jax.Array,  # [*B] keys
    rate: float,
) -> jax.Array:
    """Replaces a share `rate` of the values by zero, and scales the others so that the mean is the same."""
    keep, share = kept(keys, rate, x.shape[keys.ndim:])
    return jnp.where(keep, x / share, 0).astype(x.dtype)


def kept(
    keys: jax.Array,  # [*B] keys
    rate: float,
    shape: tuple[int, ...],
) -> tuple[jax.Array, float]:  # [*B, *shape] bool, and the share of values that are kept
    """The values that dropout keeps. The rate is rounded to 2^-16.

    Each value uses sixteen random bits, so one word is drawn for two values.
    """
    *others, last = shape
    drawn, bound = words(keys, (*others, -(-last // 2))), max(1, round((1 - rate) * 2**16))
    halves = (drawn & 0xFFFF) < bound, (drawn >> 16) < bound
    halves = jax.lax.optimization_barrier(halves)  # else fusion would draw each word twice
    return jnp.concatenate(halves, axis=-1)[..., :last], bound / 2**16
