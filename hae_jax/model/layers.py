"""Basic layers of the U-Net: convolutions, norms, resampling, dropout, ResBlock. All arrays are NHWC."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer

from hae_jax.model.config import HYBRID_HEADS, NORM_GROUPS, UNetConfig
from hae_jax.ops.convolution import conv2d
from hae_jax.ops.forms import convolution_form
from hae_jax.ops.group_norm import GroupNorm
from hae_jax.ops.threefry import dropped

EPSILON = 1e-5  # of every norm, as in PyTorch; Flax's default is 1e-6


class Randomness(NamedTuple):
    """Keys of one training step. Each sample has its own, so its dropout does not depend on the rest of the batch."""

    samples: jax.Array  # [B] keys
    shared: jax.Array  # one key for values of the whole batch (the sparse pattern)

    @classmethod
    def from_rngs(cls, rngs: nnx.Rngs, batch: int) -> "Randomness":
        """Derives the keys from the next key of the stream "dropout"."""
        key, shared = jax.random.split(rngs.dropout())
        samples = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(batch))
        return cls(samples, shared)

    def of_layers(self, count: int) -> "LayerKeys":
        """Derives the keys of all layers at once, since a hash per layer would make programs slow to compile."""
        numbered = jax.vmap(jax.random.fold_in, (None, 0))  # a key for each number
        layers, heads = jnp.arange(count), jnp.arange(HYBRID_HEADS)
        samples = jax.vmap(numbered, (0, None), 1)(self.samples, layers)
        return LayerKeys(samples, jax.vmap(jax.vmap(numbered, (0, None)), (0, None))(samples, heads),
                         numbered(self.shared, layers))


class LayerKeys(NamedTuple):
    """`Randomness` of each layer of a network."""

    samples: jax.Array  # [layers, B] keys
    heads: jax.Array  # [layers, B, HYBRID_HEADS] keys
    shared: jax.Array  # [layers] keys


class Conditioning(NamedTuple):
    """The inputs of each block besides the features."""

    emb: jax.Array  # [B, E] float32, time plus class
    context: Any = None  # conditioning.Context, or None without class context
    randomness: LayerKeys | None = None  # None: no dropout
    sparse_masks: tuple[jax.Array, ...] | None = None  # [N, N] bool each, True is blocked; None: the config's pattern


class ParameterKeys:
    """Stands in for `nnx.Rngs` while a network is built, and numbers its keys in Python.

    `nnx.Rngs` counts in a Variable. Where the network is traced (for its shapes, or to initialise it sharded), each
    count searches the program so far, so that a large network would take a minute to build.
    """

    def __init__(self, key: jax.Array):
        self._key, self._count = key, 0

    @classmethod
    def of(cls, rngs: nnx.Rngs) -> nnx.Rngs:
        """Made from the next key of a stream. The type is that which Flax's layers expect; they only call `params`."""
        return cast(nnx.Rngs, cls(rngs.params()))

    def params(self) -> jax.Array:
        """The next key."""
        self._count += 1
        return jax.random.fold_in(self._key, self._count)


def torch_uniform(fan_in: int) -> nnx.Initializer:
    """PyTorch's default for Linear and conv weights and biases: uniform in +-1/sqrt(fan_in)."""
    return uniform(1 / math.sqrt(fan_in))


def uniform(bound: float) -> nnx.Initializer:
    """Uniform in +-bound."""
    return _initializer(lambda rng, shape: rng.uniform(-bound, bound, shape),
                        lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound))


def standard_normal() -> nnx.Initializer:
    """Normal with mean 0 and variance 1."""
    return _initializer(lambda rng, shape: rng.standard_normal(shape), jax.random.normal)


def _initializer(on_host: Callable, traced: Callable) -> nnx.Initializer:
    """Draws on the host if the key is concrete. JAX would compile the draw, and even jnp.asarray, for each shape."""

    def draw(key, shape, dtype=jnp.float32):
        if isinstance(key, Tracer):
            return traced(key, shape, dtype)
        drawn = on_host(np.random.default_rng(np.asarray(jax.random.key_data(key))), shape)
        return jax.device_put(drawn.astype(dtype))

    return draw


