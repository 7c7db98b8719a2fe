"""The training loop.

`_check` checks settings, devices and data. `train` locks the run folder and finds the newest checkpoint. `_begin`
compiles the step and makes or restores the state. `_loop` takes the steps.
"""

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import psutil
from flax import nnx
from jax.sharding import Mesh

from hae_jax.data.batches import train_batches
from hae_jax.data.store import SplitReader, Store, open_store
from hae_jax.diffusion.process import Process
from hae_jax.errors import UserError
from hae_jax.files import write_json
from hae_jax.model import UNetConfig
from hae_jax.model.config import FORM_FIELDS
from hae_jax.provenance import record
from hae_jax.training.ahead import ReadAhead
from hae_jax.training.checkpoint import Checkpoints, check_same_run, checkpoint_bytes
from hae_jax.training.guard import Guard, RunLock, agreed, check_workdir
from hae_jax.training.hosts import describe
from hae_jax.training.localization import Localization
from hae_jax.training.mesh import check_batch_size, make_mesh, shard_batch, sharding_table
from hae_jax.training.profile import Profiler, Span
from hae_jax.training.samples import make_sampler
from hae_jax.training.settings import check_settings, measures_localization
from hae_jax.training.state import (
    TrainState,
    abstract_network,
    abstract_state,
    make_optimizer,
    network_config,
    remembered_timesteps,
    sharded_initial_state,
    shardings_of,
)
from hae_jax.training.step import make_train_step, step_settings
from hae_jax.training.validation import Validation
from hae_jax.training.watch import Report
from hae_jax.training.weights import BEST, CONFIG, WEIGHTS, load_trained

_LOG = logging.getLogger(__name__)
_SIGNAL, _NO_DATA = 1, 2  # reasons for a process to stop all processes; the largest is used
# Fields of the network that do not change the shape or meaning of its parameters.
_FREE_OF_WEIGHTS = ("dropout", "remat", "dtype", "sparse_pattern", "sparse_seed", "sparse_redraw", *FORM_FIELDS)


class Run(NamedTuple):
    """The fixed parts of a run."""

    config: ml_collections.ConfigDict
    tree: dict[str, Any]  # the config as plain values, as it is saved
    workdir: Path
    mesh: Mesh
    store: Store
    network: UNetConfig
    process: Process
    optimizer: optax.GradientTransformation
    abstract: TrainState  # the state's shapes
    profile: Span | None

    @property
    def reader(self) -> SplitReader:
        """The slices to train on."""
        return self.store.split("train")


def train(
    config: ml_collections.ConfigDict, workdir: str | Path, devices: Sequence[jax.Device] | None = None, *,
    profile: Span | None = None,
) -> None:
    """Trains a network. Resumes from the newest intact checkpoint in `workdir`, if there is one.

    Writes checkpoints, best/, metrics.jsonl, tensorboard/, samples/, config.json, run.json and loss.png to `workdir`.
    The same call after an interruption continues the run as if it had never stopped. With several processes, all must
    make the call.

    Args:
      config: the config tree (`configs/default.py`).
      devices: devices to train on; None: all devices of all hosts.
      profile: steps to record.

    Raises:
      UserError: settings or data do not fit, the folder cannot be written or another job uses it, or the loss is no
        longer finite.
      Stopped: after a signal that requests a stop, once the state is saved.
    """
    run = _check(config, Path(workdir), devices, profile)
    if jax.process_count() > 1:
        _LOG.info("%s", describe())
    with RunLock(run.workdir), Guard() as guard, \
            contextlib.closing(Checkpoints(run.workdir, config.training.keep)) as checkpoints:
        latest = checkpoints.recover()
        if latest is not None:
            earlier = checkpoints.config(latest)
            check_same_run(run.workdir, earlier, run.tree)
            if config.training.anneal != "none" and earlier["training"]["steps"] != config.training.steps:
                _say(f"training.steps was {earlier['training']['steps']}: the learning rate is now annealed towards "
                     f"step {config.training.steps}, so it changes at once")
        if (latest or 0) >= config.training.steps:
            _say(f"{workdir}: already trained for {latest} steps")
            return
        check_workdir(run.workdir, checkpoint_bytes(run.abstract), config.training.keep)
        if jax.process_index() == 0:
            if latest is None:
                _remove_results(run.workdir)
            write_json(run.workdir / "config.json", run.tree)
            write_json(run.workdir / "run.json", record() | {"devices": [str(d) for d in run.mesh.devices.flat]})
        _begin(run, checkpoints, guard, latest)


def _remove_results(workdir: Path) -> None:
    """Removes what a run that had no checkpoint yet has left, since this run may have another config."""
    for path in (workdir / BEST / CONFIG, workdir / BEST / WEIGHTS, workdir / "wandb_id",
                 *(workdir / "samples").glob("step_*.png")):
        path.unlink(missing_ok=True)


