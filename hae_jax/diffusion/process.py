"""The diffusion process: noising, x0 and eps conversions, DDPM, DDIM and inversion steps, guidance.

A denoiser is any function of (x_t, t) with original timesteps; the functions here turn its output into steps. All are
pure and work under jit: t is an array of indices into the (possibly respaced) schedule. a_t is alpha-bar at t.

Sources: DDPM, Ho et al. 2020, arXiv:2006.11239; DDIM, Song et al. 2021, arXiv:2010.02502; learned variances, Nichol and
Dhariwal 2021, arXiv:2102.09672; classifier-free guidance, Ho and Salimans 2022, arXiv:2207.12598; dynamic clipping,
Saharia et al. 2022, arXiv:2205.11487.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hae_jax.diffusion.schedule import Schedule, make_schedule
from hae_jax.errors import UserError

Denoiser = Callable[[jax.Array, jax.Array], jax.Array]  # (x_t, original t) -> [B, H, W, C], 2C with a learned variance

_CHOICES = {
    "predicts": ("eps", "x0"),
    "variance": ("fixed_large", "fixed_small", "learned_range"),
    "clipping": ("static", "dynamic", "none"),
}


class Prediction(NamedTuple):
    """A denoiser's prediction for x_t, each [B, H, W, C]."""

    x0: jax.Array  # clipped
    eps: jax.Array  # derived again from the clipped x0
    log_variance: jax.Array  # of the reverse step, broadcastable to x0


