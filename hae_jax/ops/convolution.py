"""Two-dimensional convolution in the form that the config selects (`forms.convolution_form`)."""

import functools

import jax

from hae_jax.ops import direct
from hae_jax.ops.cpu import convolution as cpu


@functools.partial(jax.jit, static_argnames=("stride", "padding", "form"), inline=True)
def conv2d(
    x: jax.Array,  # [B, H, W, C]
    kernel: jax.Array,  # [kh, kw, C, D], dtype of x
    stride: int = 1,
    padding: int = 0,
    *,
    form: str,
) -> jax.Array:  # [B, (H + 2 padding - kh) // stride + 1, (W + 2 padding - kw) // stride + 1, D]
    """Cross-correlation as in PyTorch's conv2d, with `padding` zeros on all four sides.

    Args:
      form: "xla" or "winograd"; the second has reverse-mode derivatives only.
    """
    height, width, inputs, outputs = kernel.shape
    by = f" by {stride}" if stride > 1 else ""
    with jax.named_scope(f"convolution {height}x{width}{by}, {inputs} to {outputs} channels, {x.shape[2]} px"):
        return (cpu.conv2d if form == "winograd" else direct.convolve)(x, kernel, stride, padding)
