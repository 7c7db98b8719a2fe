"""The training loss, and how timesteps are drawn.

Sources: Ho et al. 2020, "Denoising Diffusion Probabilistic Models", arXiv:2006.11239; Nichol and Dhariwal 2021,
"Improved Denoising Diffusion Probabilistic Models", arXiv:2102.09672.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hae_jax.diffusion.process import Process

_HISTORY = 10  # losses remembered per timestep
_UNIFORM_MASS = 0.001  # share of the uniform distribution, so that every timestep is drawn


class SampleLoss(NamedTuple):
    """The loss of each sample, and its parts, each [B] float32."""

    loss: jax.Array
    mse: jax.Array
    vb: jax.Array  # variational bound, bits per dimension; 0 where the variance is fixed


def training_loss(
    process: Process,
    output: jax.Array,  # [B, H, W, C], or 2C where the variance is learned
    x0: jax.Array,  # [B, H, W, C] in [-1, 1]
    x_t: jax.Array,  # [B, H, W, C]
    t: jax.Array,  # [B]
    noise: jax.Array,  # [B, H, W, C]
) -> SampleLoss:
    """Mean squared error of the prediction, plus the variational bound if the variance is learned.

    mse = mean |eps - eps_theta(x_t, t)|^2 (Ho et al. 2020, eq. 14), or the same for x0. The bound trains the variance
    alone: the mean in it is a constant (Nichol and Dhariwal 2021, section 3.1).
    """
    channels = x0.shape[-1]
    target = noise if process.predicts == "eps" else x0
    mse = _mean(jnp.square(target - output[..., :channels]))
    if process.variance != "learned_range":
        return SampleLoss(mse, mse, jnp.zeros_like(mse))
    frozen = jnp.concatenate([jax.lax.stop_gradient(output[..., :channels]), output[..., channels:]], axis=-1)
    vb = _variational_bound(process, frozen, x0, x_t, t)
    return SampleLoss(mse + vb, mse, vb)


def second_moment_weights(
    history: jax.Array,  # [T, 10] the last losses at each timestep
    count: jax.Array,  # [T] number of losses at each timestep
) -> jax.Array:  # [T] probabilities
    """Distribution over timesteps, p_t proportional to sqrt(E[L_t^2]), from recent losses.

    Nichol and Dhariwal 2021, eq. 18, mixed with a uniform distribution of weight 0.001.
    It is uniform until every timestep has a full history.
    """
    weights = jnp.sqrt(jnp.mean(jnp.square(history), axis=-1))
    weights = weights / weights.sum() * (1 - _UNIFORM_MASS) + _UNIFORM_MASS / len(weights)
    return jnp.where(jnp.all(count == _HISTORY), weights, 1 / len(weights))


def remember_losses(
    history: jax.Array,  # [T, 10]
    count: jax.Array,  # [T]
    t: jax.Array,  # [B]
    loss: jax.Array,  # [B]
) -> tuple[jax.Array, jax.Array]:
    """Adds losses to the history in order. They replace the oldest losses of their timesteps."""

    def add(state, item):
        history, count = state
        t, loss = item
        row, filled = history[t], count[t]
        row = jnp.where(filled == _HISTORY, jnp.append(row[1:], loss), row.at[filled].set(loss, mode="drop"))
        return (history.at[t].set(row), count.at[t].set(jnp.minimum(filled + 1, _HISTORY))), None

    return jax.lax.scan(add, (history, count), (t, loss))[0]


def empty_history(steps: int) -> tuple[jax.Array, jax.Array]:
    """The history before the first loss: ([T, 10] zeros, [T] zeros)."""
    return jnp.zeros((steps, _HISTORY), jnp.float32), jnp.zeros(steps, jnp.int32)


def _variational_bound(process: Process, output: jax.Array, x0: jax.Array, x_t: jax.Array, t: jax.Array) -> jax.Array:
    """The bound's term at t in bits per dimension [B] (Ho et al. 2020, eq. 5).

    KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)), or -log p(x0 | x_1) at t = 0.
    """
    schedule = process.schedule
    prediction = dataclasses.replace(process, clipping="none").predict(output, x_t, t)
    mean = process.posterior_mean(prediction.x0, x_t, t)
    true_mean = process.posterior_mean(x0, x_t, t)
    true_log_variance = jnp.asarray(schedule.posterior_log_variance, jnp.float32)[t][:, None, None, None]
    kl = _normal_kl(true_mean, true_log_variance, mean, prediction.log_variance)
    nll = -_discretised_log_likelihood(x0, mean, 0.5 * prediction.log_variance)
    return jnp.where(t == 0, _mean(nll), _mean(kl)) / math.log(2)


def _normal_kl(mean1: jax.Array, log_variance1: jax.Array, mean2: jax.Array, log_variance2: jax.Array) -> jax.Array:
    """KL(N(m1, v1) || N(m2, v2)) = (log(v2 / v1) - 1 + v1 / v2 + (m1 - m2)^2 / v2) / 2, nats, elementwise."""
    return 0.5 * (log_variance2 - log_variance1 - 1 + jnp.exp(log_variance1 - log_variance2)
                  + jnp.square(mean1 - mean2) * jnp.exp(-log_variance2))


def _discretised_log_likelihood(x: jax.Array, mean: jax.Array, log_scale: jax.Array) -> jax.Array:
    """Log-probability of the bin around x among 256 grey levels, nats, elementwise (Ho et al. 2020, eq. 13).

    log(Phi((x - mean + 1/255) / scale) - Phi((x - mean - 1/255) / scale)); the outermost bins are open.
    """
    upper = _normal_cdf((x - mean + 1 / 255) * jnp.exp(-log_scale))
    lower = _normal_cdf((x - mean - 1 / 255) * jnp.exp(-log_scale))
    mass = jnp.where(x < -0.999, upper, jnp.where(x > 0.999, 1 - lower, upper - lower))
    return jnp.log(jnp.maximum(mass, 1e-12))


def _normal_cdf(x: jax.Array) -> jax.Array:
    """The published code's approximation: (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2, to 2e-4."""
    return 0.5 * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _mean(x: jax.Array) -> jax.Array:  # [B, H, W, C] -> [B]
    return x.mean((1, 2, 3))
