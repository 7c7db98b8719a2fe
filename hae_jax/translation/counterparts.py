"""Methods that take a slice to a healthy counterpart and call what has changed a lesion: DDIB and AnoDDPM.

They use the network of the forward process, or its unconditional twin; a threshold (`map_threshold.py`) turns their
maps into masks. One scan each way, in memory that does not grow with the steps.
"""

import dataclasses
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hae_jax.diffusion.noise import gaussian, simplex
from hae_jax.diffusion.process import Denoiser, Prediction, Process
from hae_jax.errors import UserError
from hae_jax.translation.forward_process import (
    Denoisers,
    check_choice,
    check_guidance,
    check_modality,
    guided_output,
    step_keys,
    step_noise,
)
from hae_jax.translation.map_threshold import MapThresholdMethod
from hae_jax.translation.masks import PUBLISHED_FILTERS, Filters


class Counterpart(NamedTuple):
    """What one batch of slices gives; M are the chosen modalities."""

    map: jax.Array  # [B, H, W] squared difference from the input, averaged over the modalities
    healthy: jax.Array  # [B, H, W, M] the healthy counterpart


@dataclasses.dataclass(frozen=True)
class Ddib(MapThresholdMethod):
    """Dual diffusion implicit bridges (Su et al. 2023): inverted without a class, decoded as healthy, both by DDIM.

    Attributes:
      process: the diffusion process.
      steps: N, inversion steps t = 0..N-1 of the (respaced) schedule; the slice counts as being at level 0 before them
        and is at level N after them.
      guidance: strength w towards healthy on the way back; None: none.
      start: where the way back begins: "published", at t = N-1, one level below what was reached, or "level", at N.
      modality: channels that the map is made of.
      rule, healthy_fpr, filters: see `MapThresholdMethod`.

    Raises:
      UserError: for values that cannot be.
    """

    process: Process
    steps: int
    guidance: float | None = 2.0
    start: str = "published"
    modality: tuple[int, ...] = (0, 3)
    rule: str = "dice"
    healthy_fpr: float = 5e-4
    filters: Filters = PUBLISHED_FILTERS

    name: ClassVar[str] = "ddib"
    network: ClassVar[bool] = True

    def __post_init__(self):
        object.__setattr__(self, "modality", tuple(self.modality))
        _check_steps("ddib_steps", self.steps)
        check_choice("ddib_start", self.start, ("published", "level"))
        check_guidance(self.guidance)
        check_modality(self.modality)
        if self.start == "level" and self.steps >= self.process.schedule.steps:
            raise UserError("translation.ddib_start is 'level', but translation.ddib_steps goes to the end of the "
                            "schedule, after which there is no level: take fewer steps, or 'published'")

    @property
    def passes(self) -> int:
        """Network passes for a slice: one for each step there, two for each step back."""
        return 3 * self.steps

    def __call__(
        self,
        denoisers: Denoisers,
        x0: jax.Array,  # [B, H, W, C] in [-1, 1]
        keys: jax.Array,  # [B], not used: nothing here is random
    ) -> Counterpart:
        """The healthy counterparts of a batch."""

        def towards_healthy(x, t):
            return guided_output(*denoisers.healthy_and_null(x, t), self.guidance)

        x = inverted(self.process, denoisers.null, x0, self.steps)
        back = self.steps + 1 if self.start == "level" else self.steps
        return _counterpart(decoded(self.process, towards_healthy, x, back), x0, self.modality)

    def healthy(self, results: Counterpart) -> np.ndarray:  # [S, H, W, M] in [-1, 1]
        """The healthy counterparts."""
        return results.healthy


