"""The programs that are measured: a training step, a forward pass, the translation of a batch.

Each can be traced without any array, so that memory can be planned for what no device here could hold.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from hae_jax.benchmark import naive
from hae_jax.benchmark.floor import least_bytes
from hae_jax.benchmark.results import OURS, TORCH
from hae_jax.benchmark.settings import Settings
from hae_jax.diffusion.process import Process
from hae_jax.diffusion.schedule import make_schedule
from hae_jax.errors import UserError
from hae_jax.localization import forward_process
from hae_jax.localization.forward_process import ForwardSettings
from hae_jax.model import UNet, UNetConfig
from hae_jax.model.flops import TRAINING_FACTOR, count_flops
from hae_jax.ops.platform import compiler_options
from hae_jax.training.mesh import batch_sharding, replicated, shard_batch
from hae_jax.training.state import (
    abstract_network,
    abstract_state,
    make_optimizer,
    network_config,
    remembered_timesteps,
    sharded_initial_state,
    shardings_of,
)
from hae_jax.training.step import make_train_step, step_settings


class Program(Protocol):
    """What the benchmark measures. Tracing makes new functions each time, so that naive pieces can be swapped in."""

    images: int  # of one call

    def lower(self) -> jax.stages.Lowered:
        """Traces it."""

    def flops(self) -> int:
        """Operations of one call, counted on shapes; what remat repeats is not counted."""

    def least_bytes(self) -> int:
        """The least traffic of one call with memory (`floor`)."""

    def place(self) -> None:
        """Puts what it is called with on the devices, unless it is there."""

    def call(self, executable: jax.stages.Compiled) -> None:
        """Runs it once and waits for the results."""


class TrainingStep:
    """The step of `hae_jax.training`, with optimiser and EMA weights."""

    def __init__(self, config: ml_collections.ConfigDict, mesh: Mesh, batch: int):
        self.images = batch
        self._config, self._mesh, self._network = config, mesh, network_config(config.to_dict())
        self._optimizer = make_optimizer(config.training)
        self._averages = len(config.training.ema_rates)
        self._history = remembered_timesteps(config)

    def lower(self) -> jax.stages.Lowered:
        state = abstract_state(self._network, self._optimizer, self._averages, self._history)
        graph, _ = abstract_network(self._network)
        step = make_train_step(self._mesh, shardings_of(self._mesh, state), graph, self._network,
                               _process(self._config), self._optimizer, step_settings(self._config))
        return step.lower(state, jax.eval_shape(lambda: _batch(self._network, self.images)))

    def flops(self) -> int:
        return TRAINING_FACTOR * _of_forward(count_flops, self._network, self.images)

    def least_bytes(self) -> int:
        # Backward, a layer reads its input and what comes back, and writes two gradients: twice as much as forward.
        return TRAINING_FACTOR * _of_forward(least_bytes, self._network, self.images)

    def place(self) -> None:
        jax.block_until_ready((self._state, self._inputs))

    def call(self, executable: jax.stages.Compiled) -> None:
        self._state, metrics = executable(self._state, self._inputs)
        jax.block_until_ready((self._state, metrics))

    @functools.cached_property
    def _state(self) -> Any:
        """Given away by each call and replaced by what comes back; programs that are compared share it."""
        state, _ = sharded_initial_state(self._mesh, self._network, self._optimizer, self._averages, self._config.seed,
                                         self._history)
        return state

    @functools.cached_property
    def _inputs(self) -> dict[str, jax.Array]:
        return _sharded_batch(self._mesh, self._network, self.images)


class ForwardPass:
    """The network once, with labels, as in inference."""

    def __init__(self, config: ml_collections.ConfigDict, mesh: Mesh, batch: int):
        self.images = batch
        self._config, self._mesh, self._network = config, mesh, network_config(config.to_dict())

    def lower(self) -> jax.stages.Lowered:
        graph, params = abstract_network(self._network)

        def forward(params, batch):
            t = 10 * jnp.arange(len(batch["image"]))
            return nnx.merge(graph, params)(batch["image"], t, batch.get("label"))

        return _jitted(self._mesh, forward).lower(params, jax.eval_shape(lambda: _batch(self._network, self.images)))

    def flops(self) -> int:
        return _of_forward(count_flops, self._network, self.images)

    def least_bytes(self) -> int:
        return _of_forward(least_bytes, self._network, self.images)

    def place(self) -> None:
        jax.block_until_ready(self._arguments)

    def call(self, executable: jax.stages.Compiled) -> None:
        jax.block_until_ready(executable(*self._arguments))

    @functools.cached_property
    def _arguments(self) -> tuple[Any, ...]:
        return (_parameters(self._mesh, self._network, self._config.seed),
                _sharded_batch(self._mesh, self._network, self.images))


class TranslationOfBatch(ForwardPass):
    """The forward process on a batch of slices, for the first steps of the whole schedule."""

    def __init__(self, config: ml_collections.ConfigDict, mesh: Mesh, batch: int, steps: int):
        super().__init__(config, mesh, batch)
        self._settings = ForwardSettings(
            steps, config.translation.guidance, config.translation.reference, config.translation.d_reverse,
            config.translation.modality)

    def lower(self) -> jax.stages.Lowered:
        _, params = abstract_network(self._network)
        batch = jax.eval_shape(lambda: _batch(self._network, self.images))
        return _jitted(self._mesh, self._translate()).lower(params, batch)

    def flops(self) -> int:
        return self._count(count_flops)

    def least_bytes(self) -> int:
        return self._count(least_bytes)

    def _count(self, count: Callable[..., int]) -> int:
        _, params = abstract_network(self._network)
        return count(self._translate(), params, jax.eval_shape(lambda: _batch(self._network, self.images)))

    def _translate(self) -> Callable[..., Any]:
        graph, _ = abstract_network(self._network)
        process = _process(self._config)

        def translate(params, batch):
            denoisers = forward_process.network_denoisers(nnx.merge(graph, params))
            keys = jax.random.split(jax.random.key(0), self.images)
            noise = forward_process.step_noise(keys, batch["image"].shape[1:])
            return forward_process.forward_process(process, denoisers, batch["image"], noise, self._settings)

        return translate


PROGRAMS = "train", "forward", "translate"  # parts of the benchmark that `program` makes
TORCH_PARTS = "train", "forward"  # those of them that `torch_programs` has, too


def check_steps(config: ml_collections.ConfigDict, settings: Settings) -> None:
    """Raises UserError if a translation is asked for more steps than the schedule has."""
    if "translate" in settings.parts and not 1 <= settings.steps <= config.diffusion.steps:
        raise UserError(f"--steps {settings.steps}: diffusion.steps is {config.diffusion.steps}")


class Form(NamedTuple):
    """What a program is measured as."""

    name: str  # "ours"; what of it is naive; "torch"; "ours, NAME=VALUE"
    pieces: tuple[str, ...] = ()  # that are naive
    option: str = ""  # that is tried


def forms_of(part: str, network: UNetConfig, settings: Settings) -> list[Form]:
    """Ours, each baseline that differs from it in this network, and ours with each option.

    Raises:
      UserError: a translation of a network without classes.
    """
    if part == "translate" and network.num_classes is None:
        raise UserError("--part translate: the network has no classes (model.num_classes)")
    found = [(form, naive.pieces_of(form, network, translation=part == "translate")) for form in settings.baselines
             if form != TORCH]
    baselines = [Form(f"{form} naive" if form in naive.PIECES else form, pieces) for form, pieces in found if pieces]
    if TORCH in settings.baselines and part in TORCH_PARTS:
        baselines.append(Form(TORCH))
    return [Form(OURS), *baselines, *(Form(f"{OURS}, {option}", option=option) for option in settings.options)]


def program(part: str, config: ml_collections.ConfigDict, mesh: Mesh, settings: Settings) -> Program:
    """The program of a part: "train", "forward" or "translate"."""
    if part == "train":
        return TrainingStep(config, mesh, settings.batch)
    if part == "forward":
        return ForwardPass(config, mesh, settings.batch)
    return TranslationOfBatch(config, mesh, settings.batch, settings.steps)


def _jitted(mesh: Mesh, f: Callable[..., Any]) -> Any:
    return jax.jit(f, in_shardings=(replicated(mesh), batch_sharding(mesh)), out_shardings=batch_sharding(mesh),
                   compiler_options=compiler_options())


def _process(config: ml_collections.ConfigDict) -> Process:
    diffusion = config.diffusion
    schedule = make_schedule(diffusion.schedule, diffusion.steps)
    return Process(schedule, diffusion.predicts, diffusion.variance, diffusion.clipping)


def _of_forward(count: Callable[..., int], network: UNetConfig, images: int) -> int:
    """What `count(function, *shapes)` says of a forward pass.

    `model.flops.forward_flops` remembers what it has counted, and so must not see naive pieces.
    """
    graph, params = abstract_network(network)
    batch = jax.eval_shape(lambda: _batch(network, images))
    return count(lambda params, x, y: nnx.merge(graph, params)(x, y, y), params, batch["image"], batch["label"])


def _parameters(mesh: Mesh, network: UNetConfig, seed: int) -> nnx.State:
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        params = nnx.state(UNet(network, rngs=nnx.Rngs(seed)), nnx.Param)
    return jax.device_put(params, replicated(mesh))


def _batch(network: UNetConfig, images: int) -> dict[str, jax.Array]:
    shape = (images, network.image_size, network.image_size, network.in_channels)
    return {"image": jnp.zeros(shape), "label": jnp.zeros(images, jnp.int32)}


def host_batch(network: UNetConfig, images: int) -> dict[str, np.ndarray]:
    """The images [B, H, W, C] and labels [B] that the programs are called with."""
    shape = (images, network.image_size, network.image_size, network.in_channels)
    return {
        "image": np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32),
        "label": (np.arange(images) % (network.num_classes or 1)).astype(np.int32),
    }


def _sharded_batch(mesh: Mesh, network: UNetConfig, images: int) -> dict[str, jax.Array]:
    return shard_batch(mesh, host_batch(network, images))
