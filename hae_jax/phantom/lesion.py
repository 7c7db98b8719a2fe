"""Phantom, second stage: the lesions of a subject, and how they displace the brain.

`plan_lesions` plans them from seed and subject alone. `mass_effect` bends the warp before the tissue maps are sampled.
In these maps, `draw_lesion` then grows core and oedema of a tumour, and `draw_stroke` grows an old infarct.
"""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from scipy.spatial.transform import Rotation
from skimage.graph import MCP_Geometric

from hae_jax.phantom.warp import Grid, Warp, find_position, load_template, smooth_noise, upsample

NECROSIS, OEDEMA, ENHANCING = 1, 2, 4  # BraTS labels; 1 is also the core that does not enhance
VOLUME_ML = (0.5, 15.0, 120.0)  # of all tumours of a subject; log-uniform below and above the middle value
SMALL_SHARE = 0.12  # share of subjects below the middle value
KINDS = {  # share of subjects, core's share of the volume
    "ring": (0.50, (0.25, 0.50)),  # enhancing rim around necrosis
    "solid": (0.16, (0.20, 0.45)),  # enhancing throughout
    "cold": (0.22, (0.30, 0.65)),  # a core that does not enhance
    "diffuse": (0.12, (0.02, 0.05)),  # infiltration with hardly a core
}
PHANTOMS = ("tumour", "stroke")  # kinds of phantom: four modalities and tumours, or T1 alone and old infarcts
STROKE_ML = (0.5, 100.0)  # all infarcts of a subject; log-uniform
STROKE = 1  # label
_STEP = np.array([0.6180339887498949, 0.4142135623730951])  # irrational, so that fractions of the multiples fill [0, 1)
_TRAVEL_COST = {"wm": 1.0, "gm": 4.0, "fluid": 15.0}  # oedema spreads along white matter and stops at fluid


@dataclass(frozen=True)
class Focus:
    """One tumour of a subject. centre: template mm [3]. axes: relative half-axes [3]; rotation: Euler degrees [3]."""

    kind: str
    volume_ml: float
    core_ml: float
    centre: tuple[float, float, float]
    axes: tuple[float, float, float]
    rotation: tuple[float, float, float]
    push: float

    @property
    def core_radius(self) -> float:
        """Radius of the sphere with the core's volume, mm."""
        return _radius(self.core_ml)

    @property
    def mass_radius(self) -> float:
        """Radius of the sphere that displaces the brain, mm. Its volume is the core and a third of the oedema."""
        return _radius(self.core_ml + 0.33 * (self.volume_ml - self.core_ml))


@dataclass(frozen=True)
class Lesion:
    """A drawn tumour in a crop of the box; arrays [x, y, z] of that crop.

    labels: uint8, 0 1 2 4. strength: of the oedema, 0 to 1, about one half at the label's border.
    """

    kind: str
    crop: tuple[slice, ...]
    labels: np.ndarray
    strength: np.ndarray


def plan_lesions(seed: int, index: int, phantom: str = "tumour") -> tuple[Focus, ...]:
    """The lesions of subject `index`. They depend on the arguments alone.

    Volumes and kinds follow low-discrepancy sequences over the subjects, so that twenty consecutive subjects have
    small and large lesions and every kind.
    """
    rng = np.random.default_rng((seed, index, 1))
    offset = np.random.default_rng((seed, 0)).random(2)
    u, v = (offset + index * _STEP) % 1
    if phantom == "stroke":
        return _plan_strokes(rng, float(np.exp(np.interp(u, (0, 1), np.log(STROKE_ML)))))
    total = float(np.exp(np.interp(u, (0, SMALL_SHARE, 1), np.log(VOLUME_ML))))
    kind = list(KINDS)[int(np.searchsorted(np.cumsum([share for share, _ in KINDS.values()]), v * 0.9999))]
    count = 1 + int(rng.choice(3, p=(0.7, 0.2, 0.1))) if total > 2 else 1
    shares = np.append(1.0, rng.uniform(0.03, 0.35, count - 1))
    volumes = np.maximum(total * shares / shares.sum(), VOLUME_ML[0] / 2)
    foci: list[Focus] = []
    for volume in volumes:
        foci.append(_plan_focus(rng, kind, float(volume), foci))
    return tuple(foci)


