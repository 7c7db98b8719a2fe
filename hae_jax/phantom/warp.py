"""Phantom, first stage: the template, the voxel grid, and the smooth random warp of one subject.

All lengths are millimetres, so a subject on a coarser grid is the same head with larger voxels. The axes of template
and grid point left, posterior and superior. Their origin is the middle of the brain. Loading flips the template.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from scipy.interpolate import BSpline
from scipy.spatial.transform import Rotation

FULL_SHAPE = (240, 240, 155)  # a BraTS volume at 1 mm
_HALF_WIDTH = (84.0, 104.0, 77.5)  # every warped brain is in this box; the rest of the volume is not computed
_VENTRICLES = (0, -2, 9)  # mm in the template, between the two lateral ventricles
_UNIT_STD = (151 / 315) ** 1.5  # of a 3-D cubic B-spline with unit normal coefficients, over positions


@dataclass(frozen=True)
class Template:
    """The ICBM152 maps of the brain, [X, Y, Z] float32 at 1 mm, left-posterior-superior.

    detail: T1 above its local mean. Distances in mm: depth to the surface of the stripped brain, skull to a hull that
    also spans the fissures, ventricle to the ventricles (up to 24).
    """

    gm: np.ndarray
    wm: np.ndarray
    detail: np.ndarray
    depth: np.ndarray
    skull: np.ndarray
    ventricle: np.ndarray

    @property
    def centre(self) -> np.ndarray:
        """Voxel index of the origin of the millimetre coordinates, [3]."""
        return (np.array(self.gm.shape, np.float32) - 1) / 2

    def sample(self, map_: np.ndarray, q: np.ndarray) -> np.ndarray:
        """Trilinear value of one of the maps at millimetre positions `q` [3, ...]; 0 outside."""
        index = q + self.centre.reshape(3, *[1] * (q.ndim - 1))
        return ndimage.map_coordinates(map_, index, order=1, output=np.float32, prefilter=False)


@functools.lru_cache(maxsize=1)
def load_template() -> Template:
    """Reads the maps of the installed nilearn package (no download). It takes about two seconds, once per process."""
    from nilearn import datasets  # its import takes two seconds, and `--help` does not need it

    loaders = (datasets.load_mni152_template, datasets.load_mni152_gm_template, datasets.load_mni152_wm_template,
               datasets.load_mni152_brain_mask)
    maps = [np.asarray(load(resolution=1).dataobj, np.float32) for load in loaders]
    box = ndimage.find_objects((maps[3] > 0.5).astype(np.int8))[0]
    box = tuple(slice(max(0, s.start - 2), s.stop + 2) for s in box)
    t1, gm, wm, mask = (np.ascontiguousarray(a[box][::-1, ::-1]) for a in maps)
    mask = mask > 0.5
    depth = _closed_depth(mask, radius=6)  # a stripped brain keeps the fluid in its sulci
    skull = upsample(2 * _closed_depth(mask[::2, ::2, ::2], radius=10), 2, mask.shape)
    return Template(gm=gm, wm=wm, detail=t1 - ndimage.gaussian_filter(t1, 4), depth=depth, skull=skull,
                    ventricle=_distance_outside(_lateral_ventricles(gm + wm, depth), reach=24))


def _closed_depth(mask: np.ndarray, radius: float) -> np.ndarray:
    """Depth in the morphological closing of `mask` by a ball of `radius`, in voxels, float32.

    The points deeper than `radius` in the dilated mask are the closing. Their excess over `radius` is the depth in it.
    """
    margin = int(radius) + 1
    dilated = ndimage.distance_transform_edt(~np.pad(mask, margin)) <= radius
    depth = ndimage.distance_transform_edt(dilated)[(slice(margin, -margin),) * 3] - radius
    return np.maximum(depth, 0).astype(np.float32)


def _distance_outside(mask: np.ndarray, reach: int) -> np.ndarray:
    """Distance to `mask` in voxels, float32. Beyond `reach` it is a lower bound."""
    box = ndimage.find_objects(mask.astype(np.int8))[0]
    box = tuple(slice(max(0, s.start - reach), s.stop + reach) for s in box)
    distance = np.full(mask.shape, reach, np.float32)
    distance[box] = ndimage.distance_transform_edt(~mask[box])
    return distance


def upsample(values: np.ndarray, step: int, shape: tuple[int, ...]) -> np.ndarray:
    """Trilinear interpolation to `shape` from the values at every `step`-th voxel (`array[::step, ...]`), float32."""
    index = np.stack(np.meshgrid(*(np.arange(n, dtype=np.float32) / step for n in shape), indexing="ij"))
    return ndimage.map_coordinates(values, index, order=1, mode="nearest", output=np.float32)


def _lateral_ventricles(tissue: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """Components of deep fluid centred within 20 mm of the ventricles' middle, which excludes cisterns and fissures."""
    components, count = ndimage.label(ndimage.binary_opening((tissue < 0.5) & (depth > 15)))
    labels = np.arange(1, count + 1)
    centres = np.array(ndimage.center_of_mass(components > 0, components, labels)) - (np.array(tissue.shape) - 1) / 2
    return np.isin(components, labels[np.linalg.norm(centres - _VENTRICLES, axis=1) < 20])


