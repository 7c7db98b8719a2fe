"""One optimisation step: noise, timesteps, dropped labels, loss, gradients, update, averages."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from hae_jax.diffusion.loss import training_loss
from hae_jax.diffusion.noise import gaussian
from hae_jax.diffusion.process import Process
from hae_jax.model import UNetConfig
from hae_jax.model.conditioning import context_rule
from hae_jax.model.layers import Randomness
from hae_jax.training.mesh import batch_sharding, replicated
from hae_jax.training.state import LOSS_BINS, TrainState, Window


class StepSettings(NamedTuple):
    """What the step needs to know of the config."""

    seed: int
    p_uncond: float
    accumulation: int
    ema_rates: tuple[float, ...]


class Draws(NamedTuple):
    """The randomness of a batch, a function of (seed, step, row) alone."""

    t: jax.Array  # [B] steps of the schedule
    noise: jax.Array  # [B, H, W, C]
    drop: jax.Array  # [B] bool, labels that are dropped
    keys: jax.Array  # [B] keys, for dropout


def draw(
    settings: StepSettings, process: Process, step: jax.Array, shape: tuple[int, ...]
) -> Draws:  # shape: [B, H, W, C]
    """Draws timesteps, noise and dropped labels for the rows of the global batch of a step."""
    key = _step_key(settings, step)
    rows = jax.vmap(lambda i: jax.random.split(jax.random.fold_in(key, i), 4))(jnp.arange(shape[0]))
    t = jax.vmap(lambda k: jax.random.randint(k, (), 0, process.schedule.steps))(rows[:, 0])
    drop = jax.vmap(lambda k: jax.random.bernoulli(k, settings.p_uncond))(rows[:, 2])
    return Draws(t, gaussian(rows[:, 1], shape[1:]), drop, rows[:, 3])


def _step_key(settings: StepSettings, step: jax.Array) -> jax.Array:
    return jax.random.fold_in(jax.random.key(settings.seed), step)


def make_train_step(
    mesh: Mesh,
    shardings: TrainState,
    graph: nnx.GraphDef,
    config: UNetConfig,
    process: Process,
    optimizer: optax.GradientTransformation,
    settings: StepSettings,
) -> Callable[[TrainState, dict[str, jax.Array]], tuple[TrainState, dict[str, jax.Array]]]:
    """Compiles `step(state, batch) -> (state, metrics)`; the state is donated.

    `batch` holds image [B, H, W, C] in [-1, 1] and label [B]. The metrics are scalars: loss, gradient_norm, finite
    (whether both are).
    """

    def step(state: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainState, dict[str, jax.Array]]:
        draws = draw(settings, process, state.step, batch["image"].shape)
        # For what all rows share: the key that the row after the last would have.
        shared = jax.random.fold_in(_step_key(settings, state.step), len(batch["label"]))
        seen = None if settings.accumulation == 1 else _context_of_whole_batch(draws.drop, config)

        def loss_of_part(params, part):
            images, labels, draws, seen = part
            x_t = process.noised(images, draws.t, draws.noise)
            output = nnx.merge(graph, params)(
                x_t, process.original(draws.t), labels, drop=draws.drop, rngs=Randomness(draws.keys, shared),
                context_seen=seen)
            losses = training_loss(process, output, images, x_t, draws.t, draws.noise).loss
            return losses.mean(), losses

        loss, losses, gradients = _accumulate(
            loss_of_part, state.params, (batch["image"], batch["label"], draws, seen), settings.accumulation)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = tuple(jax.tree.map(lambda e, p, rate=rate: rate * e + (1 - rate) * p, average, params)
                    for rate, average in zip(settings.ema_rates, state.ema, strict=True))
        norm = optax.global_norm(gradients)
        window = _add(state.window, loss, norm, losses, draws.t, process.schedule.steps)
        metrics = {"loss": loss, "gradient_norm": norm, "finite": jnp.isfinite(loss) & jnp.isfinite(norm)}
        return TrainState(state.step + 1, params, opt_state, ema, window), metrics

    rows = batch_sharding(mesh)
    return jax.jit(step, donate_argnums=0, in_shardings=(shardings, {"image": rows, "label": rows}),
                   out_shardings=(shardings, replicated(mesh)))


def _context_of_whole_batch(drop: jax.Array, config: UNetConfig) -> jax.Array | None:
    """Which rows see their context, judged before the batch is cut into parts: "batch" means the whole one."""
    if context_rule(config) != "batch":
        return None
    return jnp.broadcast_to(~jnp.all(drop), drop.shape)


def _accumulate(loss_of_part: Callable, params: nnx.State, batch: Any, parts: int):
    """Mean loss and gradients over the batch, part by part.

    Returns:
      The loss [], the loss of each sample [B], the gradients.
    """
    value_and_grad = jax.value_and_grad(loss_of_part, has_aux=True)
    if parts == 1:
        (loss, losses), gradients = value_and_grad(params, batch)
        return loss, losses, gradients
    # Row i goes to part i % parts: neighbouring rows lie on one device, so every part is spread over all of them.
    batch = jax.tree.map(lambda a: jnp.moveaxis(a.reshape(-1, parts, *a.shape[1:]), 1, 0), batch)

    def add(total, part):
        (loss, losses), gradients = value_and_grad(params, part)
        return jax.tree.map(jnp.add, total, (loss, gradients)), losses

    zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    total, losses = jax.lax.scan(add, zero, batch)
    loss, gradients = jax.tree.map(lambda a: a / parts, total)
    return loss, losses.T.reshape(-1), gradients


def _add(window: Window, loss, norm, losses: jax.Array, t: jax.Array, steps: int) -> Window:
    """Adds one step to the sums behind the log."""
    in_bin = (t * LOSS_BINS // steps)[:, None] == jnp.arange(LOSS_BINS)
    return Window(window.steps + 1, window.loss + loss, window.gradient_norm + norm,
                  window.bin_loss + (in_bin * losses[:, None]).sum(0), window.bin_count + in_bin.sum(0))