class Conv(nnx.Conv):
    """Flax's convolution, computed by `conv2d`: square kernels, strides and padding."""

    form = "auto"  # of `hae_jax.ops.forms.CONVOLUTION`
    strides: tuple[int, int]  # `conv` sets both; Flax's type is wider
    bias: nnx.Param

    def __call__(
        self,
        x: jax.Array,  # [B, H, W, C]
    ) -> jax.Array:  # [B, H', W', D]
        x, kernel, bias = self.promote_dtype((x, self.kernel[...], self.bias[...]), dtype=self.dtype)
        form = convolution_form(self.form)
        return conv2d(x, kernel, self.strides[0], self.padding, form=form) + bias


def conv(in_channels: int, out_channels: int, kernel: int, config: UNetConfig, rngs: nnx.Rngs, *,
         dtype: Any = None, stride: int = 1, zero: bool = False) -> Conv:
    """A convolution with PyTorch's symmetric padding (SAME pads differently at stride 2) and initialisation.

    Args:
      dtype: of computation; None: the config's.
    """
    init = nnx.initializers.zeros if zero else torch_uniform(in_channels * kernel**2)
    layer = Conv(in_channels, out_channels, (kernel, kernel), (stride, stride), padding=kernel // 2,
                 dtype=dtype or config.dtype, kernel_init=init, bias_init=init, rngs=rngs)
    layer.form = config.convolution
    return layer


def linear(in_features: int, out_features: int, rngs: nnx.Rngs, *, dtype: Any, zero: bool = False) -> nnx.Linear:
    """A dense layer with PyTorch's initialisation."""
    init = nnx.initializers.zeros if zero else torch_uniform(in_features)
    return nnx.Linear(in_features, out_features, dtype=dtype, kernel_init=init, bias_init=init, rngs=rngs)


def group_norm(channels: int, rngs: nnx.Rngs, *, dtype: Any, groups: int = NORM_GROUPS) -> GroupNorm:
    """GroupNorm with float32 statistics."""
    return GroupNorm(channels, groups, epsilon=EPSILON, dtype=dtype, rngs=rngs)


def layer_norm(channels: int, rngs: nnx.Rngs, *, dtype: Any) -> nnx.LayerNorm:
    """LayerNorm with float32 statistics. The fast variance (E[x^2] - E[x]^2) would lose digits by cancellation."""
    return nnx.LayerNorm(channels, epsilon=EPSILON, use_fast_variance=False, dtype=dtype, rngs=rngs)


class Dropout(nnx.Module):
    """Dropout whose mask depends only on (sample key, layer). It has no state, so it works with remat and sharding."""

    def __init__(self, rate: float):
        self.rate = rate
        self.layer = 0  # set by the network after it is built

    def __call__(
        self,
        x: jax.Array,  # [B, ...]
        randomness: LayerKeys | None,
    ) -> jax.Array:
        if randomness is None or self.rate == 0:
            return x
        return dropped(x, randomness.samples[self.layer], self.rate)


class HeadDropout(NamedTuple):
    """Dropout of attention weights. Each head of each sample has its own mask."""

    keys: jax.Array  # [B, h] keys
    rate: float

    def __call__(
        self,
        weights: jax.Array,  # [B, ...], or [B, h, ...] of all heads
        head: jax.Array | None = None,  # [], the head of these weights; None: all heads
    ) -> jax.Array:
        return dropped(weights, self.keys if head is None else self.keys[:, head], self.rate)


def pool(
    x: jax.Array,  # [B, H, W, C]
    size: int,
) -> jax.Array:  # [B, ceil(H/size), ceil(W/size), C]
    """Average pooling. The right and bottom are padded with zeros, which count in the mean."""
    if size == 1:
        return x
    batch, height, width, channels = x.shape
    x = jnp.pad(x, ((0, 0), (0, -height % size), (0, -width % size), (0, 0)))
    x = x.reshape(batch, x.shape[1] // size, size, x.shape[2] // size, size, channels)
    return x.mean((2, 4), dtype=jnp.float32).astype(x.dtype)


def repeat2(x: jax.Array) -> jax.Array:  # [B, H, W, C] -> [B, 2H, 2W, C]
    """Nearest-neighbour upsampling by two."""
    batch, height, width, channels = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (batch, height, 2, width, 2, channels))
    return x.reshape(batch, 2 * height, 2 * width, channels)