@dataclass(frozen=True)
class Grid:
    """The voxels of one volume, and the box of it in which the brain lies.

    shape: of the whole volume. voxel: edge length in mm. box: slices of the volume. axes: positions along the box, mm.
    """

    shape: tuple[int, ...]
    voxel: float
    box: tuple[slice, ...]
    axes: tuple[np.ndarray, ...]

    @classmethod
    def of_size(cls, size: float) -> "Grid":
        """The BraTS grid scaled by `size`: the voxels are 1 / size mm wide, the field of view stays."""
        shape = tuple(round(n * size) for n in FULL_SHAPE)
        positions = [(np.arange(n, dtype=np.float32) - (n - 1) / 2) / np.float32(size) for n in shape]
        inside = [np.flatnonzero(np.abs(p) <= h) for p, h in zip(positions, _HALF_WIDTH, strict=True)]
        box = tuple(slice(int(i[0]), int(i[-1]) + 1) for i in inside)
        return cls(shape, 1 / size, box, tuple(p[b] for p, b in zip(positions, box, strict=True)))

    @property
    def affine(self) -> np.ndarray:
        """BraTS's affine [4, 4]: index to RAS mm, diag(-1, -1, 1) with offset (0, 239, 0) at full size."""
        affine = np.diag([-self.voxel, -self.voxel, self.voxel, 1.0])
        affine[1, 3] = (self.shape[1] - 1) * self.voxel
        return affine

    @property
    def box_shape(self) -> tuple[int, ...]:
        return tuple(len(a) for a in self.axes)

    def positions(self) -> np.ndarray:
        """Millimetre positions of the box's voxels, [3, x, y, z]."""
        return np.stack(np.meshgrid(*self.axes, indexing="ij"))

    def crop(self, centre: Sequence[float] | np.ndarray, radius: float) -> tuple[slice, ...]:
        """The part of the box within `radius` mm of `centre` along each axis (at least one voxel)."""
        first = [a[0] for a in self.axes]
        low = [int(np.floor((c - radius - f) / self.voxel)) for c, f in zip(centre, first, strict=True)]
        high = [int(np.ceil((c + radius - f) / self.voxel)) + 1 for c, f in zip(centre, first, strict=True)]
        return tuple(slice(min(max(a, 0), n - 1), max(min(b, n), 1))
                     for a, b, n in zip(low, high, self.box_shape, strict=True))

    def part(self, crop: tuple[slice, ...]) -> "Grid":
        """The same volume with `crop` of the box as its box."""
        box = tuple(slice(b.start + c.start, b.start + c.stop) for b, c in zip(self.box, crop, strict=True))
        return Grid(self.shape, self.voxel, box, tuple(a[c] for a, c in zip(self.axes, crop, strict=True)))


@functools.lru_cache(maxsize=64)
def _basis(positions: tuple[float, ...], half_width: float, spacing: float) -> np.ndarray:
    """Cubic B-splines of a uniform lattice over [-half_width, half_width] at `positions`, [positions, knots]."""
    intervals = int(np.ceil(2 * half_width / spacing)) + 1
    knots = -half_width + spacing * np.arange(-3, intervals + 4)
    return BSpline.design_matrix(np.array(positions), knots, 3).toarray().astype(np.float32)


def smooth_noise(rng: np.random.Generator, grid: Grid, spacing: float) -> np.ndarray:
    """A random field of zero mean and unit variance, smooth over about `spacing` mm, [x, y, z] float32.

    The coefficients depend on `rng` and `spacing` alone, so the field is the same one on every grid.
    """
    bases = [_basis(tuple(a.tolist()), h, spacing) for a, h in zip(grid.axes, _HALF_WIDTH, strict=True)]
    field = rng.standard_normal([b.shape[1] for b in bases], dtype=np.float32) / np.float32(_UNIT_STD)
    for basis in bases:  # one axis at a time: the new axis goes last, so three turns restore the order
        field = np.tensordot(field, basis, axes=(0, 1))
    return field


@dataclass(frozen=True)
class Warp:
    """Where in the template each voxel comes from: q [3, x, y, z] in mm, and the linear part [3, 3] of that map."""

    q: np.ndarray
    linear: np.ndarray


def random_warp(rng: np.random.Generator, grid: Grid) -> Warp:
    """Pose, size and shape of one head. The template is left-right symmetric; the noise on both lattices is not."""
    scale = rng.uniform(0.93, 1.0) * rng.uniform(0.975, 1.025, 3) * [1.0, 1.0, 0.955]
    rotation = Rotation.from_euler("xyz", rng.normal(0, 2.5, 3), degrees=True).as_matrix()
    linear = (np.diag(1 / scale) @ rotation).astype(np.float32)
    shift = np.append(rng.normal(0, 2, 2), rng.normal(0, 0.5)).astype(np.float32)
    q = np.tensordot(linear, grid.positions() - shift[:, None, None, None], axes=1)
    for spacing, amplitude in ((40, 2.8), (16, 1.1)):
        for axis in range(3):
            q[axis] += np.float32(amplitude) * smooth_noise(rng, grid, spacing)
    return Warp(q, linear)


def find_position(warp: Warp, grid: Grid, target: np.ndarray) -> np.ndarray:
    """The subject position (mm, [3]) that the warp maps to the template position `target` [3], to about 0.1 mm."""
    position = np.linalg.solve(warp.linear, np.asarray(target, float))
    for _ in range(8):  # the warp is close to linear, so this converges
        index = [(p - a[0]) / grid.voxel for p, a in zip(position, grid.axes, strict=True)]
        here = [ndimage.map_coordinates(q, np.array(index)[:, None], order=1, mode="nearest")[0] for q in warp.q]
        position = position - np.linalg.solve(warp.linear, np.array(here) - target)
    return position