def sharding_of(config: ml_collections.ConfigDict) -> str:
    """A table of the sharding of the state. Nothing is allocated.

    Raises:
      UserError: for settings that do not fit.
    """
    mesh = make_mesh(config.training.mesh)
    abstract = _abstract_state(config)
    return sharding_table(abstract, shardings_of(mesh, abstract))


def _abstract_state(config: ml_collections.ConfigDict) -> TrainState:
    training = config.training
    return abstract_state(network_config(config.to_dict()), make_optimizer(training), len(training.ema_rates),
                          remembered_timesteps(config))


def _check(
    config: ml_collections.ConfigDict, workdir: Path, devices: Sequence[jax.Device] | None, profile: Span | None
) -> Run:
    """Checks all settings, the devices and the data, before anything is built or written."""
    training = config.training
    check_settings(config)
    network = network_config(config.to_dict())
    process = Process.of(config.diffusion)
    mesh = make_mesh(training.mesh, devices)
    check_batch_size(training.batch_size, training.accumulation, mesh, "training.batch_size")
    optimizer = make_optimizer(training)
    store = _checked_store(config, network)
    _check_memory(training.batch_size, network)
    return Run(config, config.to_dict(), workdir, mesh, store, network, process, optimizer, _abstract_state(config),
               profile)


def _check_memory(batch_size: int, network: UNetConfig) -> None:
    """Refuses a batch whose images do not fit into this host's memory. Compiling its step could take hours."""
    needed = batch_size // jax.process_count() * network.image_size**2 * network.in_channels * np.float32().nbytes
    memory = psutil.virtual_memory().total
    if needed > memory:
        raise UserError(f"training.batch_size is {batch_size}: the images of a batch need {needed / 1e9:.3g} GB, and "
                        f"this machine has {memory / 1e9:.3g} GB of memory; set it lower")


def _checked_store(config: ml_collections.ConfigDict, network: UNetConfig) -> Store:
    store = open_store(config.data.root)
    needed = ["train", *(["val"] if config.training.validate_every or measures_localization(config) else [])]
    for split in needed:
        if len(store.split(split)) == 0:
            off = ", or set training.validate_every and training.localization_every to 0" if split == "val" else ""
            raise UserError(f"{config.data.root}: its {split} split is empty; prepare it with another split{off}")
    train = store.split("train")
    shape = train.read(0)["image"].shape
    expected = (network.image_size, network.image_size, network.in_channels)
    if shape != expected:
        raise UserError(f"data.root: {config.data.root} has slices of {shape}, but the network needs {expected}; set "
                        "model.image_size and model.in_channels, or prepare the data with another --image-size")
    store.check_modalities(config.data.modalities)
    if network.num_classes is not None and (labels := train.rows["labels"]).max() >= network.num_classes:
        raise UserError(f"data.root: {config.data.root} has label {labels.max()}, but the network has "
                        f"model.num_classes {network.num_classes}")
    return store


def _begin(run: Run, checkpoints: Checkpoints, guard: Guard, latest: int | None) -> None:
    """Builds the state and the step, restores the state, and runs the loop."""
    training = run.config.training
    graph, _ = abstract_network(run.network)
    shardings = shardings_of(run.mesh, run.abstract)
    step = make_train_step(run.mesh, shardings, graph, run.network, run.process, run.optimizer,
                           step_settings(run.config))
    # Source of the state: 1. the newest intact checkpoint of this workdir; 2. exported weights; 3. the seed.
    if latest is not None:
        _say(f"resuming {run.workdir} at step {latest}")
        state = checkpoints.restore(latest, run.abstract, shardings)
    else:
        state, _ = sharded_initial_state(run.mesh, run.network, run.optimizer, len(training.ema_rates),
                                         run.config.seed, remembered_timesteps(run.config))
        if training.initial_weights is not None:
            state = _with_initial_weights(run, state, shardings)
    start = int(state.step)
    report = Report(run.workdir, run.config, run.network, run.mesh, start, sampler=_sampler(run, graph),
                    validation=_validation(run, graph, shardings), localization=_localization(run, graph, shardings))
    with contextlib.closing(report), Profiler(run.workdir, run.profile, start, training.steps) as profiler, \
            _batches(run, report, start) as batches:
        _loop(run, step, state, batches, checkpoints, guard, report, profiler)


def _with_initial_weights(run: Run, state: TrainState, shardings: TrainState) -> TrainState:
    """The state before the first step, with parameters and EMA from `training.initial_weights`."""
    name = run.config.training.initial_weights
    found = load_trained(name)
    theirs = network_config(found.config)
    differing = [field.name for field in dataclasses.fields(theirs) if field.name not in _FREE_OF_WEIGHTS
                 and getattr(theirs, field.name) != getattr(run.network, field.name)]
    if differing:
        raise UserError(f"training.initial_weights {name}: its network differs in model.{', model.'.join(differing)}; "
                        "give the config of its training, or other weights")
    _say(f"starting from the weights of {found.identity['path']}")
    params = jax.tree.map(lambda value, sharding: jax.make_array_from_callback(
        value.shape, sharding, np.asarray(value).__getitem__), nnx.state(found.model, nnx.Param), shardings.params)
    ema = tuple(jax.tree.map(jnp.copy, params) for _ in state.ema)  # donated buffers must not be shared
    return state._replace(params=params, ema=ema)