def _plan_strokes(rng: np.random.Generator, total: float) -> tuple[Focus, ...]:
    """One to three infarcts anywhere in the cerebrum, cortex included. They replace tissue and displace none."""
    shares = np.append(1.0, rng.uniform(0.05, 0.4, int(rng.choice(3, p=(0.65, 0.25, 0.1))) if total > 2 else 0))
    template, foci = load_template(), []
    place = np.argwhere((template.wm + template.gm > 0.8) & (template.depth > 5))[::7] - template.centre
    below = (place[:, 2] < -20) & (place[:, 1] > 10)  # cerebellum
    stem = (place[:, 2] < -4) & (np.abs(place[:, 0]) < 20)
    place = place[~below & ~stem & (np.abs(place[:, 0]) > 6)]
    for volume in total * shares / shares.sum():
        free = np.ones(len(place), bool)
        for other in foci:
            free &= np.linalg.norm(place - other.centre, axis=1) > _radius(volume) + _radius(other.volume_ml)
        centre = rng.choice(place[free] if free.any() else place)
        axes, rotation = np.exp(rng.normal(0, 0.25, 3)), rng.uniform(-180, 180, 3)
        foci.append(Focus("stroke", float(volume), float(volume) * rng.uniform(0.2, 0.4), tuple(centre.tolist()),
                          tuple(axes.tolist()), tuple(rotation.tolist()), push=0.0))
    return tuple(foci)


def _plan_focus(rng: np.random.Generator, kind: str, volume: float, others: list[Focus]) -> Focus:
    return Focus(
        kind=kind,
        volume_ml=volume,
        core_ml=volume * rng.uniform(*KINDS[kind][1]),
        centre=_choose_centre(rng, _radius(volume), others),
        axes=tuple(np.exp(rng.normal(0, 0.18, 3)).tolist()),
        rotation=tuple(rng.uniform(-180, 180, 3).tolist()),
        push=float(rng.uniform(0.5, 0.7)))


def _radius(volume_ml: float) -> float:
    """Radius of the sphere with this volume, mm."""
    return (volume_ml * 1000 * 3 / (4 * np.pi)) ** (1 / 3)


def _choose_centre(rng: np.random.Generator, radius: float, others: list[Focus]) -> tuple[float, float, float]:
    """A place in the white matter of the cerebrum with room for a tumour of `radius` mm; template mm.

    Further foci avoid the others and mostly stay in the first one's hemisphere, as in multifocal glioma.
    """
    template = load_template()
    place = np.argwhere(template.wm > 0.6)[::7]
    depth, ventricle = template.depth[tuple(place.T)], template.ventricle[tuple(place.T)]
    place = place - template.centre
    below = (place[:, 2] < -20) & (place[:, 1] > 10)  # cerebellum
    stem = (place[:, 2] < -4) & (np.abs(place[:, 0]) < 20)
    good = ~below & ~stem
    if others and rng.random() < 0.8:
        good &= place[:, 0] * others[0].centre[0] > 0
    for other in others:
        good &= np.linalg.norm(place - other.centre, axis=1) > radius + _radius(other.volume_ml)
    for room in (1.0, 0.8, 0.6, 0.4, 0.2, 0.0):
        fits = (depth > 6 + 0.45 * room * radius) & (np.abs(place[:, 0]) > 4 + 0.7 * room * radius)
        fits &= good & (ventricle > 2 + 0.4 * room * radius)
        if fits.any():
            return tuple(place[rng.choice(np.flatnonzero(fits))].tolist())
    return tuple(place[rng.integers(len(place))].tolist())


