"""Baselines that reconstruct a pseudo-healthy slice. The anomaly map is its difference from the input.

They use the network of the forward process, or an unconditional network. A threshold (`map_threshold.py`) turns their
maps into masks. Each direction is one scan, so memory does not grow with the number of steps.

Sources: DDIB, Su et al. 2023, arXiv:2203.08382; AnoDDPM, Wyatt et al. 2022, CVPR Workshops; classifier guidance, Wolleb
et al. 2022, arXiv:2203.04306, and Dhariwal and Nichol 2021, arXiv:2105.05233; denoising autoencoder, Kascenas et al.
2022, MIDL; DDIM, Song et al. 2021, arXiv:2010.02502.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hae_jax.diffusion.noise import gaussian, simplex
from hae_jax.diffusion.process import Denoiser, Process, sample, walked_back
from hae_jax.errors import UserError
from hae_jax.localization.denoisers import (
    HEALTHY,
    Denoisers,
    check_choice,
    check_guidance,
    check_modality,
    guided_output,
    step_keys,
    step_noise,
)
from hae_jax.localization.map_threshold import MapThresholdMethod


class Counterpart(NamedTuple):
    """Results for a batch of slices. M is the number of chosen modalities."""

    map: jax.Array  # [B, H, W] squared or absolute difference from the input, averaged over the modalities
    healthy: jax.Array  # [B, H, W, M] the pseudo-healthy slice


@dataclasses.dataclass(frozen=True)
class Ddib(MapThresholdMethod):
    """Dual diffusion implicit bridges (Su et al. 2023): inverted without a class, decoded as healthy, both by DDIM.

    x_N = inversion(x0 | null), healthy = decode(x_N | healthy, w), map = mean over modalities of (healthy - x0)^2.

    Attributes:
      process: the diffusion process.
      steps: N, inversion steps t = 0..N-1 of the (respaced) schedule; the slice counts as being at level 0 before them
        and is at level N after them.
      guidance: strength w towards healthy in decoding; None: no guidance.
      start: first step of decoding: "published", t = N-1, one level below the reached one, or "level", N.
      modality: channels that the map is made of.

    Raises:
      UserError: for values that cannot be.
    """

    process: Process
    steps: int
    guidance: float | None = 2.0
    start: str = "published"
    modality: tuple[int, ...] = (0, 3)

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
        """Network passes per slice: one per inversion step, two per decoding step."""
        return 3 * self.steps

    def __call__(
        self,
        denoisers: Denoisers,
        x0: jax.Array,  # [B, H, W, C] in [-1, 1]
        keys: jax.Array,  # [B], not used: nothing here is random
    ) -> Counterpart:
        """The pseudo-healthy slices of a batch."""

        def towards_healthy(x, t):
            assert denoisers.healthy_and_null is not None  # `make_method` requires classes
            return guided_output(*denoisers.healthy_and_null(x, t), self.guidance)

        x = inverted(self.process, denoisers.null, x0, self.steps)
        back = self.steps + 1 if self.start == "level" else self.steps
        return _counterpart(sample(self.process, towards_healthy, x, back), x0, self.modality)


@dataclasses.dataclass(frozen=True)
class AnoDdpm(MapThresholdMethod):
    """AnoDDPM (Wyatt et al. 2022): noised part of the way, then denoised by DDPM without a class.

    x_N = sqrt(a_N) x0 + sqrt(1 - a_N) noise, healthy = DDPM from x_N, map = mean over modalities of (healthy - x0)^2.

    The method is meant for a network that was trained on healthy slices only. A network with classes is used under its
    null condition.

    Attributes:
      process: the diffusion process.
      steps: N, noising and denoising steps of the (respaced) schedule: noised to t = N-1, then back from there.
      noise: noise that is added to the slice: "simplex" or "gaussian". The noise of denoising steps is Gaussian.
      modality: channels that the map is made of.

    Raises:
      UserError: for values that cannot be.
    """

    process: Process
    steps: int
    noise: str = "simplex"
    modality: tuple[int, ...] = (0, 3)

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
        """The method's name on the command line."""
        return f"anoddpm-{self.noise}"

    def __call__(
        self,
        denoisers: Denoisers,
        x0: jax.Array,  # [B, H, W, C] in [-1, 1]
        keys: jax.Array,  # [B], of each slice's noise
    ) -> Counterpart:
        """The pseudo-healthy slices of a batch."""
        t = jnp.full(x0.shape[0], self.steps - 1)
        first, later = step_keys(keys, self.steps), step_noise(keys, x0.shape[1:])  # step t in 0..N-1 uses key t
        noise = gaussian(first, x0.shape[1:])
        if self.noise == "simplex":
            noise = simplex(first, x0.shape[1:], self.process.original(t).astype(jnp.float32))

        def ddpm_step(prediction, x, t):
            return self.process.ddpm_step(prediction, x, t, later(t[0]))

        x = walked_back(self.process, denoisers.null, self.process.noised(x0, t, noise), self.steps, ddpm_step)
        return _counterpart(x, x0, self.modality)


