"""The training loop: mesh, data, model, state, step, restore, loop."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import optax
from flax import nnx
from jax.sharding import Mesh
from tqdm import tqdm

from hae_jax.data.batches import train_batches
from hae_jax.data.store import SplitReader, open_store
from hae_jax.diffusion.process import Process
from hae_jax.diffusion.schedule import make_schedule
from hae_jax.errors import UserError
from hae_jax.files import write_json
from hae_jax.model import UNetConfig
from hae_jax.provenance import record
from hae_jax.training.checkpoint import Checkpoints, check_same_run
from hae_jax.training.log import RunLog, window_means
from hae_jax.training.mesh import check_batch_size, make_mesh, replicated, shard_batch
from hae_jax.training.samples import draw_samples, make_sampler, write_samples
from hae_jax.training.state import (
    TrainState,
    abstract_network,
    empty_window,
    learning_rate,
    make_optimizer,
    network_config,
    sharded_initial_state,
)
from hae_jax.training.step import StepSettings, make_train_step


class Run(NamedTuple):
    """The fixed parts of a run."""

    config: ml_collections.ConfigDict
    tree: dict[str, Any]  # the config as plain values, as it is saved
    workdir: Path
    mesh: Mesh
    reader: SplitReader
    network: UNetConfig
    process: Process
    optimizer: optax.GradientTransformation


def train(
    config: ml_collections.ConfigDict, workdir: str | Path, devices: Sequence[jax.Device] | None = None
) -> None:
    """Trains a network, going on from the newest checkpoint in `workdir` if there is one.

    Writes checkpoints, metrics.jsonl, tensorboard/, samples/, config.json, run.json and loss.png to `workdir`. The same
    call after an interruption continues the run as if it had never stopped.

    Args:
      config: the config tree (`configs/default.py`).
      workdir: the run's folder.
      devices: what to train on; None: all devices of all hosts.

    Raises:
      UserError: for settings or data that do not fit, and when the loss is not finite any more.
    """
    run = _check(config, Path(workdir), devices)
    checkpoints = Checkpoints(run.workdir, config.training.keep)
    try:
        latest = checkpoints.latest()
        if latest is not None:
            check_same_run(run.workdir, checkpoints.config(latest), run.tree)
        if (latest or 0) >= config.training.steps:
            print(f"{workdir}: already trained for {latest} steps")
            return
        if jax.process_index() == 0:
            write_json(run.workdir / "config.json", run.tree)
            write_json(run.workdir / "run.json", record() | {"devices": [str(d) for d in jax.devices()]})
        _begin(run, checkpoints, latest)
    finally:
        checkpoints.close()


def _check(config: ml_collections.ConfigDict, workdir: Path, devices: Sequence[jax.Device] | None) -> Run:
    """Everything that can be wrong is found here, before anything is built or written."""
    tree = config.to_dict()
    training = config.training
    for name in ("steps", "log_every", "save_every", "keep", "accumulation"):
        if training[name] < 1:
            raise UserError(f"training.{name} is {training[name]}: it must be at least 1")
    if not 0 <= training.p_uncond <= 1:
        raise UserError(f"training.p_uncond is {training.p_uncond}: it must be in [0, 1]")
    if not training.ema_rates or not all(0 <= rate < 1 for rate in training.ema_rates):
        raise UserError(f"training.ema_rates is {training.ema_rates}: give at least one rate in [0, 1)")
    network = network_config(tree)
    diffusion = config.diffusion
    schedule = make_schedule(diffusion.schedule, diffusion.steps)
    process = Process(schedule, diffusion.predicts, diffusion.variance, diffusion.clipping)
    mesh = make_mesh(training.fsdp, devices)
    check_batch_size(training.batch_size, training.accumulation, mesh, "training.batch_size")
    reader = open_store(config.data.root).split("train")
    if len(reader) == 0:
        raise UserError(f"{config.data.root}: its train split is empty; prepare it with another split")
    shape = reader.read(0)["image"].shape
    expected = (network.image_size, network.image_size, network.in_channels)
    if shape != expected:
        raise UserError(f"data.root: {config.data.root} holds slices of {shape}, the network wants {expected}; set "
                        "model.image_size and model.in_channels, or prepare the data with another --image-size")
    return Run(config, tree, workdir, mesh, reader, network, process, make_optimizer(training))


def _begin(run: Run, checkpoints: Checkpoints, latest: int | None) -> None:
    """Builds the state and the step, restores, and enters the loop."""
    training, seed = run.config.training, run.config.seed
    graph, _ = abstract_network(run.network)
    state, shardings = sharded_initial_state(run.mesh, run.network, run.optimizer, len(training.ema_rates), seed)
    settings = StepSettings(seed, training.p_uncond, training.accumulation, tuple(training.ema_rates))
    step = make_train_step(run.mesh, shardings, graph, run.network, run.process, run.optimizer, settings)
    # Where the state comes from: 1. the newest checkpoint of this workdir; 2. the seed.
    if latest is not None:
        print(f"resuming {run.workdir} at step {latest}")
        state = checkpoints.restore(latest, state, shardings)
    _loop(run, step, state, checkpoints, graph)


def _loop(run: Run, step: Callable, state: TrainState, checkpoints: Checkpoints, graph: nnx.GraphDef) -> None:
    training, start = run.config.training, int(state.step)
    batches = train_batches(
        run.reader, batch_size=training.batch_size, seed=run.config.seed, start_step=start,
        process_index=jax.process_index(), process_count=jax.process_count(), workers=run.config.data.workers,
        prefetch=run.config.data.prefetch)
    report = _Report(run, start, _sampler(run, graph))
    pending = None
    for done in range(start + 1, training.steps + 1):
        last = done == training.steps
        batch = next(batches)
        state, metrics = step(state, shard_batch(run.mesh, {name: batch[name] for name in ("image", "label")}))
        # The metrics of the step before are read only now, so that the device never waits for the host.
        _stop_unless_finite(run, checkpoints, pending)
        pending = done, metrics
        log, save = last or done % training.log_every == 0, last or done % training.save_every == 0
        if log or save:
            _stop_unless_finite(run, checkpoints, pending)
        if log:
            state = report.log(done, state)
        if save:
            checkpoints.save(state, run.tree)
        if training.sample_every and (last or done % training.sample_every == 0):
            report.sample(done, state)
        report.bar.update()
    report.close()


class _Report:
    """Everything that a run shows: one process's bar, log and sample grids; silent in the other processes."""

    def __init__(self, run: Run, start: int, sampler: Callable | None):
        self._run, self._sampler = run, sampler
        self._speaks = jax.process_index() == 0
        self._file = RunLog(run.workdir, start) if self._speaks else None
        self._rate = learning_rate(run.config.training)
        self._logged, self._clock = start, time.monotonic()
        self.bar = tqdm(total=run.config.training.steps, initial=start, unit="step", desc="training",
                        disable=not self._speaks)

    def log(self, done: int, state: TrainState) -> TrainState:
        """Writes the means since the last line and returns the state with an empty window."""
        means = window_means(state.window)
        now = time.monotonic()
        images = (done - self._logged) * self._run.config.training.batch_size
        speed = {"learning_rate": float(self._rate(done - 1)), "images_per_second": images / (now - self._clock)}
        self._logged, self._clock = done, now
        if self._speaks:
            self._file.write(done, means | speed)
            self.bar.set_postfix(loss=f"{means['loss']:.4f}", refresh=False)
        return state._replace(window=jax.device_put(empty_window(), replicated(self._run.mesh)))

    def sample(self, done: int, state: TrainState) -> None:
        """Writes a sample grid; its time does not count in images per second."""
        paused, run = time.monotonic(), self._run
        path = run.workdir / "samples" / f"step_{done:07d}.png"
        strengths = tuple(run.config.training.sample_guidance)
        images = draw_samples(self._sampler, state.ema[0], run.config.seed, strengths)
        if self._speaks:
            write_samples(path, images, strengths, run.network.num_classes)
        self._clock += time.monotonic() - paused

    def close(self) -> None:
        """Ends the bar and draws the loss curve."""
        self.bar.close()
        if self._speaks:
            self._file.close()


def _sampler(run: Run, graph: nnx.GraphDef) -> Callable | None:
    training, diffusion = run.config.training, run.config.diffusion
    if not training.sample_every:
        return None
    steps = min(training.sample_steps, diffusion.steps)
    schedule = make_schedule(diffusion.schedule, diffusion.steps, str(steps))
    process = Process(schedule, diffusion.predicts, diffusion.variance, diffusion.clipping)
    return make_sampler(graph, run.network, process)


def _stop_unless_finite(run: Run, checkpoints: Checkpoints, pending: tuple[int, dict[str, jax.Array]] | None) -> None:
    """Stops the run before a broken state can be saved.

    Raises:
      UserError: naming the step and the last good checkpoint.
    """
    if pending is None or bool(pending[1]["finite"]):
        return
    latest = checkpoints.latest()
    kept = f"checkpoint {latest} is kept" if latest is not None else "there is no checkpoint yet"
    raise UserError(f"{run.workdir}: step {pending[0]} gave loss {float(pending[1]['loss'])} and gradient norm "
                    f"{float(pending[1]['gradient_norm'])}; {kept}; lower training.learning_rate or set "
                    "training.clip_norm")
