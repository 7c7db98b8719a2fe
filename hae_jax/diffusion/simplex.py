"""OpenSimplex noise in three dimensions (Kurt Spencer, 2014): the scalar field of one octave of simplex noise.

The lattice consists of cubes stretched along their diagonal. It is the face-centred cubic lattice. Half a turn about
(1, 1, 1) maps it to D3, the integer points with an even sum. There, rounding finds the nearest lattice point, and the
order of the coordinates gives the few others within reach. The value is the sum over all points within reach.
"""

import jax
import jax.numpy as jnp
import numpy as np

# Lattice points that can be within sqrt(2), the kernel's reach, of a position, relative to the nearest lattice point.
# The axes point from the nearest point toward the position. They are ordered by the distances a >= b >= c along them.
# A point v is within reach if |v|^2 - 2 v.(a, b, c) + a^2 + b^2 + c^2 < 2. Around the nearest point a + b <= 1, so no
# other v fulfils this.
_WITHIN_REACH = ((0, 0, 0), (1, 1, 0), (1, 0, 1), (0, 1, 1), (1, -1, 0), (1, 0, -1), (0, 1, -1), (2, 0, 0))

_TURN = np.full((3, 3), 2 / 3) - np.eye(3)  # half a turn about (1, 1, 1), its own inverse
_PERIOD = 6  # a shift by it along any axis maps the lattice to itself
_NORM = 103  # brings values to about [-1, 1]


def _gradients() -> np.ndarray:  # [24, 3]
    """Directions to the vertices of a rhombicuboctahedron. A permutation gives another field if their order changes."""
    signs = np.array([(x, y, z) for z in (1, -1) for y in (1, -1) for x in (-1, 1)])
    return (signs[:, None] * (4 + 7 * np.eye(3))).reshape(24, 3)


def open_simplex(
    permutation: jax.Array,  # [256] int32
    position: jax.Array,  # [3, ...] float32: x, y, z
) -> jax.Array:  # [...] float32
    """OpenSimplex noise at positions in units of the lattice, in about [-1, 1]; zero at the lattice points.

    It is exact to float32 rounding at any distance from the origin. It and its first three derivatives are continuous.
    The original program omits one point at the kernel's rim at 1% of positions. There it differs from the sum by about
    1e-4 at most, and is not continuous.
    """
    gradients = jnp.asarray(_gradients() @ _TURN / _NORM, jnp.float32)[permutation % 24]  # [256, 3]
    nearest, offset = _nearest_lattice_point(position)
    direction, rank = jnp.where(offset < 0, -1, 1), _descending_rank(jnp.abs(offset))
    value = jnp.zeros(position.shape[1:], jnp.float32)
    for point in _WITHIN_REACH:
        step = direction * jnp.select([rank == 0, rank == 1], point[:2], point[2])
        distance = offset - step
        kernel = jnp.maximum(2 - jnp.square(distance).sum(0), 0) ** 4
        entry = _hash(permutation, nearest + step)
        # Axis by axis: XLA fuses a gather of numbers, but not a gather of vectors (7 times slower on a CPU).
        value += kernel * sum(gradients[:, axis][entry] * distance[axis] for axis in range(3))
    return value


def _nearest_lattice_point(position: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The nearest point of D3, [3, ...] int32, and the position relative to it, [3, ...] float32, both turned.

    Rounds all coordinates. If their sum is odd, rounds the one farthest from an integer the other way (Conway & Sloane
    1982, "Fast quantizing and decoding algorithms for lattice quantizers and codes", algorithm 2).
    """
    periods = jnp.floor(position / _PERIOD)  # kept as integers, so that large coordinates lose no digits
    x, y, z = position - _PERIOD * periods
    turned = (2 * (x + y + z) - 3 * jnp.stack([x, y, z])) / 3
    rounded = jnp.round(turned)
    offset = turned - rounded
    odd = rounded.sum(0) % 2 == 1
    other_way = jnp.where(odd & (_descending_rank(jnp.abs(offset)) == 0), jnp.where(offset < 0, -1, 1), 0)
    periods = periods.astype(jnp.int32)
    origin = 4 * periods.sum(0) - 6 * periods
    return origin + rounded.astype(jnp.int32) + other_way, offset - other_way


def _descending_rank(values: jax.Array) -> jax.Array:  # [3, ...] -> [3, ...] of 0, 1, 2
    """0 for the largest of the three, 2 for the smallest; among equals the earlier comes first."""
    x, y, z = values
    y_first, z_first, z_second = (y > x).astype(jnp.int32), (z > x).astype(jnp.int32), (z > y).astype(jnp.int32)
    return jnp.stack([y_first + z_first, 1 - y_first + z_second, 2 - z_first - z_second])


def _hash(permutation: jax.Array, point: jax.Array) -> jax.Array:  # [3, ...] int32 -> [...] in 0..255
    """The entry of the permutation that selects the gradient of a lattice point."""
    x, y, z = point.sum(0) // 2 - point  # coordinates in the stretched cubes
    return (permutation[(permutation[x & 255] + y) & 255] + z) & 255
