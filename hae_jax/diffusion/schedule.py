"""Noise schedules in float64 NumPy: betas, alpha-bars, posterior coefficients, respacing.

Sources: Ho et al. 2020, arXiv:2006.11239; Nichol and Dhariwal 2021, arXiv:2102.09672; DDIM strides, Song et al. 2021,
arXiv:2010.02502.
"""

import dataclasses
import math

import numpy as np

from hae_jax.errors import UserError

DAE_NOISE = 0.4  # 0.2 for intensities in [0, 1]; here they are in [-1, 1]


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """The constants of a diffusion process of T steps, each array [T] float64.

    Attributes:
      betas: variances of the forward steps.
      timesteps: for each step, the step of the original process. The network is called with it.
    """

    betas: np.ndarray
    timesteps: np.ndarray

    @property
    def steps(self) -> int:
        """T, the number of steps."""
        return len(self.betas)

    @property
    def alpha_bar(self) -> np.ndarray:
        """a_t = prod_{s <= t} (1 - beta_s) (Ho et al. 2020, eq. 4)."""
        return np.cumprod(1 - self.betas)

    @property
    def alpha_bar_prev(self) -> np.ndarray:
        """alpha_bar one step earlier; 1 before the first."""
        return np.append(1.0, self.alpha_bar[:-1])

    @property
    def alpha_bar_next(self) -> np.ndarray:
        """alpha_bar one step later; 0 after the last."""
        return np.append(self.alpha_bar[1:], 0.0)

    # Ho et al. 2020, equations 6 and 7: q(x_{t-1} | x_t, x0) = N(coef_x0 x0 + coef_xt x_t, posterior_variance).
    @property
    def posterior_variance(self) -> np.ndarray:
        """beta_t (1 - a_{t-1}) / (1 - a_t); 0 at the first step."""
        return self.betas * (1 - self.alpha_bar_prev) / (1 - self.alpha_bar)

    @property
    def posterior_log_variance(self) -> np.ndarray:
        """Its logarithm. The first step has the second step's value, because its variance is 0."""
        variance = self.posterior_variance
        return np.log(np.append(variance[1] if self.steps > 1 else self.betas[0], variance[1:]))

    @property
    def posterior_coef_x0(self) -> np.ndarray:
        """beta_t sqrt(a_{t-1}) / (1 - a_t), the weight of x0 in the posterior mean."""
        return self.betas * np.sqrt(self.alpha_bar_prev) / (1 - self.alpha_bar)

    @property
    def posterior_coef_xt(self) -> np.ndarray:
        """(1 - a_{t-1}) sqrt(1 - beta_t) / (1 - a_t), the weight of x_t in the posterior mean."""
        return (1 - self.alpha_bar_prev) * np.sqrt(1 - self.betas) / (1 - self.alpha_bar)

    @property
    def large_variance(self) -> np.ndarray:
        """The variance "fixed_large": beta, but the posterior's second value at the first step."""
        return np.append(self.posterior_variance[1] if self.steps > 1 else self.betas[0], self.betas[1:])


def make_schedule(name: str = "linear", steps: int = 1000, respacing: str = "") -> Schedule:
    """Builds a schedule and respaces it.

    Linear: beta from 1e-4 to 0.02, both times 1000 / T. Cosine: a_t = cos^2((t / T + 0.008) / 1.008 pi / 2).

    Args:
      name: "linear" (Ho et al. 2020, scaled to the number of steps), "cosine" (Nichol & Dhariwal 2021, eq. 17), or
        "single": one step, with noise of `DAE_NOISE` times the slice's own scale (Kascenas et al. 2022).
      steps: T of the original process, with which the network was trained.
      respacing: "" keeps every step; "20" keeps 20 steps; "10,15,20" keeps 10, 15 and 20 steps in three equal
        sections; "ddimN" keeps N steps at a fixed stride.

    Raises:
      UserError: for an unknown name or a respacing that does not fit.
    """
    if steps < 1:
        raise UserError(f"diffusion.steps is {steps}: it must be at least 1")
    if name == "linear":
        betas = np.linspace(1e-4 * 1000 / steps, 0.02 * 1000 / steps, steps, dtype=np.float64)
        if betas[-1] >= 1:
            raise UserError(f"diffusion.steps is {steps}: the linear schedule needs more than 20")
    elif name == "cosine":
        def alpha_bar(u):
            return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

        betas = np.array([min(1 - alpha_bar((i + 1) / steps) / alpha_bar(i / steps), 0.999) for i in range(steps)])
    elif name == "single":
        if steps != 1:
            raise UserError(f"diffusion.steps is {steps}: the schedule single has 1")
        betas = np.array([1 - 1 / (1 + DAE_NOISE**2)])
    else:
        raise UserError(f"diffusion.schedule is {name!r}: choose linear, cosine or single")
    kept = retained_timesteps(steps, respacing) if respacing else np.arange(steps)
    # Computed also without respacing, as in the published code. It changes the last bits.
    kept_alpha_bar = np.cumprod(1 - betas)[kept]
    return Schedule(1 - kept_alpha_bar / np.append(1.0, kept_alpha_bar[:-1]), kept)


def retained_timesteps(steps: int, respacing: str) -> np.ndarray:  # [kept] int64, ascending
    """The steps of the original process that a respacing keeps (see `make_schedule`).

    Raises:
      UserError: the respacing does not fit the number of steps.
    """
    if respacing.startswith("ddim"):
        wanted = _counts(respacing.removeprefix("ddim"), respacing)[0]
        for stride in range(1, steps):
            if len(range(0, steps, stride)) == wanted:
                return np.arange(0, steps, stride)
        raise UserError(f"translation.respacing is {respacing!r}: no fixed stride gives {wanted} of {steps} steps")
    counts = _counts(respacing, respacing)
    kept, start = [], 0
    for i, count in enumerate(counts):
        size = steps // len(counts) + (1 if i < steps % len(counts) else 0)
        if size < count:
            raise UserError(f"translation.respacing is {respacing!r}: a section of {size} steps cannot give {count}")
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        # Positions are accumulated, not multiplied, so that they are rounded as in the published code.
        position = 0.0
        for _ in range(count):
            kept.append(start + round(position))
            position += stride
        start += size
    return np.array(sorted(set(kept)))


def _counts(text: str, respacing: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = [0]
    if min(counts) < 1:
        raise UserError(f"translation.respacing is {respacing!r}: give counts such as 20 or 10,15,20, or ddimN")
    return counts