def mass_effect(
    warp: Warp, grid: Grid, skull: np.ndarray, foci: tuple[Focus, ...],
) -> tuple[Warp, list[np.ndarray]]:
    """Bends `warp` so that each tumour displaces tissue. Returns it with the tumours' positions in the subject (mm).

    The tissue at position p comes from c + (p - c) (1 - push exp(-(r / 1.9 R)^2)), with the distance r from the centre
    c and the mass radius R. At r = R tissue has moved by 0.38 to 0.53 R. The skull is not displaced: the push decreases
    toward it. `skull` is the distance [x, y, z] to it in mm.
    """
    centres = []
    for focus in foci:
        centre = find_position(warp, grid, np.array(focus.centre))
        offset = grid.positions() - centre.astype(np.float32)[:, None, None, None]
        r = np.linalg.norm(_ellipsoid(focus, offset), axis=0) / np.float32(focus.mass_radius)
        share = focus.push * np.exp(-np.square(r / 1.9, out=r), out=r)
        wall = 10 + 0.9 * focus.push * focus.mass_radius
        share *= np.clip(skull / np.float32(wall), 0, 1)
        offset *= share
        warp = Warp(warp.q - np.tensordot(warp.linear, offset, axes=1), warp.linear)
        centres.append(centre)
    return warp, centres


def _ellipsoid(focus: Focus, offset: np.ndarray) -> np.ndarray:
    """Offsets [3, ...] in the tumour's own axes, scaled so that the tumour's ellipsoid becomes a sphere."""
    axes = np.array(focus.axes) / np.prod(focus.axes) ** (1 / 3)
    matrix = Rotation.from_euler("xyz", focus.rotation, degrees=True).as_matrix() / axes[:, None]
    return np.tensordot(matrix.astype(np.float32), offset, axes=1)


def draw_lesion(
    rng: np.random.Generator, grid: Grid, focus: Focus, centre: np.ndarray,
    tissue: np.ndarray,  # [3, x, y, z] shares of fluid, gm, wm; all 0 outside the brain
    lateral: np.ndarray,  # [x, y, z] mm from the midline, positive to the left
) -> Lesion:
    """Grows one tumour at `centre` (mm): core, its parts, and oedema, up to the planned volumes."""
    crop = grid.crop(centre, 30 + 1.5 * _radius(focus.volume_ml))
    part = grid.part(crop)
    tissue = tissue[(slice(None), *crop)]
    lateral = lateral[crop] * np.float32(np.sign(focus.centre[0]))
    allowed = (tissue.sum(axis=0) > 0.5) & (lateral > 0)
    core = _smallest(_core_coordinate(rng, part, focus, centre, tissue[0]), allowed, focus.core_ml, grid.voxel)
    travel = _travel(rng, part, core, tissue, allowed)
    travel[core] = 0
    whole = _smallest(travel, allowed & (tissue[0] < 0.5) | core, focus.volume_ml, grid.voxel)
    labels = np.where(whole, OEDEMA, 0).astype(np.uint8)
    labels[core] = NECROSIS
    if focus.kind in ("ring", "solid"):
        labels[core & ~_necrosis(rng, part, focus, core)] = ENHANCING
    edge = travel[whole].max() if whole.any() else 0.0
    width = 1.2 + 0.12 * edge
    strength = 1 / (1 + np.exp(np.clip((travel - edge) / width, -30, 30))) * allowed * np.clip(lateral / 4, 0, 1)
    return Lesion(focus.kind, crop, labels, strength.astype(np.float32))


def draw_stroke(
    rng: np.random.Generator, grid: Grid, focus: Focus, centre: np.ndarray,
    tissue: np.ndarray,  # [3, x, y, z] shares of fluid, gm, wm; all 0 outside the brain
    lateral: np.ndarray,  # [x, y, z] mm from the midline, positive to the left
) -> Lesion:
    """Grows one infarct at `centre` (mm) through grey and white matter alike, up to the planned volume."""
    crop = grid.crop(centre, 30 + 1.5 * _radius(focus.volume_ml))
    part = grid.part(crop)
    tissue, lateral = tissue[(slice(None), *crop)], lateral[crop] * np.float32(np.sign(focus.centre[0]))
    allowed = (tissue.sum(axis=0) > 0.5) & (lateral > 0)
    core = _smallest(_core_coordinate(rng, part, focus, centre, tissue[0]), allowed, focus.core_ml, grid.voxel)
    matter = np.stack([tissue[0], np.zeros_like(tissue[0]), tissue[1] + tissue[2]])  # grey counts as white
    travel = _travel(rng, part, core, matter, allowed)
    travel[core] = 0
    whole = _smallest(travel, allowed & (tissue[0] < 0.5), focus.volume_ml, grid.voxel)
    edge = travel[whole].max() if whole.any() else 0.0
    strength = 1 / (1 + np.exp(np.clip((travel - edge) / (0.6 + 0.03 * edge), -30, 30))) * allowed
    return Lesion(focus.kind, crop, np.where(whole, STROKE, 0).astype(np.uint8), strength.astype(np.float32))


