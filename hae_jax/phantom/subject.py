"""Phantom, third stage: one subject from seed and index: tissue, harmless spots, lesions, effects of the scanner.

All four contrasts are computed from the same maps, so a voxel has the same tissue in all of them.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import ndimage
from scipy.special import expit, softmax
from threadpoolctl import threadpool_limits

from hae_jax.data.cases import MODALITIES
from hae_jax.phantom.lesion import (
    ENHANCING,
    NECROSIS,
    OEDEMA,
    Focus,
    Lesion,
    draw_lesion,
    draw_stroke,
    mass_effect,
    plan_lesions,
)
from hae_jax.phantom.warp import Grid, Template, Warp, find_position, load_template, random_warp, smooth_noise

# Intensities per modality (flair, t1, t1ce, t2), in units in which the brightest healthy tissue is near 1.
TISSUE = {"fluid": (0.15, 0.24, 0.25, 0.95), "gm": (0.54, 0.58, 0.60, 0.60), "wm": (0.44, 0.80, 0.81, 0.42)}
DETAIL = (-0.10, 0.45, 0.45, -0.30)  # gain of the template's fine T1 structure
SPOT = (1.10, 0.56, 0.57, 0.80)  # harmless: periventricular caps, white-matter hyperintensities
OEDEMA_LOOK = (1.25, 0.52, 0.53, 0.86)
NECROSIS_LOOK = (0.75, 0.30, 0.29, 0.92)
COLD_LOOK = (1.12, 0.40, 0.41, 0.88)  # a core that does not enhance
ENHANCING_LOOK = (1.05, 0.50, 1.20, 0.70)
STROKE_LOOK = (0.20, 0.27, 0.28, 0.94)  # a cavity full of fluid
SCAR_LOOK = (1.15, 0.52, 0.53, 0.85)  # around the cavity
T1 = MODALITIES.index("t1")
FULL_SCALE = 1000.0  # int16 units of intensity 1, before the per-volume gain


@dataclass(frozen=True)
class Subject:
    """volumes: [M, X, Y, Z] int16 (flair, t1, t1ce, t2, or t1 alone); labels: [X, Y, Z] int16; affine: to RAS mm."""

    volumes: np.ndarray
    labels: np.ndarray
    affine: np.ndarray
    foci: tuple[Focus, ...]


@dataclass(frozen=True)
class Head:
    """The anatomy in the box, all [x, y, z] and 0 outside the brain; positions and distances in template mm.

    tissue: [3, x, y, z], shares of fluid, gm, wm. lateral, front: position to the left, to the back. Others as in
    `Template`.
    """

    inside: np.ndarray
    tissue: np.ndarray
    detail: np.ndarray
    depth: np.ndarray
    ventricle: np.ndarray
    lateral: np.ndarray
    front: np.ndarray


def make_subject(seed: int, index: int, *, lesion: bool, size: float = 1.0, kind: str = "tumour") -> Subject:
    """Subject `index` of the phantom with this seed; a pure function of its arguments.

    The head and its harmless spots are the same with and without `lesion`.

    Args:
      kind: "tumour", four modalities with the labels 1, 2 and 4; "stroke", T1 with the label 1.
      size: scale of the grid; 1 is 240 x 240 x 155 voxels of 1 mm, 0.25 is 60 x 60 x 39 voxels of 4 mm.
    """
    with threadpool_limits(1):  # one core per worker, and sums in an order that does not depend on the machine
        rngs = np.random.default_rng((seed, index, 2)).spawn(7)
        grid, template = Grid.of_size(size), load_template()
        warp = random_warp(rngs[0], grid)
        foci = plan_lesions(seed, index, kind) if lesion else ()
        bent, centres = mass_effect(warp, grid, template.sample(template.skull, warp.q), foci) if foci else (warp, [])
        head = _anatomy(rngs[1], grid, template, bent)
        images = _contrasts(rngs[2], grid, head)
        _add_spots(rngs[3], grid, template, bent, head, images)
        _add_vessels(rngs[4], grid, head, images)
        labels = np.zeros(grid.box_shape, np.uint8)
        for focus, centre in zip(foci, centres, strict=True):
            if kind == "stroke":
                _paint_stroke(rngs[5], grid, draw_stroke(rngs[5], grid, focus, centre, head.tissue, head.lateral),
                              images, labels)
            else:
                _paint(rngs[5], grid, draw_lesion(rngs[5], grid, focus, centre, head.tissue, head.lateral), images,
                       labels)
        volumes = _scan(rngs[6], grid, head.inside, images[[T1]] if kind == "stroke" else images)
        return Subject(_in_volume(volumes, grid), _in_volume(labels.astype(np.int16), grid), grid.affine, foci)


def _in_volume(box: np.ndarray, grid: Grid) -> np.ndarray:
    """The box [..., x, y, z] put into the whole field of view [..., X, Y, Z]."""
    whole = np.zeros((*box.shape[:-3], *grid.shape), box.dtype)
    whole[(..., *grid.box)] = box
    return whole


def _anatomy(rng: np.random.Generator, grid: Grid, template: Template, warp: Warp) -> Head:
    """Samples the template's maps and sharpens the tissues.

    The template is an average of many brains, so its probabilities are smooth. They are raised to a power, and noise is
    added to their logarithms. The result is as sharp as a single brain.
    """
    depth = template.sample(template.depth, warp.q)
    ragged = 1.4 + 0.5 * smooth_noise(rng, grid, 25) + 0.35 * smooth_noise(rng, grid, 7)  # skull-stripping is uneven
    inside = ndimage.binary_opening(depth > np.clip(ragged, 0.3, 3.0))
    q = warp.q[:, inside]
    gm, wm, detail, ventricle = (template.sample(m, q) for m in (template.gm, template.wm, template.detail,
                                                                 template.ventricle))
    fluid = np.clip(1 - gm - wm, 0, 1)
    # The whole rim of the averaged mask is fluid. A stripped brain has only patches of fluid there.
    fluid *= np.clip((depth[inside] - 1.5) / 3 + 0.35 * smooth_noise(rng, grid, 10)[inside], 0.05, 1)
    logit = 2.2 * np.log(np.stack([fluid, gm, wm]) + 0.02)
    logit[0] += 0.5 * smooth_noise(rng, grid, 3)[inside] + 0.4 * smooth_noise(rng, grid, 7)[inside]
    logit[1] += 0.4 * smooth_noise(rng, grid, 3)[inside]
    values = np.concatenate([softmax(logit, axis=0), [detail, depth[inside], ventricle], q[:2]])
    maps = np.zeros((len(values), *grid.box_shape), np.float32)
    maps[:, inside] = values
    return Head(inside, maps[:3], *maps[3:])


def _contrasts(rng: np.random.Generator, grid: Grid, head: Head) -> np.ndarray:
    """The four noise-free images [4, x, y, z]: tissue intensities with 4% jitter per subject, and fine structure."""
    look = np.array([TISSUE["fluid"], TISSUE["gm"], TISSUE["wm"]], np.float32).T  # [4, 3]
    images = np.tensordot(look * rng.normal(1, 0.04, look.shape).astype(np.float32), head.tissue, axes=1)
    detail = head.detail * (1 - head.tissue[0])
    for image, gain in zip(images, DETAIL, strict=True):
        image *= 1 + np.float32(0.025) * smooth_noise(rng, grid, 16)
        image += np.float32(gain) * detail
    return images


def _blend(images: np.ndarray, look: Iterable[Any], weight: np.ndarray) -> None:
    """Moves the images [4, ...] toward `look` [4] (numbers or arrays) by `weight` [...], in place."""
    for image, value in zip(images, look, strict=True):
        image += (value - image) * weight


def _add_spots(
    rng: np.random.Generator, grid: Grid, template: Template, warp: Warp, head: Head, images: np.ndarray,
) -> None:
    """Adds changes of age, bright on flair and harmless: periventricular caps, small white-matter foci.

    Their load varies between subjects, from low to high.
    """
    wm = head.tissue[2]
    horns = 0.35 + 0.65 * expit((np.abs(head.front + 2) - 22) / 4)  # caps are at the frontal and occipital horns
    reach, peak = np.float32(rng.uniform(2.0, 5.0)), np.float32(rng.uniform(0.5, 1.1))
    caps = peak * np.exp(-head.ventricle / reach) * horns * (1 + 0.5 * smooth_noise(rng, grid, 9))
    _blend(images, SPOT, np.clip(caps, 0, 0.9) * wm)
    place = np.argwhere((template.wm > 0.75) & (template.depth > 12)) - template.centre
    place = place[np.abs(place[:, 2] - 22) < 30]
    for target in place[rng.choice(len(place), rng.integers(4, 26))]:
        radius, peak = min(0.8 + rng.gamma(2.5, 0.9), 5.0), rng.uniform(0.5, 1.0)
        stretch = np.exp(rng.normal(0, 0.3, (3, 1, 1, 1))) / radius
        centre = find_position(warp, grid, target)
        crop = grid.crop(centre, 4 * radius)
        part = grid.part(crop)
        r2 = np.square((part.positions() - centre[:, None, None, None]) * stretch).sum(axis=0)
        flat_topped = np.exp(-np.square(r2 * np.exp(0.5 * smooth_noise(rng, part, 4))) / 2)
        _blend(images[(slice(None), *crop)], SPOT, (peak * flat_topped).astype(np.float32) * wm[crop])


def _add_vessels(rng: np.random.Generator, grid: Grid, head: Head, images: np.ndarray) -> None:
    """Brightens vessels on t1ce, as contrast agent does: curves near the surface, where two random fields vanish."""
    distance = np.square(smooth_noise(rng, grid, 16)) + np.square(smooth_noise(rng, grid, 16))
    weight = 0.8 * np.exp(-distance / np.float32(0.012)) * np.clip(1.6 - head.depth / 12, 0, 1) * head.inside
    images[2] += (1.05 - images[2]) * weight


def _paint(rng: np.random.Generator, grid: Grid, lesion: Lesion, images: np.ndarray, labels: np.ndarray) -> None:
    """Blends one tumour into the images [4, x, y, z] and labels [x, y, z], in place."""
    part, view = grid.part(lesion.crop), images[(slice(None), *lesion.crop)]
    coarse, fine = smooth_noise(rng, part, 8), smooth_noise(rng, part, 3)
    contrast = rng.uniform(0.8, 1.0)
    oedema = [value * jitter for value, jitter in zip(OEDEMA_LOOK, rng.normal(1, 0.05, 4), strict=True)]
    _blend(view, oedema, np.clip(lesion.strength * contrast * (1 + 0.16 * coarse + 0.08 * fine), 0, 1))
    enhancing = ENHANCING_LOOK * rng.normal(1, 0.07, 4)
    dead = np.array(NECROSIS_LOOK if lesion.kind == "ring" else COLD_LOOK) * rng.normal(1, (0.22, 0.1, 0.1, 0.06))
    sigma = 0.6 / grid.voxel
    for label, look, texture in ((NECROSIS, dead, 0.13), (ENHANCING, enhancing, 0.15)):
        weight = ndimage.gaussian_filter((lesion.labels == label).astype(np.float32), sigma)
        modulation = 1 + texture * (coarse + 0.7 * fine)
        _blend(view, [value * modulation for value in look], weight)
    here = labels[lesion.crop]
    new = (lesion.labels > 0) & ((here == 0) | ((here == OEDEMA) & (lesion.labels != OEDEMA)))
    here[new] = lesion.labels[new]


def _paint_stroke(rng: np.random.Generator, grid: Grid, lesion: Lesion, images: np.ndarray, labels: np.ndarray) -> None:
    """Blends one infarct into the images [4, x, y, z] and labels [x, y, z]: a cavity, and a scar around and within."""
    part, view = grid.part(lesion.crop), images[(slice(None), *lesion.crop)]
    coarse, fine = smooth_noise(rng, part, 9), smooth_noise(rng, part, 3)
    cavity = np.array(STROKE_LOOK) * rng.normal(1, 0.06, 4)
    _blend(view, SCAR_LOOK, np.clip(lesion.strength * (0.9 + 0.1 * coarse), 0, 1))
    hollow = expit((2 * lesion.strength - 1.1) * 5 + rng.normal(0.6, 0.5) + 0.8 * coarse + 0.3 * fine)
    _blend(view, cavity, hollow * lesion.strength)
    labels[lesion.crop] |= lesion.labels


def _scan(rng: np.random.Generator, grid: Grid, inside: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Effects of the scanner: bias field of 6%, Rician noise, gain; [M, x, y, z] int16.

    The background is exactly 0, the brain at least 1.
    """
    out = np.zeros(images.shape, np.int16)
    for modality, image in enumerate(images):
        bias = np.exp(0.06 * smooth_noise(rng, grid, 70)[inside])
        noise = 0.022 * rng.standard_normal((2, bias.size), dtype=np.float32)
        signal = np.hypot(image[inside] * bias + noise[0], noise[1])
        gain = FULL_SCALE * np.exp(rng.normal(0, 0.3))
        out[modality][inside] = np.clip(np.rint(signal * gain), 1, 32767).astype(np.int16)
    return out
