"""GroupNorm fused with the next steps of a ResBlock (scale and shift, SiLU), with a custom gradient.

Besides convolutions, a U-Net spends most of its time on reading and writing feature maps for norms. Here, the forward
pass reads a map twice and writes one. The backward pass reads two maps twice and writes one. Only the input is stored.
With automatic differentiation, all intermediate maps would be read and stored.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

_STRIDE = 4  # of the pixels from which the mean is estimated
_WORTH_GUESSING = 4096  # pixels; for smaller maps, the exact mean is cheap


class GroupNorm(nnx.GroupNorm):
    """Flax's GroupNorm with statistics in float32, optionally with scale and shift per sample, and with SiLU."""

    scale: nnx.Param  # never None, unlike Flax's
    bias: nnx.Param

    def __call__(
        self,
        x: jax.Array,  # [B, H, W, C]
        scale: jax.Array | None = None,  # [B, C]; the norm's output is multiplied by 1 + scale
        shift: jax.Array | None = None,  # [B, C]; added after the scale
        *,
        silu: bool = False,
    ) -> jax.Array:  # [B, H, W, C] in the norm's dtype
        """Normalises each group of channels over pixels (Wu and He, "Group Normalization", arXiv:1803.08494)."""
        gain, offset = (jnp.broadcast_to(a[...], (x.shape[0], x.shape[3])) for a in (self.scale, self.bias))
        if scale is not None:
            assert shift is not None
            scale, shift = 1 + scale.astype(jnp.float32), shift.astype(jnp.float32)
            gain, offset = gain * scale, offset * scale + shift
        with jax.named_scope(f"norm, {x.shape[3]} channels, {x.shape[2]} px"):
            return group_norm(x, gain, offset, self.num_groups, self.epsilon, silu, jnp.dtype(self.dtype or x.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def group_norm(
    x: jax.Array,  # [B, H, W, C]
    gain: jax.Array,  # [B, C] float32
    offset: jax.Array,  # [B, C] float32
    groups: int,
    epsilon: float,
    silu: bool,
    dtype: jnp.dtype,
) -> jax.Array:  # [B, H, W, C], dtype
    """z = gain (x - mean) / sqrt(var + epsilon) + offset, or SiLU(z): computed in float32, then rounded to `dtype`."""
    return _forward(x, gain, offset, groups, epsilon, silu, dtype)[0]


@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6))  # traced once for each shape
def _forward(x, gain, offset, groups, epsilon, silu, dtype):
    mean, variance = _moments(x, groups)
    mean, factor = _to_channels(mean, x), _to_channels(jax.lax.rsqrt(variance + epsilon), x)
    z = (x.astype(jnp.float32) - mean) * (factor * _to_pixels(gain)) + _to_pixels(offset)
    return (jax.nn.silu(z) if silu else z).astype(dtype), (x, gain, offset, mean, factor)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _backward(groups, epsilon, silu, dtype, residuals, dy):
    """With n the normalised input and dn = gain dz: dx = (dn - <dn> - n <dn n>) / std, means over the group."""
    x, gain, offset, mean, factor = residuals
    n, dz = _to_normalised(x, dy, gain, offset, mean, factor, silu)
    sums = dz.sum((1, 2)), (dz * n).sum((1, 2))
    # With a barrier, n and dz are computed again. This is faster than writing them as float32 for the sums.
    x, dy, (doffset, dgain) = jax.lax.optimization_barrier((x, dy, sums))
    n, dz = _to_normalised(x, dy, gain, offset, mean, factor, silu)
    mean_dn, mean_dn_n = (_to_channels(_over_group(gain * a, groups, x), x) for a in (doffset, dgain))
    dx = factor * (dz * _to_pixels(gain) - mean_dn - n * mean_dn_n)
    return dx.astype(x.dtype), dgain, doffset


def _to_normalised(x, dy, gain, offset, mean, factor, silu) -> tuple[jax.Array, jax.Array]:
    """The normalised input n, and the gradient of z = gain n + offset."""
    n, dz = (x.astype(jnp.float32) - mean) * factor, dy.astype(jnp.float32)
    if silu:
        z = n * _to_pixels(gain) + _to_pixels(offset)
        sigmoid = jax.nn.sigmoid(z)
        dz *= sigmoid * (1 + z * (1 - sigmoid))
    return n, dz


group_norm.defvjp(_forward, _backward)


def _moments(
    x: jax.Array,  # [B, H, W, C]
    groups: int,
) -> tuple[jax.Array, jax.Array]:  # [B, groups] float32
    """Mean and variance of each group. A large map is read once, for sums of x - k and its square; k is near the mean.

    var = <(x - k)^2> - (<x> - k)^2. If k is the mean of a share f of the pixels, |<x> - k| is at most sqrt(1/f - 1)
    standard deviations for every map. So the difference is at least f times its terms, and few digits cancel.
    """
    stride = _STRIDE if x.shape[1] * x.shape[2] >= _WORTH_GUESSING else 1
    some = x[:, ::stride, ::stride]
    guess = _over_group(some.astype(jnp.float32).sum((1, 2)), groups, some)
    rest = x.astype(jnp.float32) - _to_channels(guess, x)
    mean, square = (_over_group(a.sum((1, 2)), groups, x) for a in (rest, jnp.square(rest)))
    return guess + mean, square - jnp.square(mean)


def _over_group(sums: jax.Array, groups: int, x: jax.Array) -> jax.Array:  # [B, C] over the pixels of x -> [B, groups]
    count = x.shape[1] * x.shape[2] * (x.shape[3] // groups)
    return sums.reshape(len(sums), groups, -1).sum(2) / count


def _to_channels(a: jax.Array, x: jax.Array) -> jax.Array:  # [B, groups] -> [B, 1, 1, C]
    return _to_pixels(jnp.repeat(a, x.shape[3] // a.shape[1], axis=1))


def _to_pixels(a: jax.Array) -> jax.Array:  # [B, C] -> [B, 1, 1, C]
    return a[:, None, None]