class Downsample(nnx.Module):
    """Halves the resolution: 3x3 convolution with stride 2, or average pooling."""

    def __init__(self, channels: int, config: UNetConfig, rngs: nnx.Rngs):
        self.op = conv(channels, channels, 3, config, rngs, stride=2) if config.conv_resample else None

    def __call__(self, x: jax.Array, cond: Conditioning) -> jax.Array:
        return self.op(x) if self.op is not None else pool(x, 2)


class Upsample(nnx.Module):
    """Doubles the resolution: nearest neighbour, then a 3x3 convolution if configured."""

    def __init__(self, channels: int, config: UNetConfig, rngs: nnx.Rngs):
        self.conv = conv(channels, channels, 3, config, rngs) if config.conv_resample else None

    def __call__(self, x: jax.Array, cond: Conditioning) -> jax.Array:
        x = repeat2(x)
        return self.conv(x) if self.conv is not None else x


class ResBlock(nnx.Module):
    """Norm, activation, conv; embedding; norm, activation, dropout, conv; residual connection.

    Where the variant lost the SiLUs that its code meant to fuse into the norms (`unfused_silu` is False), only the
    one behind a scale-shift norm and the one on the embedding remain.
    """

    def __init__(self, in_channels: int, out_channels: int, config: UNetConfig, rngs: nnx.Rngs, *,
                 scale_shift: bool | None = None, resample: str | None = None):
        dtype = config.dtype
        self.scale_shift = config.use_scale_shift_norm if scale_shift is None else scale_shift
        self.activate = config.rules.unfused_silu
        self.resample = resample
        self.in_norm = group_norm(in_channels, rngs, dtype=dtype)
        self.in_conv = conv(in_channels, out_channels, 3, config, rngs)
        self.emb_proj = linear(config.embedding_width, out_channels * (2 if self.scale_shift else 1), rngs, dtype=dtype)
        self.out_norm = group_norm(out_channels, rngs, dtype=dtype)
        self.dropout = Dropout(config.dropout)
        self.out_conv = conv(out_channels, out_channels, 3, config, rngs, zero=True)
        self.skip = conv(in_channels, out_channels, 1, config, rngs) if in_channels != out_channels else None

    def __call__(
        self,
        x: jax.Array,  # [B, H, W, in_channels]
        cond: Conditioning,
    ) -> jax.Array:  # [B, H, W, out_channels], resampled with `resample`
        h = self.in_norm(x, silu=self.activate)
        if self.resample:
            resample = repeat2 if self.resample == "up" else lambda a: pool(a, 2)
            h, x = resample(h), resample(x)
        h = self.in_conv(h)
        emb = self.emb_proj(nnx.silu(cond.emb))
        if self.scale_shift:
            h = self.out_norm(h, *jnp.split(emb, 2, axis=-1), silu=True)
        else:
            h = self.out_norm(h + emb[:, None, None], silu=self.activate)
        h = self.out_conv(self.dropout(h, cond.randomness))
        return h + (x if self.skip is None else self.skip(x))


_KINDS = ("kernel", "scale", "embedding", "bias")  # weights before biases, as PyTorch registers them


def walk(module: nnx.Module | nnx.List, prefix: str = "") -> Iterator[tuple[str, nnx.Param]]:
    """Yields all parameters with paths such as "input_blocks.0.0.kernel", in the order of the modules' attributes."""
    if isinstance(module, nnx.List):
        children = [(str(i), child) for i, child in enumerate(module)]
    else:
        children = [(name, child) for name, child in vars(module).items() if not name.startswith("_")]
        children.sort(key=lambda item: _KINDS.index(item[0]) if item[0] in _KINDS else -1)
    for name, child in children:
        path = f"{prefix}.{name}" if prefix else name
        if isinstance(child, nnx.Param):
            yield path, child
        elif isinstance(child, nnx.Module | nnx.List):
            yield from walk(child, path)
