"""The forward process of FPDM: noising a slice step by step, and watching where "healthy" and the slice part ways.

One scan with running sums: memory does not grow with the steps, and each step takes three network passes, two of them
in one batch. What it returns goes to `calibration` and `masks`.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hae_jax.diffusion.process import Denoiser, Process, guide
from hae_jax.errors import UserError

HEALTHY = 0  # the class label


class Denoisers(NamedTuple):
    """The network's two faces in a translation; t are original timesteps."""

    null: Denoiser  # (x, t) -> output under the null condition
    healthy_and_null: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]  # both, from one stacked pass


class Translation(NamedTuple):
    """What one batch of slices gives; M are the chosen modalities, T the steps."""

    mse: jax.Array  # [B, T, M] spatial means of (G_t - X)^2, G_t the guided prediction of x0
    ref: jax.Array  # [B, T, M] of (R_t - X)^2, R_t the reference prediction
    diff: jax.Array  # [B, T, M] of (G_t - R_t)^2
    map: jax.Array  # [B, H, W, M] mean of (G_t - X)^2 over t < t_e
    t_e: jax.Array  # [B, M] the step at which diff is largest
    healthy: jax.Array  # [B, H, W, M] G at t_e: the healthy counterpart


@dataclasses.dataclass(frozen=True)
class ForwardSettings:
    """How far and how to translate.

    Attributes:
      steps: steps of the (respaced) schedule to walk, from its beginning.
      guidance: strength w of the guided prediction.
      reference: what the guided prediction is compared with: the unguided "healthy" one (the published code) or the
        "null" one (the paper).
      d_reverse: walk by DDIM inversion; off: noise the slice anew at each step.
      modality: channels that take part.

    Raises:
      UserError: for values that cannot be.
    """

    steps: int
    guidance: float = 2.0
    reference: str = "healthy"
    d_reverse: bool = True
    modality: tuple[int, ...] = (0, 3)

    def __post_init__(self):
        object.__setattr__(self, "modality", tuple(self.modality))
        if self.steps < 1:
            raise UserError(f"translation.forward_steps gives {self.steps} steps: it must give at least 1")
        if self.reference not in ("healthy", "null"):
            raise UserError(f"translation.reference is {self.reference!r}: choose healthy or null")
        if not self.modality or min(self.modality) < 0 or len(set(self.modality)) != len(self.modality):
            raise UserError(f"translation.modality is {self.modality}: give different channel numbers from 0")


def network_denoisers(model: Callable[..., jax.Array]) -> Denoisers:
    """The denoisers of a class-conditional network `model(x, t, y, null=...)`."""

    def healthy_and_null(x, t):
        y = jnp.full(2 * len(x), HEALTHY)
        null = jnp.arange(2 * len(x)) >= len(x)
        out = model(jnp.concatenate([x, x]), jnp.concatenate([t, t]), y, null=null)
        return out[:len(x)], out[len(x):]

    return Denoisers(lambda x, t: model(x, t, null=True), healthy_and_null)


def forward_process(
    process: Process,
    denoisers: Denoisers,
    x0: jax.Array,  # [B, H, W, C] in [-1, 1]
    noise: Callable[[jax.Array], jax.Array],  # step () -> [B, H, W, C]
    settings: ForwardSettings,
) -> Translation:
    """Walks `settings.steps` steps of the forward process and compares two predictions of x0 at each.

    x_0 is noised once; x_{t} then comes from x_{t-1} by a DDIM inversion step under the null condition **that takes
    x_{t-1} as if it were at level t** (network and coefficients at t): an off-by-one of the published code which its
    results depend on. The map needs no stored steps: the running sum of (G_t - X)^2 is kept whenever diff_t is
    strictly the largest so far, before step t is added.
    """
    modality = jnp.asarray(settings.modality)
    x_m = x0[..., modality]

    def step(carry, t):
        x, total, best = carry
        t_rows = jnp.full(x.shape[0], t)
        guided, reference = (g[..., modality] for g in _predictions(process, denoisers, x, t_rows, settings))
        errors = jnp.square(guided - x_m)
        curves = jax.tree.map(lambda a: a.mean((1, 2)),
                              (errors, jnp.square(reference - x_m), jnp.square(guided - reference)))
        best = _keep_if_better(best, curves[2], t, total, errors, guided)
        return (_next(process, denoisers, x, x0, t_rows + 1, noise, settings), total + errors, best), curves

    batch = x0.shape[0]
    first = process.noised(x0, jnp.zeros(batch, jnp.int32), noise(jnp.int32(0)))
    empty = jnp.zeros_like(x_m)
    best = _Best(jnp.full((batch, len(settings.modality)), -jnp.inf), jnp.zeros((batch, len(settings.modality)), int),
                 empty, empty)
    (_, _, best), (mse, ref, diff) = jax.lax.scan(step, (first, empty, best), jnp.arange(settings.steps))
    mse, ref, diff = (jnp.moveaxis(curve, 0, 1) for curve in (mse, ref, diff))
    count = jnp.maximum(best.t_e, 1)[:, None, None, :]
    return Translation(mse, ref, diff, best.total / count, best.t_e, best.healthy)


class _Best(NamedTuple):
    """The state at the step with the largest diff so far, per sample and modality."""

    diff: jax.Array  # [B, M]
    t_e: jax.Array  # [B, M]
    total: jax.Array  # [B, H, W, M] sum of errors over t < t_e; at t_e = 0 that of step 0
    healthy: jax.Array  # [B, H, W, M]


def _keep_if_better(best: _Best, diff: jax.Array, t: jax.Array, total, errors, guided) -> _Best:
    better = diff > best.diff
    total = jnp.where(t == 0, errors, total)
    now = _Best(diff, jnp.full_like(best.t_e, t), total, guided)

    def choose(new, old):
        return jnp.where(better if new.ndim == 2 else better[:, None, None, :], new, old)

    return jax.tree.map(choose, now, best)


def _predictions(process, denoisers, x, t, settings) -> tuple[jax.Array, jax.Array]:
    """The guided and the reference prediction of x0 from the same x_t, each [B, H, W, C]."""
    healthy, null = denoisers.healthy_and_null(x, process.original(t))
    reference = healthy if settings.reference == "healthy" else null
    guided = guide(healthy, null, settings.guidance)
    return process.predict(guided, x, t).x0, process.predict(reference, x, t).x0


def _next(process, denoisers, x, x0, t, noise, settings) -> jax.Array:
    """x at step t, from x at step t - 1 or from x0."""
    if not settings.d_reverse:
        return process.noised(x0, t, noise(t[0]))
    prediction = process.predict(denoisers.null(x, process.original(t)), x, t)
    return process.ddim_inversion_step(prediction, t)