def _core_coordinate(
    rng: np.random.Generator, grid: Grid, focus: Focus, centre: np.ndarray, fluid: np.ndarray,
) -> np.ndarray:
    """Distance from the centre [x, y, z] in core radii. Bent space makes lobes, added noise makes frayed edges."""
    radius = focus.core_radius
    offset = grid.positions() - centre.astype(np.float32)[:, None, None, None]
    for spacing, amplitude in ((1.3, 0.42), (0.6, 0.16)):
        for axis in range(3):
            offset[axis] += np.float32(amplitude * radius) * smooth_noise(rng, grid, max(spacing * radius, 3.0))
    r = np.linalg.norm(_ellipsoid(focus, offset), axis=0) / np.float32(radius)
    for spacing, amplitude in ((14, 0.16), (6, 0.10), (3, 0.06)):
        r += np.float32(amplitude) * smooth_noise(rng, grid, spacing)
    return r + 0.8 * fluid


def _smallest(value: np.ndarray, allowed: np.ndarray, volume_ml: float, voxel: float) -> np.ndarray:
    """Mask of the allowed voxels with the smallest finite values, up to `volume_ml`; at least one voxel."""
    candidates = np.flatnonzero(allowed.ravel() & np.isfinite(value.ravel()))
    count = min(max(1, round(volume_ml * 1000 / voxel**3)), len(candidates))
    chosen = candidates[np.argsort(value.ravel()[candidates], kind="stable")[:count]]
    mask = np.zeros(value.size, bool)
    mask[chosen] = True
    return mask.reshape(value.shape)


def _travel(
    rng: np.random.Generator, grid: Grid, core: np.ndarray, tissue: np.ndarray, allowed: np.ndarray,
) -> np.ndarray:
    """Cost of the cheapest path from the core, [x, y, z], mm of white matter; infinite where no path leads.

    It is computed on a lattice of 2 mm, since paths are smooth, and then interpolated.
    """
    stride = max(1, round(2 / grid.voxel))
    lattice = (slice(None, None, stride),) * 3
    fluid, gm, wm = (tissue[(i, *lattice)] for i in range(3))
    cost = _TRAVEL_COST["wm"] * wm + _TRAVEL_COST["gm"] * gm + _TRAVEL_COST["fluid"] * fluid
    cost *= np.exp(0.45 * smooth_noise(rng, grid, 12)[lattice] + 0.25 * smooth_noise(rng, grid, 5)[lattice])
    cost[~allowed[lattice]] = -1  # impassable
    starts = np.argwhere(core[lattice] & (cost > 0))
    if not len(starts):
        nearest = np.argwhere(cost > 0)
        middle = np.argwhere(core).mean(axis=0) / stride
        starts = nearest[[np.argmin(np.square(nearest - middle).sum(axis=1))]]
    spacing = stride * grid.voxel
    travel, _ = MCP_Geometric(cost, sampling=(spacing,) * 3).find_costs(starts)
    travel = np.where(np.isfinite(travel), travel, 100.0).astype(np.float32)
    travel = upsample(travel, stride, core.shape)
    return np.where(travel < 80, travel, np.inf)


def _necrosis(rng: np.random.Generator, grid: Grid, focus: Focus, core: np.ndarray) -> np.ndarray:
    """The necrosis of an enhancing core: the part inside a rim of varying thickness, and a few pockets in the rim."""
    if focus.kind == "solid":
        return np.zeros_like(core)
    depth = ndimage.distance_transform_edt(core) * grid.voxel
    rim = np.clip(0.22 * focus.core_radius, 1.2, 4.5)
    thickness = rim * (1.1 + 0.45 * smooth_noise(rng, grid, 9) + 0.3 * smooth_noise(rng, grid, 4.5))
    pockets = smooth_noise(rng, grid, 7) > 1.6
    return core & ((depth > np.maximum(thickness, 0.5)) | (pockets & (depth > 1.5)))