def _loop(
    run: Run, step: Callable, state: TrainState, batches: ReadAhead, checkpoints: Checkpoints, guard: Guard,
    report: Report, profiler: Profiler,
) -> None:
    training, start = run.config.training, int(state.step)
    pending, stopping = None, 0
    leaves, structure = jax.tree.flatten(state)
    for done in range(start + 1, training.steps + 1):
        profiler.before(done)
        batch = batches.next()
        # A process that must stop sets a flag in the batch, so that all processes stop at the same step.
        reason = _NO_DATA if batches.error else _SIGNAL if guard.stop_requested() else 0
        stop = np.full(len(batch["label"]), reason, np.int32)
        inputs = {"image": batch["image"], "label": batch["label"], "stop": stop}
        leaves, metrics = step(leaves, shard_batch(run.mesh, inputs))
        report.stepped(done, metrics)
        # The previous step's metrics are read only now, so that the device does not wait for the host.
        if pending is not None:
            _stop_unless_finite(run, checkpoints, *pending)
            stopping = int(pending[1]["stop"])
        pending = done, metrics
        save = stopping > 0 or done == training.steps or done % training.save_every == 0
        if save or report.due(done):
            _stop_unless_finite(run, checkpoints, *pending)
            state = structure.unflatten(leaves)
        if report.due(done):
            checkpoints.check()
            state = report.write(done, state)
            leaves = jax.tree.leaves(state)
        if save:
            checkpoints.save(state, run.tree)
        profiler.after(done, leaves)
        if stopping == _NO_DATA:
            with _told_what_is_saved(done), agreed():
                if batches.error is not None:
                    raise batches.error
        if stopping and done < training.steps:
            raise guard.stopped(run.workdir, done)


@contextlib.contextmanager
def _batches(run: Run, report: Report, start: int) -> Iterator[ReadAhead]:
    """Context with the batches of the steps after `start`. The data workers end with it."""
    data, training = run.config.data, run.config.training
    with contextlib.ExitStack() as stack:
        with _told_what_is_saved(start), agreed():
            batches = stack.enter_context(contextlib.closing(train_batches(
                run.reader, batch_size=training.batch_size, seed=run.config.seed, start_step=start,
                process_index=jax.process_index(), process_count=jax.process_count(), workers=data.workers,
                prefetch=data.prefetch, balance=data.balance, healthy_only=data.healthy_only, scaling=data.scaling)))
            ahead = ReadAhead(functools.partial(report.next, batches), training.steps - start)
        yield ahead


@contextlib.contextmanager
def _told_what_is_saved(step: int) -> Iterator[None]:
    """Adds the last saved step to a UserError."""
    try:
        yield
    except UserError as error:
        kept = f"step {step} is saved: the same command resumes from there" if step else "nothing is saved"
        raise UserError(f"{error}; {kept}") from error


def _sampler(run: Run, graph: nnx.GraphDef) -> Callable | None:
    training, diffusion = run.config.training, run.config.diffusion
    if not training.sample_every:
        return None
    process = Process.of(diffusion, str(min(training.sample_steps, diffusion.steps)))
    return make_sampler(run.mesh, graph, run.network, process, diffusion.noise)


def _validation(run: Run, graph: nnx.GraphDef, shardings: TrainState) -> Validation | None:
    training = run.config.training
    if not training.validate_every:
        return None
    return Validation(run.mesh, shardings.params, graph, run.network, run.process, run.store.split("val"),
                      slices=training.validation_slices, batch_size=training.batch_size // training.accumulation,
                      noise=run.config.diffusion.noise, scaling=run.config.data.scaling)


def _localization(run: Run, graph: nnx.GraphDef, shardings: TrainState) -> Localization | None:
    training = run.config.training
    if not measures_localization(run.config):
        return None
    return Localization(run.mesh, shardings.params, graph, run.config, run.store,
                        batch_size=training.batch_size // training.accumulation)


def _stop_unless_finite(run: Run, checkpoints: Checkpoints, step: int, metrics: dict[str, jax.Array]) -> None:
    """Stops the run if a step is not finite, before its state is saved, unless such steps are skipped."""
    if run.config.training.nonfinite == "skip" or bool(metrics["finite"]):
        return
    latest = checkpoints.latest()
    kept = f"checkpoint {latest} is kept" if latest is not None else "there is no checkpoint yet"
    raise UserError(f"{run.workdir}: step {step} gave loss {float(metrics['loss'])} and gradient norm "
                    f"{float(metrics['gradient_norm'])}; {kept}; resume with "
                    "--config.training.nonfinite=skip, which skips such steps, or start in a new --workdir with a "
                    "lower training.learning_rate or with training.clip_norm")


def _say(message: str) -> None:
    if jax.process_index() == 0:
        _LOG.info("%s", message)