@dataclasses.dataclass(frozen=True)
class AnoDdpm(MapThresholdMethod):
    """AnoDDPM (Wyatt et al. 2022): noised part of the way, then denoised by DDPM without a class.

    A network that knows the healthy only is what the method is meant for; one with classes answers under its null
    condition.

    Attributes:
      process: the diffusion process.
      steps: N, noising and denoising steps of the (respaced) schedule: noised to t = N-1, then back from there.
      noise: that the slice is noised with: "simplex" or "gaussian". On the way back it is Gaussian.
      modality: channels that the map is made of.
      rule, healthy_fpr, filters: see `MapThresholdMethod`.

    Raises:
      UserError: for values that cannot be.
    """

    process: Process
    steps: int
    noise: str = "simplex"
    modality: tuple[int, ...] = (0, 3)
    rule: str = "dice"
    healthy_fpr: float = 5e-4
    filters: Filters = PUBLISHED_FILTERS

    network: ClassVar[bool] = True

    def __post_init__(self):
        object.__setattr__(self, "modality", tuple(self.modality))
        _check_steps("anoddpm_steps", self.steps)
        if self.noise not in ("simplex", "gaussian"):
            raise UserError(f"translation.method is 'anoddpm-{self.noise}': choose anoddpm-simplex or anoddpm-gaussian")
        check_modality(self.modality)

    @property
    def passes(self) -> int:
        """Network passes for a slice."""
        return self.steps

    @property
    def name(self) -> str:
        """As on the command line."""
        return f"anoddpm-{self.noise}"

    def __call__(
        self,
        denoisers: Denoisers,
        x0: jax.Array,  # [B, H, W, C] in [-1, 1]
        keys: jax.Array,  # [B], of each slice's noise
    ) -> Counterpart:
        """The healthy counterparts of a batch."""
        t = jnp.full(x0.shape[0], self.steps - 1)
        first, later = step_keys(keys, self.steps), step_noise(keys, x0.shape[1:])  # step t = 0..N-1 takes key t
        noise = gaussian(first, x0.shape[1:])
        if self.noise == "simplex":
            noise = simplex(first, x0.shape[1:], self.process.original(t).astype(jnp.float32))

        def ddpm_step(prediction, x, t):
            return self.process.ddpm_step(prediction, x, t, later(t[0]))

        x = _walked_back(self.process, denoisers.null, self.process.noised(x0, t, noise), self.steps, ddpm_step)
        return _counterpart(x, x0, self.modality)

    def healthy(self, results: Counterpart) -> np.ndarray:  # [S, H, W, M] in [-1, 1]
        """The healthy counterparts."""
        return results.healthy


def inverted(process: Process, denoise: Denoiser, x0: jax.Array, steps: int) -> jax.Array:  # [B, H, W, C]
    """x at level `steps` by DDIM inversion steps t -> t+1, of an x0 that counts as being at level 0."""

    def step(x, t):
        t = jnp.full(x.shape[:1], t)
        return process.ddim_inversion_step(process.predict(denoise(x, process.original(t)), x, t), t), None

    return jax.lax.scan(step, x0, jnp.arange(steps))[0]


def decoded(process: Process, denoise: Denoiser, x: jax.Array, steps: int) -> jax.Array:  # [B, H, W, C]
    """x0 by deterministic DDIM steps t = steps-1..0, of an x that counts as being at level steps-1."""
    return _walked_back(process, denoise, x, steps, lambda prediction, x, t: process.ddim_step(prediction, t))


def _walked_back(
    process: Process, denoise: Denoiser, x: jax.Array, steps: int,
    advance: Callable[[Prediction, jax.Array, jax.Array], jax.Array],  # prediction, x_t, t [B] -> x at t - 1
) -> jax.Array:  # [B, H, W, C]
    def step(x, t):
        t = jnp.full(x.shape[:1], t)
        return advance(process.predict(denoise(x, process.original(t)), x, t), x, t), None

    return jax.lax.scan(step, x, jnp.arange(steps - 1, -1, -1))[0]


def _counterpart(healthy: jax.Array, x0: jax.Array, modality: tuple[int, ...]) -> Counterpart:
    chosen = jnp.asarray(modality)
    healthy, x_m = healthy[..., chosen], x0[..., chosen]
    return Counterpart(jnp.square(healthy - x_m).mean(-1), healthy)


def _check_steps(field: str, steps: int) -> None:
    if steps < 1:
        raise UserError(f"translation.{field} gives {steps} steps: it must give at least 1")
