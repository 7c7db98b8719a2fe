"""3x3 convolutions of stride 1 by Winograd's minimal filtering, F(4x4, 3x3) or F(2x2, 3x3).

For a tile d of n x n pixels of the input, n = m + 2, a kernel k and the m x m outputs y that the tile determines,

    y = A^T [(G k G^T) * (B^T d B)] A

(Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", arXiv:1509.09308, equation 8), where the
product is elementwise over the n x n points and a matrix product over the channels. m = 4 takes 36 products instead of
144, and m = 2 takes 16 instead of 36. The gradients are the transposed equations.

Points are the positions at which polynomials are evaluated (Toom and Cook). The error is that of float32 rounding: for
m = 2 it equals that of the direct sum, for m = 4 it is three times as large. With integers as points, as in the paper,
the error for m = 4 would be three times larger again (compare Barabasz et al. 2020, "Error analysis and improving the
accuracy of Winograd convolution for deep neural networks", arXiv:1803.10986).

Arrays of points begin with the point (row, column) of the tile: [n n, B, h, w, C].
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


class _Filtering(NamedTuple):
    """The matrices of F(m x m, 3 x 3) along one axis."""

    m: int
    A: np.ndarray  # [n, m]
    B: np.ndarray  # [n, n], transposed: a row for each point
    G: np.ndarray  # [n, 3]


def _filtering(m: int, *finite: float) -> _Filtering:
    """Makes the matrices from n - 1 different points. The last point is infinity."""
    points = np.array(finite, float)
    others = [np.delete(points, i) for i in range(len(points))]
    A, G = (np.vander(points, width, increasing=True) for width in (m, 3))
    G /= [[np.prod(point - rest)] for point, rest in zip(points, others, strict=True)]
    B = [[*np.polynomial.polynomial.polyfromroots(rest), 0] for rest in others]
    last = np.polynomial.polynomial.polyfromroots(points)
    return _Filtering(m, *(np.array(matrix, np.float32) for matrix in (
        [*A, np.eye(m)[-1]], [*B, last], [*G, np.eye(3)[-1]])))


_SMALL = _filtering(2, 0, 1, -1)
_LARGE = _filtering(4, 0, 11 / 16, -11 / 16, 3 / 2, -3 / 2)  # the pairs of sixteenths with the smallest error
_LARGE_FROM = 32  # outputs along the shorter side; in smaller images, m = 4 has too few tiles for its 36 products

_STRIP_POINTS = 36 * 128  # points of the tiles that a device processes at a time, so that they stay in its caches


def has_large_tiles(height: int, width: int, padding: int) -> bool:
    """Whether images of this size are convolved in tiles of 4x4 outputs. The size alone decides, so that an image's
    result does not depend on its batch."""
    return min(height, width) + 2 * padding - 2 >= _LARGE_FROM


def tile_count(
    height: int,  # of the input
    width: int,
    padding: int,
) -> tuple[int, int]:
    """Rows and columns of tiles in one image. The parts of the last tiles outside of the output are cut off."""
    size = _chosen(height, width, padding).m
    return -(-(height + 2 * padding - 2) // size), -(-(width + 2 * padding - 2) // size)


def convolve(
    x: jax.Array,  # [B, H, W, C] float32
    kernel: jax.Array,  # [3, 3, C, D]
    padding: int,  # 0, 1 or 2
) -> jax.Array:  # [B, H + 2 padding - 2, W + 2 padding - 2, D]
    """The convolution, as products of [tiles, C] with [C, D], one for each point."""
    return _convolve(x, kernel, padding)


def input_gradient(
    kernel: jax.Array,  # [3, 3, C, D]
    g: jax.Array,  # [B, H', W', D] float32, the output's gradient
    padding: int,
) -> jax.Array:  # [B, H, W, C]
    """The convolution of `g` with the kernel rotated by 180 degrees, with C and D exchanged."""
    return _convolve(g, kernel[::-1, ::-1].swapaxes(2, 3), 2 - padding)


def kernel_gradient(
    x: jax.Array,  # [B, H, W, C] float32
    g: jax.Array,  # [B, H', W', D] float32, the output's gradient
    padding: int,
) -> jax.Array:  # [3, 3, C, D]
    """dk = G^T [(B^T d B) * (A g A^T)] G, summed over tiles: products of [D, tiles] with [tiles, C]."""
    form, (h, w) = _chosen(x.shape[1], x.shape[2], padding), tile_count(x.shape[1], x.shape[2], padding)
    rows = _strip_rows(len(x), h, w, form)
    strips = -(-h // rows)
    # The input's points depend on the output's gradient, so that they are not computed right after the forward pass.
    x = _padded(x + _unknown_zero(g[:, :1, :1, :1]), form, padding, strips * rows, w)
    bottom, right = (form.m * tiles - size for tiles, size in zip((strips * rows, w), g.shape[1:3], strict=True))
    g = jnp.pad(g, ((0, 0), (0, bottom), (0, right), (0, 0)))

    def products(strip):
        of_input = _input_points(_strip(x, form.m * rows, strip, form.m * rows + 2), form)
        of_gradient = _output_gradient_points(_strip(g, form.m * rows, strip, form.m * rows), form)
        # There is one sum per device, so that devices do not communicate after each strip.
        return jnp.einsum("psdbhw,psbhwc->psdc", of_gradient, _in_shares(of_input, 1))

    if strips == 1:
        total = products(0)
    else:
        start = jnp.zeros(jax.eval_shape(products, 0).shape, x.dtype)
        total = lax.fori_loop(0, strips, lambda strip, total: total + products(strip), start)
    turned = jnp.tensordot(_both_axes(form.G).T, total, 1).sum(1)  # [3 3, D, C]
    return turned.reshape(3, 3, *turned.shape[1:]).swapaxes(2, 3)


def _chosen(height: int, width: int, padding: int) -> _Filtering:
    return _LARGE if has_large_tiles(height, width, padding) else _SMALL


def _strip_rows(batch: int, rows: int, columns: int, form: _Filtering) -> int:
    """The number of an image's rows of tiles that are processed at a time."""
    tiles = _STRIP_POINTS // form.B.size  # B is [n, n]
    return min(rows, max(1, tiles // (-(-batch // jax.device_count()) * columns)))


def _in_shares(x: jax.Array, axis: int) -> jax.Array:
    """Splits the batch axis into [shares, images per share], with one share per device if the batch is divisible."""
    batch = x.shape[axis]
    shares = math.gcd(batch, jax.device_count())
    return x.reshape(*x.shape[:axis], shares, batch // shares, *x.shape[axis + 1:])


def _unknown_zero(x: jax.Array) -> jax.Array:
    """Zeros that XLA does not recognise as constant. Computations with them are not started before `x` is computed.

    On CPUs, XLA starts all operations that are ready, and it removes optimisation barriers before it plans the order.
    So the points of all kernels would be computed and stored before the first layer, and those of all activations
    before the backward pass.
    """
    return ((lax.bitcast_convert_type(x, jnp.uint32) >> 31) >> 1).astype(x.dtype)


def _convolve(x, kernel, padding):
    height, width = (size + 2 * padding - 2 for size in x.shape[1:3])
    form, (h, w) = _chosen(x.shape[1], x.shape[2], padding), tile_count(x.shape[1], x.shape[2], padding)
    # Each device computes the kernel's points itself when it needs them: [n n, shares, C, D].
    when_needed = _unknown_zero(_in_shares(x, 0)[:, 0, :1, 0, 0])  # [shares, 1]
    kernel_points = jnp.einsum("psk,kcd->pscd", _both_axes(form.G)[:, None] + when_needed,
                               kernel.reshape(9, *kernel.shape[2:]))
    rows = _strip_rows(len(x), h, w, form)
    strips = -(-h // rows)
    x = _padded(x, form, padding, strips * rows, w)

    def outputs(strip):
        points = _input_points(_strip(x, form.m * rows, strip, form.m * rows + 2), form)
        products = jnp.einsum("psbhwc,pscd->psbhwd", _in_shares(points, 1), kernel_points)
        return _outputs(products.reshape(len(products), len(x), *products.shape[3:]), form)

    if strips == 1:
        y = outputs(0)
    else:
        y = jnp.moveaxis(lax.map(outputs, jnp.arange(strips)), 0, 1)
        y = y.reshape(len(x), -1, *y.shape[3:])
    return y[:, :height, :width]


def _padded(
    x: jax.Array,  # [B, H, W, C]
    form: _Filtering,
    padding: int,
    h: int,
    w: int,
) -> jax.Array:  # [B, m h + 2, m w + 2, C]
    bottom, right = (form.m * tiles + 2 - padding - size for tiles, size in zip((h, w), x.shape[1:3], strict=True))
    return jnp.pad(x, ((0, 0), (padding, bottom), (padding, right), (0, 0)))


def _strip(x: jax.Array, step: int, strip: jax.Array | int, size: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(x, step * strip, size, axis=1)


def _input_points(
    x: jax.Array,  # [B, m h + 2, m w + 2, C]
    form: _Filtering,
) -> jax.Array:  # [n n, B, h, w, C]
    """B^T d B of the overlapping tiles d, m pixels apart."""
    m, n = form.m, len(form.B)
    tiles_end = [size - n + 1 for size in x.shape[1:3]]
    rows = jnp.stack(_combined(form.B, [x[:, i:i + tiles_end[0]:m] for i in range(n)]))
    # Without a barrier, XLA would fuse both axes into one loop and recompute each row's points for each column.
    rows = lax.optimization_barrier(rows)
    points = jnp.stack(_combined(form.B, [rows[:, :, :, j:j + tiles_end[1]:m] for j in range(n)]), 1)
    return points.reshape(n * n, *points.shape[2:])


def _combined(matrix: np.ndarray, parts: list[jax.Array]) -> list[jax.Array]:
    """The matrix times the parts. Zeros of the matrix, of which there are many, are skipped."""
    return [jnp.asarray(sum(part if factor == 1 else factor * part
                            for factor, part in zip(row, parts, strict=True) if factor)) for row in matrix]


def _outputs(
    points: jax.Array,  # [n n, B, h, w, D]
    form: _Filtering,
) -> jax.Array:  # [B, m h, m w, D]
    """A^T points A, with the tiles put together."""
    _, batch, h, w, channels = points.shape
    y = jnp.tensordot(_both_axes(form.A).T, points, 1).reshape(form.m, form.m, batch, h, w, channels)
    return y.transpose(2, 3, 0, 4, 1, 5).reshape(batch, form.m * h, form.m * w, channels)


def _output_gradient_points(
    g: jax.Array,  # [B, m h, m w, D]
    form: _Filtering,
) -> jax.Array:  # [n n, shares, D, images per share, h, w]
    """A g A^T of the m x m outputs g.

    The tiles are the last axes, because the sum over tiles is a matrix product whose left matrix XLA needs in this
    order. If XLA changed the order of the points, it would copy n n values per tile. Here it copies m m.
    """
    shares, images, height, width, channels = _in_shares(g, 0).shape
    m, h, w = form.m, height // form.m, width // form.m
    outputs = g.reshape(shares, images, h, m, w, m, channels).transpose(3, 5, 0, 6, 1, 2, 4)
    return jnp.tensordot(_both_axes(form.A), outputs.reshape(m * m, *outputs.shape[2:]), 1)


def _both_axes(matrix: np.ndarray) -> np.ndarray:
    """The matrix for both axes of tiles that are flattened row by row."""
    return np.kron(matrix, matrix)
