"""One optimisation step: noise, timesteps, dropped labels, loss, gradients, update, EMA weights."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax
from flax import nnx
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh

from hae_jax.diffusion.loss import remember_losses, second_moment_weights, training_loss
from hae_jax.diffusion.noise import draw_noise
from hae_jax.diffusion.process import Process
from hae_jax.errors import UserError
from hae_jax.model import UNetConfig
from hae_jax.model.conditioning import context_rule
from hae_jax.model.layers import Randomness
from hae_jax.ops.forms import compiler_options
from hae_jax.training.mesh import batch_sharding, replicated
from hae_jax.training.state import LOSS_BINS, LossHistory, TrainState, Window

_CHOICES = {
    "training.timesteps": ("uniform", "loss-second-moment"),
    "training.nonfinite": ("stop", "skip"),
    "diffusion.noise": ("gaussian", "simplex", "coarse"),
}


class StepSettings(NamedTuple):
    """The settings of the step. The state determines how timesteps are drawn."""

    seed: int
    p_uncond: float
    accumulation: int
    ema_rates: tuple[float, ...]
    noise: str = "gaussian"  # "simplex" or "coarse"
    nonfinite: str = "stop"  # or "skip": steps with gradients that are not finite change nothing


class Draws(NamedTuple):
    """The random values of a batch. They depend on (seed, step, row) and on the losses of earlier steps."""

    t: jax.Array  # [B] steps of the schedule
    weight: jax.Array  # [B] importance weights of the losses
    noise: jax.Array  # [B, H, W, C]
    drop: jax.Array  # [B] bool, labels that are dropped
    keys: jax.Array  # [B] keys, for dropout


def step_settings(config: ml_collections.ConfigDict) -> StepSettings:
    """The settings of a config.

    Raises:
      UserError: for an unknown choice.
    """
    for field, choices in _CHOICES.items():
        section, name = field.split(".")
        if config[section][name] not in choices:
            raise UserError(f"{field} is {config[section][name]!r}: choose one of {', '.join(choices)}")
    training = config.training
    return StepSettings(config.seed, training.p_uncond, training.accumulation, tuple(training.ema_rates),
                        config.diffusion.noise, training.nonfinite)


def draw(
    settings: StepSettings,
    process: Process,
    step: jax.Array,  # []
    history: LossHistory | None,
    shape: tuple[int, ...],  # [B, H, W, C]
) -> Draws:
    """Draws timesteps, noise and dropped labels for the rows of the global batch of a step.

    Args:
      history: by which timesteps are drawn; None: uniformly.
    """
    key = _step_key(settings, step)
    rows = jax.vmap(lambda i: jax.random.split(jax.random.fold_in(key, i), 4))(jnp.arange(shape[0]))
    t, weight = _draw_timesteps(rows[:, 0], process.schedule.steps, history)
    noise = draw_noise(settings.noise, process, rows[:, 1], shape[1:], t)
    drop = jax.vmap(lambda k: jax.random.bernoulli(k, settings.p_uncond))(rows[:, 2])
    return Draws(t, weight, noise, drop, rows[:, 3])


def _step_key(settings: StepSettings, step: jax.Array) -> jax.Array:
    return jax.random.fold_in(jax.random.key(settings.seed), step)


def _draw_timesteps(keys: jax.Array, steps: int, history: LossHistory | None) -> tuple[jax.Array, jax.Array]:
    """Timesteps [B], and weights 1 / (T p_t), with which the mean loss is the same as for uniform timesteps."""
    if history is None:
        t = jax.vmap(lambda k: jax.random.randint(k, (), 0, steps))(keys)
        return t, jnp.ones(t.shape)
    p = second_moment_weights(*history)
    t = jax.vmap(lambda k: jax.random.choice(k, steps, p=p))(keys)
    return t, 1 / (steps * p[t])


def make_train_step(
    mesh: Mesh,
    shardings: TrainState,
    graph: nnx.GraphDef,
    config: UNetConfig,
    process: Process,
    optimizer: optax.GradientTransformation,
    settings: StepSettings,
) -> Callable[[list[jax.Array], dict[str, jax.Array]], tuple[list[jax.Array], dict[str, jax.Array]]]:
    """Compiles `step(leaves, batch) -> (leaves, metrics)`. The leaves are donated.

    The leaves are the list of a TrainState's arrays (`jax.tree.leaves`). The host's part of a call is shorter with this
    list than with the TrainState, which has thousands of Variables.

    `batch` holds image [B, H, W, C] in [-1, 1], label [B] and, where hosts may ask to stop, stop [B] int32, which is
    above 0 in the rows of a host that asks. The metrics are scalars: loss, gradient_norm, finite (whether both are
    finite), skipped (number of skipped steps so far, this one included) and stop (the largest value of the rows).
    """

    leaves_of_shardings, structure = jax.tree.flatten(shardings)

    def step(leaves: list[jax.Array], batch: dict[str, jax.Array]) -> tuple[list[jax.Array], dict[str, jax.Array]]:
        state: TrainState = structure.unflatten(leaves)
        draws = draw(settings, process, state.step, state.timesteps, batch["image"].shape)
        # The key for randomness that all rows share is that of a row after the last one.
        shared = jax.random.fold_in(_step_key(settings, state.step), len(batch["image"]))
        loss_of_part = _loss_function(graph, config, process, shared)
        seen = None if settings.accumulation == 1 else _context_of_whole_batch(draws.drop, config)
        loss, losses, gradients = _accumulate(
            loss_of_part, state.params, (batch["image"], batch["label"], draws, seen), settings.accumulation)
        # The values are gathered once here and not again for each row that is added to the history.
        losses, draws = jax.lax.with_sharding_constraint(
            (losses, draws._replace(noise=None, keys=None)), replicated(mesh))
        gradients = jax.tree.map(_row_major, gradients)
        norm = optax.global_norm(gradients)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        new = _updated(state, optimizer, gradients, settings.ema_rates)._replace(
            window=_add(state.window, loss, norm, losses, draws, process.schedule.steps))
        if state.timesteps is not None:
            history = remember_losses(state.timesteps.losses, state.timesteps.count, draws.t, losses)
            new = new._replace(timesteps=LossHistory(*history))
        if settings.nonfinite == "skip":
            new = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state)
            new = new._replace(skipped=state.skipped + ~finite)
        metrics = {"loss": loss, "gradient_norm": norm, "finite": finite, "skipped": new.skipped,
                   "stop": jnp.max(jnp.asarray(batch.get("stop", 0)))}
        return jax.tree.leaves(new._replace(step=state.step + 1)), metrics

    return jax.jit(step, donate_argnums=0, in_shardings=(leaves_of_shardings, batch_sharding(mesh)),
                   out_shardings=(leaves_of_shardings, replicated(mesh)), compiler_options=compiler_options())


@jax.jit
def state_norms(state: TrainState) -> dict[str, jax.Array]:
    """The log's values of a state: parameter_norm, and the EMA weights' distance from the parameters divided by it.

    Not part of the step, since it reads everything once more. ema_distance belongs to the first EMA weights,
    ema_distance_2 to the second, and so on.
    """
    norm = optax.global_norm(state.params)
    distances = [optax.global_norm(jax.tree.map(jnp.subtract, ema, state.params)) / norm for ema in state.ema]
    return {"parameter_norm": norm} | {
        f"ema_distance_{i}" if i > 1 else "ema_distance": distance for i, distance in enumerate(distances, start=1)}


def _loss_function(graph: nnx.GraphDef, config: UNetConfig, process: Process, shared: jax.Array) -> Callable:
    """Returns `f(params, part) -> (loss [], unweighted loss of each sample [b])` for a part of a batch."""

    def loss_of_part(params: nnx.State, part: tuple) -> tuple[jax.Array, jax.Array]:
        images, labels, draws, seen = part
        x_t = process.noised(images, draws.t, draws.noise)
        if config.task == "classify":
            logits = nnx.merge(graph, params)(x_t, process.original(draws.t), rngs=Randomness(draws.keys, shared))
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return (draws.weight * losses).mean(), losses
        condition = {} if config.num_classes is None else {"y": labels, "drop": draws.drop, "context_seen": seen}
        output = nnx.merge(graph, params)(
            x_t, process.original(draws.t), rngs=Randomness(draws.keys, shared), **condition)
        losses = training_loss(process, output, images, x_t, draws.t, draws.noise).loss
        return (draws.weight * losses).mean(), losses

    return loss_of_part


def _row_major(gradient: jax.Array) -> jax.Array:
    """A gradient in the memory layout of its parameter.

    GPUs compute the gradients of convolutions in another layout. If XLA transposed them within the update, it could not
    update parameters and optimiser state in place, and would copy them first.
    """
    if gradient.ndim < 4:
        return gradient
    rows = Layout(major_to_minor=tuple(range(gradient.ndim)))
    return jax.lax.optimization_barrier(with_layout_constraint(gradient, rows))


@jax.named_scope("optimiser")
def _updated(
    state: TrainState, optimizer: optax.GradientTransformation, gradients: nnx.State, rates: tuple[float, ...]
) -> TrainState:
    """The state with new parameters, optimiser state and EMA weights."""
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = tuple(jax.tree.map(lambda e, p, rate=rate: rate * e + (1 - rate) * p, old, params)
                for rate, old in zip(rates, state.ema, strict=True))
    return state._replace(params=params, opt_state=opt_state, ema=ema)


def _context_of_whole_batch(drop: jax.Array, config: UNetConfig) -> jax.Array | None:
    """The rows that see their context. For the rule "batch", this depends on the whole batch and not on its parts."""
    if context_rule(config) != "batch":
        return None
    return jnp.broadcast_to(~jnp.all(drop), drop.shape)


def _accumulate(loss_of_part: Callable, params: nnx.State, batch: Any, parts: int):
    """Computes mean loss and gradients over the batch, part by part.

    Returns:
      The loss [], the loss of each sample [B], the gradients.
    """
    value_and_grad = jax.value_and_grad(loss_of_part, has_aux=True)
    if parts == 1:
        (loss, losses), gradients = value_and_grad(params, batch)
        return loss, losses, gradients
    # Row i goes to part i % parts. Neighbouring rows are on one device, so each part is spread over all devices.
    batch = jax.tree.map(lambda a: jnp.moveaxis(a.reshape(-1, parts, *a.shape[1:]), 1, 0), batch)

    def add(total, part):
        (loss, losses), gradients = value_and_grad(params, part)
        return jax.tree.map(jnp.add, total, (loss, gradients)), losses

    zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    total, losses = jax.lax.scan(add, zero, batch)
    loss, gradients = jax.tree.map(lambda a: a / parts, total)
    return loss, losses.T.reshape(-1), gradients


def _add(window: Window, loss: jax.Array, norm: jax.Array, losses: jax.Array, draws: Draws, steps: int) -> Window:
    """Adds one step to the sums for the log."""
    in_bin = (draws.t * LOSS_BINS // steps)[:, None] == jnp.arange(LOSS_BINS)
    weight = in_bin * draws.weight[:, None]
    return Window(window.steps + 1, window.loss + loss, window.gradient_norm + norm,
                  window.bin_loss + (weight * losses[:, None]).sum(0), window.bin_count + weight.sum(0))
