"""The programs that the benchmark measures: a training step, a forward pass, the translation of a batch.

Each can be traced without arrays, in any of its forms.
"""

import dataclasses
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
from hae_jax.benchmark.results import OURS, TORCH
from hae_jax.diffusion.process import Process
from hae_jax.errors import UserError
from hae_jax.localization.denoisers import network_denoisers, step_noise
from hae_jax.localization.forward_process import ForwardSettings, forward_process
from hae_jax.model import VARIANTS, UNet, UNetConfig
from hae_jax.model.flops import count_flops, countable, forward_flops, training_flops
from hae_jax.ops.forms import compiler_options
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

PARTS = ("train", "forward", "translate", "input", "blocks")


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of the benchmark.

    Attributes:
      parts: parts of `PARTS`.
      variants: variants of the network. The others are compared with the first.
      baselines: forms that are compared with ours: "naive", names of single naive pieces, or "torch".
      batch: images per call, over all devices.
      steps: steps of a translation.
      repeats: number of turns. Each program is timed once per turn.

    Raises:
      UserError: impossible values.
    """

    parts: tuple[str, ...]
    variants: tuple[str, ...]
    baselines: tuple[str, ...]
    batch: int
    steps: int = 4
    repeats: int = 5

    def __post_init__(self):
        for flag, values, choices in (("--part", self.parts, PARTS), ("--variant", self.variants, tuple(VARIANTS)),
                                      ("--baseline", self.baselines, (naive.NAIVE, *naive.PIECES, TORCH))):
            for value in values:
                if value not in choices:
                    raise UserError(f"{flag} {value}: choose among {', '.join(choices)}")
        for flag, value in (("--batch", self.batch), ("--steps", self.steps), ("--repeats", self.repeats)):
            if value < 1:
                raise UserError(f"{flag} {value}: must be at least 1")


def with_model(config: ml_collections.ConfigDict, **fields: Any) -> ml_collections.ConfigDict:
    """A copy of the config with changed fields of the network."""
    config = config.copy_and_resolve_references()
    for name, value in fields.items():
        config.model[name] = value
    return config


class Form(NamedTuple):
    """The form of a program that is measured."""

    name: str  # "ours", the naive pieces, or "torch"
    pieces: tuple[str, ...] = ()  # the naive pieces

    def of(self, network: UNetConfig) -> UNetConfig:
        """The network in this form; its parameters are the same."""
        return dataclasses.replace(network, **naive.fields_of(self.pieces))


PLAIN = Form(OURS)


class Program(Protocol):
    """A program that the benchmark measures. Its forms share the arguments on the devices."""

    images: int  # of one call

    def lower(self, form: Form = PLAIN) -> jax.stages.Lowered:
        """Traces it."""
        ...

    def flops(self, form: Form = PLAIN) -> int:
        """Operations of one call, counted from shapes, without those that remat repeats."""
        ...

    def place(self) -> None:
        """Puts the arguments on the devices, unless they are there."""

    def call(self, executable: jax.stages.Compiled) -> Any:
        """Starts it once. Returns results to wait for."""


class TrainingStep:
    """The step of `hae_jax.training`, with optimiser and EMA weights.

    Args:
      config: of the network and its training.
      mesh: devices.
      batch: images.
    """

    def __init__(self, config: ml_collections.ConfigDict, mesh: Mesh, batch: int):
        self.images = batch
        self._config, self._mesh, self._network = config, mesh, network_config(config.to_dict())
        self._optimizer = make_optimizer(config.training)
        self._averages = len(config.training.ema_rates)
        self._history = remembered_timesteps(config)

    def lower(self, form: Form = PLAIN) -> jax.stages.Lowered:
        network = form.of(self._network)
        state = abstract_state(network, self._optimizer, self._averages, self._history)
        graph, _ = abstract_network(network)
        step = make_train_step(self._mesh, shardings_of(self._mesh, state), graph, network,
                               Process.of(self._config.diffusion), self._optimizer, step_settings(self._config))
        return step.lower(jax.tree.leaves(state), jax.eval_shape(lambda: _batch(self._network, self.images)))

    def flops(self, form: Form = PLAIN) -> int:
        return self.images * training_flops(form.of(self._network))

    def place(self) -> None:
        jax.block_until_ready((self._state, self._inputs))

    def call(self, executable: jax.stages.Compiled) -> Any:
        self._state, metrics = executable(self._state, self._inputs)
        return metrics  # a program's results are complete at the same time, and the state has thousands of arrays

    @functools.cached_property
    def _state(self) -> list[jax.Array]:
        """The arrays of the state. Each call donates and replaces them. Programs that are compared share them."""
        state, _ = sharded_initial_state(self._mesh, self._network, self._optimizer, self._averages, self._config.seed,
                                         self._history)
        return jax.tree.leaves(state)

    @functools.cached_property
    def _inputs(self) -> dict[str, jax.Array]:
        return _sharded_batch(self._mesh, self._network, self.images)


class ForwardPass:
    """The network once, with labels, as in inference."""

    def __init__(self, config: ml_collections.ConfigDict, mesh: Mesh, batch: int):
        self.images = batch
        self._config, self._mesh, self._network = config, mesh, network_config(config.to_dict())

    def lower(self, form: Form = PLAIN) -> jax.stages.Lowered:
        graph, params = abstract_network(form.of(self._network))

        def forward(params, batch):
            t = 10 * jnp.arange(len(batch["image"]))
            return nnx.merge(graph, params)(batch["image"], t, batch.get("label"))

        return _jitted(self._mesh, forward).lower(params, jax.eval_shape(lambda: _batch(self._network, self.images)))

    def flops(self, form: Form = PLAIN) -> int:
        return self.images * forward_flops(form.of(self._network))

    def place(self) -> None:
        jax.block_until_ready(self._arguments)

    def call(self, executable: jax.stages.Compiled) -> Any:
        return executable(*self._arguments)

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

    def lower(self, form: Form = PLAIN) -> jax.stages.Lowered:
        return _jitted(self._mesh, self._translate(form.of(self._network), form)).lower(*self._shapes())

    def flops(self, form: Form = PLAIN) -> int:
        return count_flops(self._translate(countable(form.of(self._network)), form), *self._shapes())

    def _shapes(self) -> tuple[Any, ...]:
        _, params = abstract_network(self._network)
        return params, jax.eval_shape(lambda: _batch(self._network, self.images))

    def _translate(self, network: UNetConfig, form: Form) -> Callable[..., Any]:
        graph, _ = abstract_network(network)
        process = Process.of(self._config.diffusion)

        def translate(params, batch):
            model, x0 = nnx.merge(graph, params), batch["image"]
            noise = step_noise(jax.random.split(jax.random.key(0), self.images), x0.shape[1:])
            if naive.TRANSLATION in form.pieces:
                return naive.translate(process, model, x0, noise, self._settings)
            denoisers = network_denoisers(model)
            return forward_process(process, denoisers, x0, noise, self._settings)

        return translate


PROGRAMS = "train", "forward", "translate"  # parts of the benchmark that `program` makes
TORCH_PARTS = "train", "forward"  # parts that `torch_programs` has as well


def check_steps(config: ml_collections.ConfigDict, settings: Settings) -> None:
    """Raises UserError if a translation has more steps than the schedule."""
    if "translate" in settings.parts and not 1 <= settings.steps <= config.diffusion.steps:
        raise UserError(f"--steps {settings.steps}: diffusion.steps is {config.diffusion.steps}")


def forms_of(part: str, network: UNetConfig, settings: Settings) -> list[Form]:
    """Ours, and each baseline that differs from it in this network.

    Raises:
      UserError: a translation of a network without classes.
    """
    if part == "translate" and network.num_classes is None:
        raise UserError("--part translate: the network has no classes (model.num_classes)")
    found = [(form, naive.pieces_of(form, network, translation=part == "translate")) for form in settings.baselines
             if form != TORCH]
    baselines = [Form(f"{form} naive" if form in naive.PIECES else form, pieces) for form, pieces in found if pieces]
    return [PLAIN, *baselines, *([Form(TORCH)] if TORCH in settings.baselines and part in TORCH_PARTS else [])]


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


def _parameters(mesh: Mesh, network: UNetConfig, seed: int) -> nnx.State:
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        params = nnx.state(UNet(network, rngs=nnx.Rngs(seed)), nnx.Param)
    return jax.device_put(params, replicated(mesh))


def _batch(network: UNetConfig, images: int) -> dict[str, jax.Array]:
    shape = (images, network.image_size, network.image_size, network.in_channels)
    return {"image": jnp.zeros(shape), "label": jnp.zeros(images, jnp.int32)}


def host_batch(network: UNetConfig, images: int) -> dict[str, np.ndarray]:
    """The images [B, H, W, C] and labels [B] for the programs."""
    shape = (images, network.image_size, network.image_size, network.in_channels)
    return {
        "image": np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32),
        "label": (np.arange(images) % (network.num_classes or 1)).astype(np.int32),
    }


def _sharded_batch(mesh: Mesh, network: UNetConfig, images: int) -> dict[str, jax.Array]:
    return shard_batch(mesh, host_batch(network, images))