@dataclasses.dataclass(frozen=True, eq=False)
class Process:
    """A schedule, and how a denoiser's output is read.

    Attributes:
      schedule: the constants.
      predicts: what the network gives: "eps" or "x0".
      variance: of the reverse steps: "fixed_large", "fixed_small", or "learned_range" (C more output channels).
      clipping: of the predicted x0: "static" to [-1, 1], "dynamic" (Saharia et al. 2022, section 2.3, per channel),
        or "none".

    Raises:
      UserError: for an unknown choice.
    """

    schedule: Schedule
    predicts: str = "eps"
    variance: str = "fixed_large"
    clipping: str = "static"

    def __post_init__(self):
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise UserError(f"diffusion.{name} is {getattr(self, name)!r}: choose one of {', '.join(choices)}")

    @classmethod
    def of(cls, diffusion: Any, respacing: str = "", clipping: str | None = None) -> "Process":
        """The process of a config's section `diffusion`, respaced. `clipping` overrides the config's."""
        schedule = make_schedule(diffusion.schedule, diffusion.steps, respacing)
        return cls(schedule, diffusion.predicts, diffusion.variance, clipping or diffusion.clipping)

    def original(self, t: jax.Array) -> jax.Array:  # [B] -> [B]
        """The timesteps that the network sees."""
        return jnp.asarray(self.schedule.timesteps, jnp.int32)[t]

    def noised(
        self,
        x0: jax.Array,  # [B, H, W, C]
        t: jax.Array,  # [B]
        noise: jax.Array,  # [B, H, W, C]
    ) -> jax.Array:  # [B, H, W, C]
        """A sample of q(x_t | x0) = sqrt(a_t) x0 + sqrt(1 - a_t) noise (Ho et al. 2020, eq. 4)."""
        a = self.schedule.alpha_bar
        return _at(np.sqrt(a), t) * x0 + _at(np.sqrt(1 - a), t) * noise

    def x0_from_eps(self, x_t: jax.Array, t: jax.Array, eps: jax.Array) -> jax.Array:  # [B, H, W, C]
        """x0 = (x_t - sqrt(1 - a_t) eps) / sqrt(a_t) (Ho et al. 2020, eq. 4 solved for x0)."""
        a = self.schedule.alpha_bar
        return _at(np.sqrt(1 / a), t) * x_t - _at(np.sqrt(1 / a - 1), t) * eps

    def eps_from_x0(self, x_t: jax.Array, t: jax.Array, x0: jax.Array) -> jax.Array:  # [B, H, W, C]
        """eps = (x_t - sqrt(a_t) x0) / sqrt(1 - a_t): `x0_from_eps` solved for eps."""
        a = self.schedule.alpha_bar
        return (_at(np.sqrt(1 / a), t) * x_t - x0) / _at(np.sqrt(1 / a - 1), t)

    def predict(
        self,
        output: jax.Array,  # [B, H, W, C], or 2C where the variance is learned
        x_t: jax.Array,  # [B, H, W, C]
        t: jax.Array,  # [B]
    ) -> Prediction:
        """Reads a denoiser's output: clipped x0, the eps that belongs to it, the log-variance of the reverse step."""
        output, log_variance = self._log_variance(output, t)
        x0 = self.clip(output if self.predicts == "x0" else self.x0_from_eps(x_t, t, output))
        return Prediction(x0, self.eps_from_x0(x_t, t, x0), log_variance)

    def clip(self, x0: jax.Array) -> jax.Array:  # [B, H, W, C]
        """Clips a predicted x0 by the configured rule.

        Dynamic (Saharia et al. 2022, section 2.3): s = max(1, 0.99-quantile over H, W of |x0|) per sample and channel,
        clip(x0, -s, s) / s, in [-1, 1].
        """
        if self.clipping == "none":
            return x0
        if self.clipping == "dynamic":
            s = jnp.maximum(1, jnp.quantile(jnp.abs(x0), 0.99, axis=(1, 2), keepdims=True))
            return jnp.clip(x0, -s, s) / s
        return jnp.clip(x0, -1, 1)

    def posterior_mean(self, x0: jax.Array, x_t: jax.Array, t: jax.Array) -> jax.Array:  # [B, H, W, C]
        """Mean of q(x_{t-1} | x_t, x0) (Ho et al. 2020, eq. 7).

        sqrt(a_{t-1}) beta_t / (1 - a_t) x0 + sqrt(1 - beta_t) (1 - a_{t-1}) / (1 - a_t) x_t.
        """
        return _at(self.schedule.posterior_coef_x0, t) * x0 + _at(self.schedule.posterior_coef_xt, t) * x_t

    def ddpm_step(
        self,
        prediction: Prediction,
        x_t: jax.Array,  # [B, H, W, C]
        t: jax.Array,  # [B]
        noise: jax.Array,  # [B, H, W, C]
    ) -> jax.Array:  # [B, H, W, C]
        """One ancestral step t -> t-1, mean + sigma_t noise (Ho et al. 2020, algorithm 2). The last step adds none."""
        mean = self.posterior_mean(prediction.x0, x_t, t)
        return mean + (t != 0)[:, None, None, None] * jnp.exp(0.5 * prediction.log_variance) * noise

    def ddim_step(self, prediction: Prediction, t: jax.Array) -> jax.Array:  # [B, H, W, C]
        """One deterministic DDIM step t -> t-1 (Song et al. 2021, eq. 12 with sigma_t = 0).

        x_{t-1} = sqrt(a_{t-1}) x0 + sqrt(1 - a_{t-1}) eps.
        """
        a_prev = self.schedule.alpha_bar_prev
        return _at(np.sqrt(a_prev), t) * prediction.x0 + _at(np.sqrt(1 - a_prev), t) * prediction.eps

    def ddim_inversion_step(self, prediction: Prediction, t: jax.Array) -> jax.Array:  # [B, H, W, C]
        """One DDIM inversion step t -> t+1 (Song et al. 2021, section 4.3 and eq. 14).

        x_{t+1} = sqrt(a_{t+1}) x0 + sqrt(1 - a_{t+1}) eps, with a = 0 after the last step.
        """
        a_next = self.schedule.alpha_bar_next
        return _at(np.sqrt(a_next), t) * prediction.x0 + _at(np.sqrt(1 - a_next), t) * prediction.eps

    def _log_variance(self, output: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Splits off a learned variance. A fixed variance comes from the schedule.

        log sigma_t^2 = v log beta_t + (1 - v) log posterior variance, v in [0, 1] (Nichol and Dhariwal 2021, eq. 15).
        """
        small = _at(self.schedule.posterior_log_variance, t)
        if self.variance == "fixed_small":
            return output, small
        if self.variance == "fixed_large":
            return output, _at(np.log(self.schedule.large_variance), t)
        output, v = jnp.split(output, 2, axis=-1)
        share = (v + 1) / 2
        return output, share * _at(np.log(self.schedule.betas), t) + (1 - share) * small


def guide(
    conditional: jax.Array,  # [B, H, W, C] network output with the class
    null: jax.Array,  # [B, H, W, C] network output without it
    strength: float | jax.Array,
) -> jax.Array:  # [B, H, W, C]
    """Classifier-free guidance: (1 + w) f(x, t, y) - w f(x, t, null) (Ho & Salimans 2022, eq. 6)."""
    return (1 + strength) * conditional - strength * null


def sample(
    process: Process,
    denoise: Denoiser,
    x: jax.Array,  # [B, H, W, C] at step `steps` - 1, or treated as such
    steps: int | None = None,
) -> jax.Array:  # [B, H, W, C]
    """x0 by deterministic DDIM steps t = steps-1..0 (Song et al. 2021, eq. 12 with sigma_t = 0); None: all steps."""
    return walked_back(process, denoise, x, steps or process.schedule.steps,
                       lambda prediction, x, t: process.ddim_step(prediction, t))


def walked_back(
    process: Process, denoise: Denoiser, x: jax.Array, steps: int,
    advance: Callable[[Prediction, jax.Array, jax.Array], jax.Array],  # prediction, x_t, t [B] -> x at t - 1
) -> jax.Array:  # [B, H, W, C]
    """x after the reverse steps t = steps-1..0. `advance` computes each step from the prediction."""

    def step(x, t):
        t = jnp.full(x.shape[:1], t)
        return advance(process.predict(denoise(x, process.original(t)), x, t), x, t), None

    return jax.lax.scan(step, x, jnp.arange(steps - 1, -1, -1))[0]


def _at(values: np.ndarray, t: jax.Array) -> jax.Array:  # [T] float64, [B] -> [B, 1, 1, 1] float32
    return _entries(values.astype(np.float32), t)


@jax.jit  # traced once for each shape
def _entries(values: jax.Array, t: jax.Array) -> jax.Array:  # [T], [B] -> [B, 1, 1, 1]
    return values[t][:, None, None, None]
