"""OpenSimplex noise in three dimensions (Kurt Spencer, 2014): the scalar field that simplex noise is made of.

Its lattice, cubes stretched along their diagonal, is the face-centred cubic one. Half a turn about (1, 1, 1) brings
it onto D3, the integer points of even sum, where the nearest lattice point is a matter of rounding, and the few others
that reach a position follow from the order of its coordinates. The value is the sum over all points within reach.
"""

import jax
import jax.numpy as jnp
import numpy as np

# Lattice points that can lie within sqrt(2), the kernel's reach, of a position, relative to the nearest one: by axes in
# order of the position's distance from the nearest point along them, signed toward the position. For distances
# a >= b >= c, a point v is within reach if |v|^2 - 2 v.(a, b, c) + a^2 + b^2 + c^2 < 2; since a + b <= 1 around the
# nearest point, no other v fulfils this.
_WITHIN_REACH = ((0, 0, 0), (1, 1, 0), (1, 0, 1), (0, 1, 1), (1, -1, 0), (1, 0, -1), (0, 1, -1), (2, 0, 0))

_TURN = np.full((3, 3), 2 / 3) - np.eye(3)  # half a turn about (1, 1, 1), its own inverse
_PERIOD = 6  # a shift by it along any axis takes the lattice to itself
_NORM = 103  # brings values to about [-1, 1]


def _gradients() -> np.ndarray:  # [24, 3]
    """Toward a rhombicuboctahedron's vertices, in the order that fixes which permutation gives which field."""
    signs = np.array([(x, y, z) for z in (1, -1) for y in (1, -1) for x in (-1, 1)])
    return (signs[:, None] * (4 + 7 * np.eye(3))).reshape(24, 3)


def open_simplex(
    permutation: jax.Array,  # [256] int32
    position: jax.Array,  # [3, ...] float32: x, y, z
) -> jax.Array:  # [...] float32
    """OpenSimplex noise at positions in units of the lattice, in about [-1, 1]; zero at the lattice points.

    Exact to float32 rounding however far from the origin, and continuous with its first three derivatives. The
    original program picks points by cases and leaves out one at the kernel's rim on 1% of positions: there it differs
    from the sum by about 1e-4 at most, and jumps.
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
        # Axis by axis: a gather of numbers is fused with what follows, one of vectors is not (7 times slower on a CPU).
        value += kernel * sum(gradients[:, axis][entry] * distance[axis] for axis in range(3))
    return value


def _nearest_lattice_point(position: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The nearest point of D3, [3, ...] int32, and the position relative to it, [3, ...] float32, both turned.

    Rounds, and where that gives an odd sum, rounds the coordinate farthest from an integer the other way (Conway &
    Sloane 1982, "Fast quantizing and decoding algorithms for lattice quantizers and codes", algorithm 2).
    """
    periods = jnp.floor(position / _PERIOD)  # are set aside as integers, so that large coordinates lose no digits
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
    """Which entry of the permutation a lattice point's gradient comes from."""
    x, y, z = point.sum(0) // 2 - point  # coordinates in the stretched cubes
    return (permutation[(permutation[x & 255] + y) & 255] + z) & 255