@dataclasses.dataclass(frozen=True)
class ClassifierGuidance(MapThresholdMethod):
    """Diffusion with classifier guidance (Wolleb et al. 2022): inverted by DDIM, then decoded towards "healthy".

    On the way back eps becomes eps - s sqrt(1 - alpha_bar_t) grad_x log p(healthy | x_t), with p of a classifier that
    was trained on noised slices (Dhariwal and Nichol 2021, eq. 14 and algorithm 2). The map is the mean over modalities
    of |healthy - x0|.

    Attributes:
      process: the diffusion process; its network predicts the noise.
      steps: N, inversion steps t = 0..N-1, and as many back.
      scale: s, strength of the gradient.
      modality: channels that the map is made of.

    Raises:
      UserError: for values that cannot be.
    """

    process: Process
    steps: int
    scale: float = 100.0
    modality: tuple[int, ...] = (0, 3)

    name: ClassVar[str] = "classifier"
    network: ClassVar[bool] = True

    def __post_init__(self):
        object.__setattr__(self, "modality", tuple(self.modality))
        _check_steps("classifier_steps", self.steps)
        check_modality(self.modality)
        if not 0 <= self.scale < math.inf:
            raise UserError(f"translation.classifier_scale is {self.scale}: give a strength of at least 0")
        if self.process.predicts != "eps":
            raise UserError("translation.method is 'classifier': it needs a network with diffusion.predicts 'eps'")

    @property
    def passes(self) -> int:
        """Passes of the denoising network per slice, without those of the classifier's gradients."""
        return 2 * self.steps

    def __call__(
        self,
        denoisers: Denoisers,
        x0: jax.Array,  # [B, H, W, C] in [-1, 1]
        keys: jax.Array,  # [B], not used: nothing here is random
    ) -> Counterpart:
        """The pseudo-healthy slices of a batch."""
        schedule, channels = self.process.schedule, x0.shape[-1]
        noise_scale = np.zeros(int(schedule.timesteps.max()) + 1)  # by original timestep
        noise_scale[schedule.timesteps] = np.sqrt(1 - schedule.alpha_bar)

        def log_healthy(x, t):
            assert denoisers.classifier is not None  # the network is a `GuidedNetwork`
            return jax.nn.log_softmax(denoisers.classifier(x, t))[:, HEALTHY].sum()  # each term depends on one slice

        def guided(x, t):
            output = denoisers.null(x, t)
            strength = self.scale * jnp.asarray(noise_scale, jnp.float32)[t][:, None, None, None]
            return output.at[..., :channels].add(-strength * jax.grad(log_healthy)(x, t))

        x = inverted(self.process, denoisers.null, x0, self.steps)
        return _counterpart(sample(self.process, guided, x, self.steps), x0, self.modality, jnp.abs)


@dataclasses.dataclass(frozen=True)
class Dae(MapThresholdMethod):
    """Denoising autoencoder (Kascenas et al. 2022), trained on healthy slices to remove coarse noise.

    It is applied to a slice without noise: map = mean over modalities of |f(x0) - x0|. Here, it is a process of one
    step (`make_schedule`, "single") whose network predicts x0.

    Attributes:
      process: the process of one step.
      modality: channels that the map is made of.

    Raises:
      UserError: for a network that is no denoising autoencoder.
    """

    process: Process
    modality: tuple[int, ...] = (0, 3)

    name: ClassVar[str] = "dae"
    network: ClassVar[bool] = True
    passes: ClassVar[int] = 1

    def __post_init__(self):
        object.__setattr__(self, "modality", tuple(self.modality))
        check_modality(self.modality)
        if self.process.schedule.steps != 1 or self.process.predicts != "x0":
            raise UserError("translation.method is 'dae': it needs a denoising autoencoder (diffusion.schedule single, "
                            "diffusion.predicts x0; see configs/dae.py)")

    def __call__(
        self,
        denoisers: Denoisers,
        x0: jax.Array,  # [B, H, W, C] in [-1, 1]
        keys: jax.Array,  # [B], not used: nothing here is random
    ) -> Counterpart:
        """The pseudo-healthy slices of a batch."""
        t = jnp.zeros(len(x0), jnp.int32)
        x = self.process.noised(x0, t, jnp.zeros_like(x0))
        healthy = self.process.predict(denoisers.null(x, self.process.original(t)), x, t).x0
        return _counterpart(healthy, x0, self.modality, jnp.abs)


def inverted(process: Process, denoise: Denoiser, x0: jax.Array, steps: int) -> jax.Array:  # [B, H, W, C]
    """x at level `steps` by DDIM inversion steps t -> t+1, of an x0 that counts as being at level 0.

    Song et al. 2021, section 4.3: the ODE of DDIM, integrated towards noise.
    """

    def step(x, t):
        t = jnp.full(x.shape[:1], t)
        return process.ddim_inversion_step(process.predict(denoise(x, process.original(t)), x, t), t), None

    return jax.lax.scan(step, x0, jnp.arange(steps))[0]


def _counterpart(
    healthy: jax.Array, x0: jax.Array, modality: tuple[int, ...], of: Callable[[jax.Array], jax.Array] = jnp.square
) -> Counterpart:
    """The result whose map is the mean of `of`(difference) over the modalities, by default of its square."""
    chosen = jnp.asarray(modality)
    healthy, x_m = healthy[..., chosen], x0[..., chosen]
    return Counterpart(of(healthy - x_m).mean(-1), healthy)


def _check_steps(field: str, steps: int) -> None:
    if steps < 1:
        raise UserError(f"translation.{field} gives {steps} steps: it must give at least 1")
