"""The forward process of FPDM: a slice is noised step by step, and each step compares the prediction with the slice.

Source: Che et al., "AnoFPDM: Anomaly Detection with Forward Process of Diffusion Models for Brain MRI",
arXiv:2404.15683, and its code (named "published" here). Inversion: Song et al. 2021, arXiv:2010.02502.

The process is one scan with running sums, so memory does not grow with the number of steps. Each step takes three
network passes, two of them in one batch. `published` makes masks of the results.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hae_jax.diffusion.process import Process
from hae_jax.errors import UserError
from hae_jax.localization.denoisers import Denoisers, check_choice, check_guidance, check_modality, guided_output

_MAPS = ("mse", "gradient", "gradient_unscaled")


class Translation(NamedTuple):
    """Results for a batch of slices. M is the number of chosen modalities, T that of steps."""

    mse: jax.Array  # [B, T, M] spatial means of (G_t - X)^2, G_t the guided prediction of x0
    ref: jax.Array  # [B, T, M] of (R_t - X)^2, R_t the reference prediction
    diff: jax.Array  # [B, T, M] of (G_t - R_t)^2
    map: jax.Array  # [B, H, W, M] mean of (G_t - X)^2 over t < t_e, or the variant that `ForwardSettings` selects
    t_e: jax.Array  # [B, M] the step at which diff is largest, times t_e_ratio
    healthy: jax.Array  # [B, H, W, M] G at t_e: the pseudo-healthy reconstruction


@dataclasses.dataclass(frozen=True)
class ForwardSettings:
    """Settings of the forward process. `maps` to `every` are ablations, whose defaults change nothing.

    Attributes:
      steps: number of steps of the (respaced) schedule, from its beginning.
      guidance: strength w of the guided prediction; None: the prediction for "healthy", as with w = 0.
      reference: the prediction with which the guided one is compared: the unguided "healthy" prediction (the published
        code) or the "null" prediction (the paper).
      d_reverse: use DDIM inversion; False: noise the slice again at each step.
      modality: channels in the maps.
      maps: what maps average: "mse", (G_t - X)^2; "gradient", (G_t - R_t)^2 / (B_t^2 (1 + w)^2) with
        B_t = (1 - a_t) / sqrt(a_t), the squared difference of the two scores; "gradient_unscaled", (G_t - R_t)^2.
      t_e_ratio: t_e is the step where diff is largest times this, rounded half to even, at most the last step. Unless
        it is 1, the walk is made twice and costs twice the time, in the same memory.
      last_step_only: the map uses only the step before t_e.
      every: k > 1: the map averages the steps 0, k, 2k, ... below t_e, and t_e itself.
      inversion: of the walk by DDIM inversion. "published": x_{t-1} is taken as if it were at level t, which shifts
        every step by one level; "exact": as at level t - 1, so that few large steps work as well.

    Raises:
      UserError: impossible values.
    """

    steps: int
    guidance: float | None = 2.0
    reference: str = "healthy"
    d_reverse: bool = True
    modality: tuple[int, ...] = (0, 3)
    maps: str = "mse"
    t_e_ratio: float = 1.0
    last_step_only: bool = False
    every: int = 1
    inversion: str = "published"

    def __post_init__(self):
        object.__setattr__(self, "modality", tuple(self.modality))
        if self.steps < 1:
            raise UserError(f"translation.forward_steps gives {self.steps} steps: it must give at least 1")
        check_choice("reference", self.reference, ("healthy", "null"))
        check_choice("maps", self.maps, _MAPS)
        check_choice("inversion", self.inversion, ("published", "exact"))
        check_guidance(self.guidance)
        check_modality(self.modality)
        if not (self.t_e_ratio > 0 and math.isfinite(self.t_e_ratio)):
            raise UserError(f"translation.t_e_ratio is {self.t_e_ratio}: give a number above 0; 1 leaves t_e as it is")
        if self.every < 1:
            raise UserError(f"translation.every is {self.every}: it must be at least 1, which takes every step")
        if self.last_step_only and self.every > 1:
            raise UserError(f"translation.every is {self.every}, but translation.last_step_only leaves one step to "
                            "average: choose one of the two")


def forward_process(
    process: Process,
    denoisers: Denoisers,
    x0: jax.Array,  # [B, H, W, C] in [-1, 1]
    noise: Callable[[jax.Array], jax.Array],  # step () -> [B, H, W, C]
    settings: ForwardSettings,
) -> Translation:
    """Runs `settings.steps` steps of the forward process and compares two predictions of x0 at each (Che et al.).

    G_t is the guided prediction of x0 from x_t, R_t the reference. t_e = argmax_t mean (G_t - R_t)^2, the map is
    (1 / t_e) sum_{t < t_e} (G_t - X)^2.

    x_0 is noised once. Each x_t is then computed from x_{t-1} by a DDIM inversion step under the null condition. With
    the inversion "published" **this step treats x_{t-1} as if it were at level t** (network and coefficients at t).
    This is an off-by-one of the published code, and its results depend on it. No steps are stored: the running sum of
    (G_t - X)^2, without step t, is kept whenever diff_t is the largest so far.
    """

    def is_largest(t, diff, best):
        return diff > best.diff

    first = _walk(process, denoisers, x0, noise, settings, is_largest)
    if settings.t_e_ratio == 1:
        return first
    # The process runs a second time, since the step to keep is known only after the whole diff curve.
    ends = jnp.round(settings.t_e_ratio * first.t_e).astype(first.t_e.dtype).clip(max=settings.steps - 1)
    return _walk(process, denoisers, x0, noise, settings, lambda t, diff, best: t == ends)


class _Kept(NamedTuple):
    """The state at the current candidate for t_e, per sample and modality."""

    diff: jax.Array  # [B, M]
    t_e: jax.Array  # [B, M]
    total: jax.Array  # [B, H, W, M] sum of the terms that the map averages
    healthy: jax.Array  # [B, H, W, M]


def _walk(process, denoisers, x0, noise, settings, counts: Callable[..., jax.Array]) -> Translation:
    """Runs the process once. `counts(t, diff_t [B, M], kept) -> [B, M] bool` tells whether to keep step t."""
    modality = jnp.asarray(settings.modality)
    x_m = x0[..., modality]

    def step(carry, t):
        x, total, kept = carry
        shared = t[None]  # one timestep for all slices, so that it is embedded once
        guided, reference = (g[..., modality] for g in _predictions(process, denoisers, x, shared, settings))
        errors, difference = jnp.square(guided - x_m), jnp.square(guided - reference)
        curves = jax.tree.map(lambda a: a.mean((1, 2)), (errors, jnp.square(reference - x_m), difference))
        term = _map_term(process, errors, difference, t, settings)
        now = _Kept(curves[2], jnp.full_like(kept.t_e, t), _ended(total, term, t, settings), guided)
        kept = _choose(counts(t, curves[2], kept), now, kept)
        return (_next(process, denoisers, x, x0, shared + 1, noise, settings),
                _continued(total, term, t, settings), kept), curves

    batch, empty = x0.shape[0], jnp.zeros_like(x_m)
    first = process.noised(x0, jnp.zeros(1, jnp.int32), noise(jnp.int32(0)))
    kept = _Kept(jnp.full((batch, len(settings.modality)), -jnp.inf), jnp.zeros((batch, len(settings.modality)), int),
                 empty, empty)
    (_, _, kept), (mse, ref, diff) = jax.lax.scan(step, (first, empty, kept), jnp.arange(settings.steps))
    mse, ref, diff = (jnp.moveaxis(curve, 0, 1) for curve in (mse, ref, diff))
    count = _terms(kept.t_e, settings)[:, None, None, :]
    return Translation(mse, ref, diff, kept.total / count, kept.t_e, kept.healthy)


def _map_term(process, errors, difference, t, settings) -> jax.Array:  # [B, H, W, M]
    """The term of step t in the map: (G_t - X)^2, (G_t - R_t)^2, or the latter over (B_t (1 + w))^2."""
    if settings.maps == "mse":
        return errors
    if settings.maps == "gradient_unscaled":
        return difference
    a = process.schedule.alpha_bar
    # (1 + w)^2 for both references, as published. For the healthy reference, w^2 would remove the guidance's effect.
    weight = a / np.square((1 - a) * (1 + (settings.guidance or 0)))
    return difference * jnp.asarray(weight, jnp.float32)[t]


def _ended(total, term, t, settings) -> jax.Array:  # [B, H, W, M]
    """The sum for a map with t_e = t: the terms of all steps before t, or that of step 0 if t is 0."""
    if settings.every > 1:
        return total + term
    return jnp.where(t == 0, term, total)


def _continued(total, term, t, settings) -> jax.Array:  # [B, H, W, M]
    """The sum after step t, for a map with t_e > t."""
    if settings.last_step_only:
        return term
    if settings.every > 1:
        return total + jnp.where(t % settings.every == 0, term, 0)
    return total + term


def _terms(t_e, settings) -> jax.Array:  # [B, M]
    """The number of terms in the sum of a map with the given t_e."""
    if settings.last_step_only:
        return jnp.ones_like(t_e)
    if settings.every > 1:
        return -(-t_e // settings.every) + 1
    return jnp.maximum(t_e, 1)


def _choose(here: jax.Array, now: _Kept, before: _Kept) -> _Kept:
    return jax.tree.map(lambda new, old: jnp.where(here if new.ndim == 2 else here[:, None, None, :], new, old),
                        now, before)


def _predictions(process, denoisers, x, t, settings) -> tuple[jax.Array, jax.Array]:
    """The guided and the reference prediction of x0 from the same x_t, each [B, H, W, C]."""
    healthy, null = denoisers.healthy_and_null(x, process.original(t))
    reference = healthy if settings.reference == "healthy" else null
    guided = guided_output(healthy, null, settings.guidance)
    return process.predict(guided, x, t).x0, process.predict(reference, x, t).x0


def _next(process, denoisers, x, x0, t, noise, settings) -> jax.Array:
    """x at step t, by DDIM inversion from step t - 1 (Song et al. 2021, eq. 14) or by noising x0 again."""
    if not settings.d_reverse:
        return process.noised(x0, t, noise(t[0]))
    level = t if settings.inversion == "published" else t - 1
    prediction = process.predict(denoisers.null(x, process.original(level)), x, level)
    return process.ddim_inversion_step(prediction, level)
