"""Convolutions on CPUs, in the form that is fastest for the shape.

XLA's convolution is mostly about as fast as a matrix product, but its gradient for the kernel is slow for large images,
1x1 kernels and few channels. The forms below were chosen by measurement. `tools/benchmark.py --part blocks` repeats it.

- 1x1 kernels: one matrix product;
- 3x3 kernels of stride 1: Winograd's form, in tiles of 4x4 outputs from 32 px and 64 channels on both sides on, in
  tiles of 2x2 outputs from 16 px and 128 channels on. The gradient for the kernel has tiles of 4x4 only, from 32 px and
  64 channels or 64 px and 32 channels on;
- at most 16 channels on one side: the gradient for the kernel as one product with the patches of that side,
  and the gradient for the input likewise where the output has so few;
- all other cases: XLA's convolution. Its gradients are written as convolutions with axes in the order NHWC, HWIO, with
  explicit transpositions. XLA does the same on its own, except inside loops (gradients that are accumulated, guidance
  by a classifier at each step), where other orders are computed by a loop over single numbers.

All forms give the same results up to float32 rounding. bfloat16 is computed in float32 and rounded at the end.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from hae_jax.ops import direct
from hae_jax.ops.cpu import winograd

_MANY_CHANNELS = 128  # with at least as many, Winograd's form with small tiles is fast
_SEVERAL_CHANNELS = 64  # the same for large tiles
_SOME_CHANNELS = 32  # the same for the gradient for the kernel in large images
_LARGE_IMAGE = 64  # outputs along the shorter side
_FEW_CHANNELS = 16  # with at most as many, a product with patches (9 times the image) is faster than XLA's form
_SMALLEST = 16  # outputs along the shorter side; with fewer, the transformation of the kernel takes too long


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
@functools.partial(jax.jit, static_argnums=(2, 3))  # traced once for each shape
def conv2d(
    x: jax.Array,  # [B, H, W, C]
    kernel: jax.Array,  # [kh, kw, C, D], dtype of x
    stride: int,
    padding: int,
) -> jax.Array:  # [B, H', W', D]
    """`direct.convolve` with custom gradients, in reverse mode only."""
    dtype, (x, kernel) = x.dtype, _float32(x, kernel)
    if _is_pointwise(kernel, stride, padding):
        y = jnp.einsum("bhwc,cd->bhwd", x, kernel[0, 0])
    elif _winograd_wins(x, kernel, stride, padding):
        y = winograd.convolve(x, kernel, padding)
    else:
        y = direct.convolve(x, kernel, stride, padding)
    return y.astype(dtype)


def _forward(x, kernel, stride, padding):
    return conv2d(x, kernel, stride, padding), (x, kernel)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _backward(stride, padding, inputs, g):
    dtype, (x, kernel, g) = inputs[0].dtype, _float32(*inputs, g)
    gradients = _input_gradient(x, kernel, g, stride, padding), _kernel_gradient(x, kernel, g, stride, padding)
    return tuple(gradient.astype(dtype) for gradient in gradients)


conv2d.defvjp(_forward, _backward)


def _input_gradient(x, kernel, g, stride, padding):
    if _is_pointwise(kernel, stride, padding):
        return jnp.einsum("bhwd,cd->bhwc", g, kernel[0, 0])
    if _winograd_wins(x, kernel, stride, padding):
        return winograd.input_gradient(kernel, g, padding)
    turned = kernel[::-1, ::-1].swapaxes(2, 3)
    if kernel.shape[3] <= _FEW_CHANNELS and _is_unit_square(kernel, stride, padding):
        patches = jnp.concatenate(_shifted(g, kernel.shape, 1, kernel.shape[0] - 1 - padding), -1)
        return patches @ turned.reshape(-1, kernel.shape[2])
    before = [k - 1 - padding for k in kernel.shape[:2]]
    after = [n + k - 2 - (m - 1) * stride - b
             for n, m, k, b in zip(x.shape[1:3], g.shape[1:3], kernel.shape[:2], before, strict=True)]
    return _convolve(g, turned, list(zip(before, after, strict=True)), lhs_dilation=(stride, stride))


def _kernel_gradient(x, kernel, g, stride, padding):
    shape = kernel.shape
    height, width, inputs, outputs = shape
    if _winograd_wins_for_kernel(x, kernel, stride, padding):
        return winograd.kernel_gradient(x, g, padding)
    if inputs <= _FEW_CHANNELS:
        patches = jnp.concatenate(_shifted(x, shape, stride, padding), -1)
        return jnp.einsum("bhwp,bhwd->pd", patches, g).reshape(shape)
    if outputs <= _FEW_CHANNELS and _is_unit_square(kernel, stride, padding):
        patches = jnp.concatenate(_shifted(g, shape, 1, height - 1 - padding), -1)
        turned = jnp.einsum("bhwc,bhwp->cp", x, patches).reshape(inputs, height, width, outputs)
        return turned.transpose(1, 2, 0, 3)[::-1, ::-1]
    if _is_pointwise(kernel, stride, padding):
        return jnp.einsum("bhwc,bhwd->cd", x, g).reshape(shape)
    # Channels take the place of the batch, and the batch is summed over like input channels.
    after = [k + (m - 1) * stride - n - padding
             for n, m, k in zip(x.shape[1:3], g.shape[1:3], shape[:2], strict=True)]
    gradient = _convolve(x.transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3), [(padding, a) for a in after],
                         rhs_dilation=(stride, stride))
    return gradient.transpose(1, 2, 0, 3)


def _convolve(x, kernel, padding, **dilation):
    return lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), **dilation)


def _float32(*arrays):
    return [array.astype(jnp.float32) if array.dtype == jnp.bfloat16 else array for array in arrays]


def _is_pointwise(kernel, stride, padding):
    return kernel.shape[:2] == (1, 1) and stride == 1 and padding == 0


def _is_unit_square(kernel, stride, padding):
    """Whether the gradient for the input is itself a convolution of stride 1 with symmetric padding."""
    return stride == 1 and kernel.shape[0] == kernel.shape[1] > padding


def _has_winograd_form(x, kernel, stride, padding):
    return kernel.shape[:2] == (3, 3) and stride == 1 and padding <= 2 and x.dtype == jnp.float32


def _winograd_wins(x, kernel, stride, padding):
    """For the convolution and its gradient for the input."""
    if not _has_winograd_form(x, kernel, stride, padding):
        return False
    channels = min(kernel.shape[2:])
    if winograd.has_large_tiles(x.shape[1], x.shape[2], padding):
        return channels >= _SEVERAL_CHANNELS
    return channels >= _MANY_CHANNELS and _shorter_side(x, padding) >= _SMALLEST


def _winograd_wins_for_kernel(x, kernel, stride, padding):
    large_tiles = winograd.has_large_tiles(x.shape[1], x.shape[2], padding)
    if not _has_winograd_form(x, kernel, stride, padding) or not large_tiles:
        return False
    return min(kernel.shape[2:]) >= (_SOME_CHANNELS if _shorter_side(x, padding) >= _LARGE_IMAGE else _SEVERAL_CHANNELS)


def _shorter_side(x, padding):
    """Outputs of a 3x3 kernel of stride 1 along the shorter side."""
    return min(x.shape[1:3]) + 2 * padding - 2


def _shifted(
    x: jax.Array,  # [B, H, W, C]
    kernel_shape: tuple[int, ...],  # (kh, kw, ...)
    stride: int,
    padding: int,
) -> list[jax.Array]:  # kh kw arrays [B, H', W', C]
    """The pixels under each point of the kernel, for all outputs."""
    x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    height, width = ((n - k) // stride * stride + 1 for n, k in zip(x.shape[1:3], kernel_shape, strict=False))
    return [x[:, i:i + height:stride, j:j + width:stride]
            for i in range(kernel_shape[0]) for j in range(kernel_shape[1])]
