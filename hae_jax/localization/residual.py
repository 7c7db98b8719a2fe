"""The residual map: the difference between a slice and its reconstruction at low noise, guided towards "healthy".

Sources of its parts: Ho et al. 2020, arXiv:2006.11239; Ho and Salimans 2022, arXiv:2207.12598.

This is our method. It uses a few timesteps at low noise instead of the hundreds of steps of the published method
(`forward_process`). It takes two network passes per timestep, noise draw and round.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hae_jax.data.slices import SliceGrid
from hae_jax.diffusion.process import Process
from hae_jax.errors import UserError
from hae_jax.localization.denoisers import (
    Denoisers,
    check_choice,
    check_guidance,
    check_modality,
    guided_output,
    step_noise,
)
from hae_jax.localization.map_threshold import MapThresholdMethod


class ResidualMap(NamedTuple):
    """Results for a batch of slices."""

    map: jax.Array  # [B, H, W] signed, in intensity of the network's range; high where there is a lesion
    spread: jax.Array  # [B, H, W] standard deviation of the map over noise draws; 0 with one draw
    healthy: jax.Array  # [B, H, W, M] mean of G over timesteps and draws: the pseudo-healthy reconstruction


@dataclasses.dataclass(frozen=True)
class ResidualSettings:
    """Settings of the residual.

    Attributes:
      timesteps: original timesteps t, each below the T of the diffusion. Low ones find lesions; which are low depends
        on the resolution.
      guidance: strength w towards healthy.
      draws: noise draws for each timestep.
      rounds: number of rounds. Before each further round, pixels with a positive residual get their pseudo-healthy
        value. At low noise, the network removes a large lesion only in part; each round removes more of it.
      modality: channels in the residual.
      weights: weight of each of these channels: positive if lesions are bright in it, negative if they are dark.
      smoothing: standard deviation of the Gaussian that smooths the map, in pixels; 0: no smoothing.
      rectify: when the positive part is taken: "after" all means. Ablations: "before" the mean over timesteps;
        "never": the mean absolute residual.

    Raises:
      UserError: for values that cannot be.
    """

    timesteps: tuple[int, ...] = (50, 100, 150, 200, 250, 300)
    guidance: float = 2.0
    draws: int = 1
    rounds: int = 1
    modality: tuple[int, ...] = (0,)
    weights: tuple[float, ...] = (1.0,)
    smoothing: float = 0.7
    rectify: str = "after"

    def __post_init__(self):
        for name in ("timesteps", "modality", "weights"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self.timesteps or min(self.timesteps) < 0:
            raise UserError(f"translation.timesteps is {self.timesteps}: give timesteps of at least 0")
        for name in ("draws", "rounds"):
            if getattr(self, name) < 1:
                raise UserError(f"translation.{name} is {getattr(self, name)}: it must be at least 1")
        check_guidance(self.guidance)
        check_modality(self.modality)
        check_choice("rectify", self.rectify, ("after", "before", "never"))
        if len(self.weights) != len(self.modality) or not any(self.weights):
            raise UserError(f"translation.weights is {self.weights}: give one number for each channel of "
                            f"translation.modality {self.modality}, not all 0")
        if not 0 <= self.smoothing < math.inf:
            raise UserError(f"translation.smoothing is {self.smoothing}: give pixels, at least 0")

    @property
    def passes(self) -> int:
        """Network passes for a slice."""
        return 2 * self.draws * self.rounds * len(self.timesteps)


def residual(
    process: Process,
    denoisers: Denoisers,
    x0: jax.Array,  # [B, H, W, C] in [-1, 1]
    noise: Callable[[jax.Array], jax.Array],  # step () -> [B, H, W, C]
    settings: ResidualSettings,
) -> ResidualMap:
    """The weighted mean of x0 - G over timesteps and noise draws. Its positive part is the anomaly map.

    map = K * sum_m a_m mean_{t, draw} (x0 - G_t)_m: G_t is the prediction of x0 from x_t (Ho et al. 2020, eq.
    9 and 15), guided to the class "healthy" (Ho and Salimans 2022, eq. 6), x_t is x0 noised to t, a_m the weight of
    modality m, K a Gaussian. The positive part is taken last, after filters across slices: noise then cancels instead
    of adding up.

    In each further round, x_t is noised from x0 in which G replaces pixels with a positive residual. The map is that of
    the last round.
    """
    modality, weights = jnp.asarray(settings.modality), jnp.asarray(settings.weights, jnp.float32)
    timesteps = jnp.asarray(settings.timesteps)
    count = len(settings.timesteps)
    x0_m = x0[..., modality]

    def rectified(signed):  # [B, H, W]
        return signed if settings.rectify == "after" else jnp.maximum(signed, 0)

    # start: x0, in later rounds with lesions replaced; first: the number of its first step.
    def look(start, first):  # -> residual [B, H, W], G [B, H, W, M]
        def step(totals, i):
            residual, healthy = totals
            t = timesteps[i % count][None]  # one timestep for all slices, so that it is embedded once
            x = process.noised(start, t, noise(i))
            assert denoisers.healthy_and_null is not None  # the network has classes
            output = guided_output(*denoisers.healthy_and_null(x, process.original(t)), settings.guidance)
            guided = process.predict(output, x, t).x0[..., modality]
            difference = x0_m - guided
            term = (jnp.abs(difference) * jnp.abs(weights) if settings.rectify == "never"
                    else difference * weights).sum(-1)
            return (residual + rectified(term), healthy + guided), None

        zeros = jnp.zeros(x0.shape[:3], jnp.float32), jnp.zeros(x0_m.shape, jnp.float32)
        totals, _ = jax.lax.scan(step, zeros, first + jnp.arange(count))
        return jax.tree.map(lambda total: total / count, totals)

    def draw(first):
        found = look(x0, first)
        for k in range(1, settings.rounds):
            residual, healthy = found
            filled = x0.at[..., modality].set(jnp.where(residual[..., None] > 0, healthy, x0_m))
            found = look(filled, first + k * count)
        return found

    # [draws, B, H, W], [draws, B, H, W, M]
    residuals, healthy = jax.lax.map(draw, settings.rounds * count * jnp.arange(settings.draws))
    signed = _smoothed(residuals, settings.smoothing)
    return ResidualMap(signed.mean(0), signed.std(0), healthy.mean(0))


def _smoothed(
    maps: jax.Array,  # [..., H, W]
    sigma: float,
) -> jax.Array:  # [..., H, W]
    """Convolves maps with a Gaussian that is truncated at 4 sigma. Borders repeat the edge."""
    if sigma == 0:
        return maps
    radius = max(1, math.ceil(4 * sigma))
    kernel = jnp.exp(-0.5 * (jnp.arange(-radius, radius + 1) / sigma) ** 2)
    kernel /= kernel.sum()
    for axis in (maps.ndim - 2, maps.ndim - 1):
        widths = [(radius, radius) if i == axis else (0, 0) for i in range(maps.ndim)]
        padded = jnp.pad(maps, widths, mode="edge")
        size = maps.shape[axis]
        maps = jnp.asarray(sum(k * jax.lax.slice_in_dim(padded, i, i + size, axis=axis) for i, k in enumerate(kernel)))
    return maps


@dataclasses.dataclass(frozen=True)
class Residual(MapThresholdMethod):
    """The signed residual at low noise (ours): see `residual`."""

    process: Process
    settings: ResidualSettings
    rule: str = dataclasses.field(default="healthy_fpr", kw_only=True)

    name: ClassVar[str] = "residual"
    network: ClassVar[bool] = True

    @property
    def modality(self) -> tuple[int, ...]:
        """Channels of the reconstruction."""
        return self.settings.modality

    @property
    def passes(self) -> int:
        """Network passes for a slice."""
        return self.settings.passes

    def __call__(
        self,
        denoisers: Denoisers,
        x0: jax.Array,  # [B, H, W, C] in [-1, 1]
        keys: jax.Array,  # [B], of each slice's noise
    ) -> ResidualMap:
        """The residual maps of a batch."""
        return residual(self.process, denoisers, x0, step_noise(keys, x0.shape[1:]), self.settings)

    def _maps(self, results: ResidualMap, grid: SliceGrid) -> np.ndarray:  # [S, H, W] float64
        return np.maximum(super()._maps(results, grid), 0)
