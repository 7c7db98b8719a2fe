"""The training state: parameters, optimiser, EMA weights, step. Its shapes are built first, then its sharded arrays."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from hae_jax.diffusion.loss import empty_history
from hae_jax.errors import UserError
from hae_jax.model import UNetConfig
from hae_jax.model.classifier import make_network
from hae_jax.training.mesh import replicated, state_shardings

LOSS_BINS = 4  # quartiles of the timesteps


class Window(NamedTuple):
    """Sums since the last line of the log. They are part of the state, so that a resumed run logs the same values.

    Samples count by their importance weights (1 where timesteps are uniform): bin_loss / bin_count is the mean loss
    over the quartile's timesteps, however these are drawn.
    """

    steps: jax.Array  # [] steps that were not skipped
    loss: jax.Array  # []
    gradient_norm: jax.Array  # []
    bin_loss: jax.Array  # [4] summed losses of the samples in each quartile of t
    bin_count: jax.Array  # [4]


class LossHistory(NamedTuple):
    """The last losses at each timestep, used to draw timesteps (Nichol & Dhariwal 2021, section 3.3)."""

    losses: jax.Array  # [T, 10] float32
    count: jax.Array  # [T] int32, number of losses stored


class TrainState(NamedTuple):
    """All that a run needs to be resumed exactly."""

    step: jax.Array  # [] int32, steps done, including skipped ones, since their data and noise are used up
    params: nnx.State
    opt_state: Any
    ema: tuple[nnx.State, ...]  # one per rate
    window: Window
    timesteps: LossHistory | None  # None: timesteps are uniform
    skipped: jax.Array  # [] int32, steps that changed nothing because their gradients were not finite


def initial_state(
    params: nnx.State, opt_state: Any, ema: tuple[nnx.State, ...], history_steps: int | None = None, step: int = 0
) -> TrainState:
    """A state with these parameters, an empty log window, no loss history and no skipped steps.

    Args:
      history_steps: T where the losses of the timesteps are remembered; None: they are not.
      step: steps done.
    """
    history = None if history_steps is None else LossHistory(*empty_history(history_steps))
    return TrainState(jnp.asarray(step, jnp.int32), params, opt_state, ema, empty_window(), history,
                      jnp.zeros((), jnp.int32))


def empty_window() -> Window:
    """Sums over no steps."""
    steps, loss, norm = (jnp.zeros((), jnp.float32) for _ in range(3))
    return Window(steps, loss, norm, jnp.zeros(LOSS_BINS), jnp.zeros(LOSS_BINS))


def network_config(config: dict[str, Any], forms: Mapping[str, str] | None = None) -> UNetConfig:
    """The network's config from a config tree. A learned variance doubles the output channels.

    Args:
      forms: fields of the network that replace its own, of `model.config.FORM_FIELDS`.

    Raises:
      UserError: where the fields do not make a network.
    """
    fields = {**config["model"], **(forms or {})}
    if fields.get("out_channels") is None and config["diffusion"]["variance"] == "learned_range":
        fields["out_channels"] = 2 * fields["in_channels"]
    return UNetConfig.from_mapping(fields)


def remembered_timesteps(config: Any) -> int | None:
    """T of the config (tree or ConfigDict) if timesteps are drawn by their last losses, else None."""
    return config["diffusion"]["steps"] if config["training"]["timesteps"] == "loss-second-moment" else None


def learning_rate(training: Any) -> optax.Schedule:
    """Linear warm-up from 0, then constant, or linear or cosine annealing to 0 at the last step."""
    rate, warmup = training.learning_rate, training.warmup_steps
    rest = max(1, training.steps - warmup)
    schedules = {
        "none": optax.constant_schedule(rate),
        "linear": optax.linear_schedule(rate, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(rate, rest),
    }
    if training.anneal not in schedules:
        raise UserError(f"training.anneal is {training.anneal!r}: choose one of {', '.join(schedules)}")
    # Warm-up counts from 1, so that the first step changes the parameters.
    return optax.join_schedules([lambda step: rate * (step + 1) / (warmup + 1), schedules[training.anneal]], [warmup])


def make_optimizer(training: Any) -> optax.GradientTransformation:
    """AdamW with PyTorch's betas and epsilon, optionally after clipping by global norm."""
    adamw = optax.adamw(learning_rate(training), b1=0.9, b2=0.999, eps=1e-8, weight_decay=training.weight_decay)
    return adamw if training.clip_norm is None else optax.chain(optax.clip_by_global_norm(training.clip_norm), adamw)


def abstract_network(config: UNetConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """The network's structure and the shapes of its parameters, without allocating any."""
    graph, state = _abstract_network(config)
    return graph, jax.tree.map(lambda shape: shape, state)  # a copy, since a merged network changes its Variables


@functools.lru_cache(maxsize=4)  # the start of a training needs it several times
def _abstract_network(config: UNetConfig) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: make_network(config, nnx.Rngs(0))))


def abstract_state(
    config: UNetConfig, optimizer: optax.GradientTransformation, rates: int, history_steps: int | None = None
) -> TrainState:
    """The shapes and types of a state, without allocating any (arguments as of `sharded_initial_state`)."""
    return _abstract_around(abstract_network(config)[1], optimizer, rates, history_steps)


def shardings_of(mesh: Mesh, abstract: TrainState) -> TrainState:
    """The state's shardings by the rules of `mesh`. The loss history is replicated, since it is used row by row."""
    everywhere = jax.tree.map(lambda _: replicated(mesh), abstract.timesteps)
    return state_shardings(mesh, abstract)._replace(timesteps=everywhere)


def sharded_initial_state(
    mesh: Mesh, config: UNetConfig, optimizer: optax.GradientTransformation, rates: int, seed: int,
    history_steps: int | None = None,
) -> tuple[TrainState, TrainState]:
    """The state before the first step. Each part is made on the devices that hold it.

    The parameters are drawn in host memory (all hosts draw the same values) and sent to the devices in shards. The rest
    of the state is computed on the devices.

    Args:
      rates: number of sets of EMA weights.
      history_steps: T if losses of timesteps are stored (`remembered_timesteps`), else None.

    Returns:
      The state, and a tree of its shardings.
    """
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        host_params = nnx.state(make_network(config, nnx.Rngs(seed)), nnx.Param)
    shardings = shardings_of(mesh, _abstract_around(host_params, optimizer, rates, history_steps))
    params = jax.tree.map(
        lambda value, sharding: jax.make_array_from_callback(value.shape, sharding, np.asarray(value).__getitem__),
        host_params, shardings.params)
    build = jax.jit(_from_params, static_argnums=(1, 2, 3), out_shardings=shardings)
    return build(params, optimizer, rates, history_steps), shardings


def _from_params(
    params: nnx.State, optimizer: optax.GradientTransformation, rates: int, history_steps: int | None
) -> TrainState:
    # Parameters are copied, since donated buffers must not be shared between parameters and EMA weights.
    ema = tuple(jax.tree.map(jnp.copy, params) for _ in range(rates))
    return initial_state(params, optimizer.init(params), ema, history_steps)


def _abstract_around(params: nnx.State, optimizer: optax.GradientTransformation, rates: int, history_steps: int | None):
    return jax.eval_shape(lambda p: _from_params(p, optimizer, rates, history_steps), params)
