"""3x3 convolutions of stride 1 by Winograd's minimal filtering F(2x2, 3x3): 16 products where 36 are usual.

For a 4x4 tile d of the input, a kernel k and the 2x2 outputs y that the tile determines,

    y = A^T [(G k G^T) * (B^T d B)] A

(Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", arXiv:1509.09308, equation 8), where the
product is elementwise in the 16 points and a matrix product in the channels. All entries of A, B and G are 0, +-1/2 or
+-1: the result differs from the direct sum by float32's rounding only. (Larger tiles save more and lose digits.) The
gradients are the transposed equations.

Arrays of points are [16, B, h, w, C]: point (row, column) of the 4x4, then the tiles.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_A = np.array([[1, 0], [1, 1], [1, -1], [0, -1]], np.float32)
_G = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], np.float32)
# Both axes at once, for matrices that are flattened row by row.
_A2, _G2 = np.kron(_A, _A), np.kron(_G, _G)  # [16, 4], [16, 9]

# The points of larger images are made strip by strip, since those of whole ones do not stay in the caches.
_WHOLE_TILES = 256  # of an image
_STRIP_TILES = 128  # of an image in a strip


def tile_count(height: int, width: int, padding: int) -> tuple[int, int]:
    """Rows and columns of tiles in one image; an odd output is cut from an even one."""
    return (height + 2 * padding - 1) // 2, (width + 2 * padding - 1) // 2


def strip_rows(rows: int, columns: int) -> int:
    """How many of an image's rows of tiles `convolve` and `input_gradient` work on at once."""
    return rows if rows * columns <= _WHOLE_TILES else max(1, _STRIP_TILES // columns)


def convolve(
    x: jax.Array,  # [B, H, W, C] float32
    kernel: jax.Array,  # [3, 3, C, D]
    padding: int,  # 0, 1 or 2
) -> jax.Array:  # [B, H + 2 padding - 2, W + 2 padding - 2, D]
    """The convolution, as 16 products of [tiles, C] with [C, D]."""
    return _convolve(x, kernel, padding, "pbhwc,pcd->pbhwd")


def input_gradient(
    kernel: jax.Array,  # [3, 3, C, D]
    g: jax.Array,  # [B, H', W', D] float32, the output's gradient
    padding: int,
) -> jax.Array:  # [B, H, W, C]
    """The convolution of `g` with the kernel turned by 180 degrees, C and D exchanged."""
    return _convolve(g, kernel[::-1, ::-1], 2 - padding, "pbhwd,pcd->pbhwc")


def kernel_gradient(
    x: jax.Array,  # [B, H, W, C] float32
    g: jax.Array,  # [B, H', W', D] float32, the output's gradient
    padding: int,
) -> jax.Array:  # [3, 3, C, D]
    """dk = G^T [(B^T d B) * (A g A^T)] G, summed over tiles: 16 products of [C, tiles] with [tiles, D]."""
    points = _input_points(_padded(_not_before(g, x), padding, *tile_count(*x.shape[1:3], padding)))
    products = jnp.einsum("pbhwc,pbhwd->pcd", points, _output_gradient_points(g, *points.shape[2:4]))
    return jnp.tensordot(_G2.T, products, 1).reshape(3, 3, *products.shape[1:])


def _not_before(
    g: jax.Array,  # [B, ...] float32
    x: jax.Array,  # [B, H, W, C]
) -> jax.Array:
    """`x`, seemingly a function of `g`: plus a zero that XLA cannot know.

    Otherwise all points of a network are ready after the forward pass, four times its activations, and XLA on CPUs,
    which starts what is ready and forgets optimisation barriers before it plans the order, would hold them.
    """
    bits = lax.bitcast_convert_type(g[:, :1, :1, :1], jnp.uint32)
    return x + ((bits >> 31) >> 1).astype(x.dtype)


def _convolve(x, kernel, padding, product):
    height, width = (size + 2 * padding - 2 for size in x.shape[1:3])
    h, w = tile_count(*x.shape[1:3], padding)
    kernel_points = jnp.tensordot(_G2, kernel.reshape(9, *kernel.shape[2:]), 1)  # [16, C, D]
    rows = strip_rows(h, w)
    strips = -(-h // rows)
    x = _padded(x, padding, strips * rows, w)
    if strips == 1:
        y = _convolve_padded(x, kernel_points, product)
    else:
        cut = lambda i: lax.dynamic_slice_in_dim(x, 2 * rows * i, 2 * rows + 2, axis=1)
        y = lax.map(lambda i: _convolve_padded(cut(i), kernel_points, product), jnp.arange(strips))
        y = jnp.moveaxis(y, 0, 1).reshape(len(x), 2 * strips * rows, *y.shape[3:])
    return y[:, :height, :width]


def _convolve_padded(
    x: jax.Array,  # [B, 2 h + 2, 2 w + 2, C]
    kernel_points: jax.Array,  # [16, C, D]
    product: str,
) -> jax.Array:  # [B, 2 h, 2 w, D]
    points = jnp.einsum(product, _input_points(x), kernel_points)
    _, batch, h, w, channels = points.shape
    y = jnp.tensordot(_A2.T, points, 1).reshape(2, 2, batch, h, w, channels)
    return y.transpose(2, 3, 0, 4, 1, 5).reshape(batch, 2 * h, 2 * w, channels)


def _padded(x: jax.Array, padding: int, h: int, w: int) -> jax.Array:  # [B, H, W, C] -> [B, 2 h + 2, 2 w + 2, C]
    bottom, right = (2 * tiles + 2 - padding - size for tiles, size in zip((h, w), x.shape[1:3], strict=True))
    return jnp.pad(x, ((0, 0), (padding, bottom), (padding, right), (0, 0)))


def _input_points(
    x: jax.Array,  # [B, 2 h + 2, 2 w + 2, C]
) -> jax.Array:  # [16, B, h, w, C]
    """B^T d B of the overlapping 4x4 tiles d, two pixels apart."""
    h, w = (size // 2 - 1 for size in x.shape[1:3])
    rows = jnp.stack(_four_points([x[:, i:i + 2 * h - 1:2] for i in range(4)]))
    # XLA would join both axes into one loop, and compute each row's points again for each column.
    rows = lax.optimization_barrier(rows)
    points = jnp.stack(_four_points([rows[:, :, :, j:j + 2 * w - 1:2] for j in range(4)]), 1)
    return points.reshape(16, *points.shape[2:])


def _four_points(d: list[jax.Array]) -> list[jax.Array]:
    """B^T d along one axis of the tile."""
    return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]


def _output_gradient_points(
    g: jax.Array,  # [B, H', W', D]
    h: int,
    w: int,
) -> jax.Array:  # [16, B, h, w, D]
    """A g A^T of the 2x2 outputs g."""
    g = jnp.pad(g, ((0, 0), (0, 2 * h - g.shape[1]), (0, 2 * w - g.shape[2]), (0, 0)))
    return jnp.tensordot(_A2, jnp.stack([g[:, i::2, j::2] for i in range(2) for j in range(2)]), 1)
