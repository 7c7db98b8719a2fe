"""Reporting of a run: the progress bar, lines of the log, validation losses, sample grids.

The loop calls `Report` at each step, which does what is due at the step. All processes compute, and one writes.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import psutil
from flax import nnx
from jax.sharding import Mesh
from tqdm import tqdm

from hae_jax.model import UNetConfig
from hae_jax.model.flops import device_peak_flops, training_flops
from hae_jax.training.log import RunLog, window_means
from hae_jax.training.mesh import replicated
from hae_jax.training.samples import draw_samples, write_samples
from hae_jax.training.state import TrainState, abstract_network, learning_rate
from hae_jax.training.step import state_norms
from hae_jax.training.weights import BEST, write_weights

# The only fields in which the logs of two equal runs may differ, such as a run and the same run with an interruption.
TIMING_FIELDS = frozenset({"images_per_second", "model_flops_per_second", "peak_share", "device_memory_gib",
                           "input_wait_seconds", "input_wait_share"})


_IN_BAR = ("loss", "validation_loss", "localization_expected_dice")
_REGULAR = ("log_every", "validate_every", "localization_every", "sample_every")


class Report:
    """The progress bar, the log and the sample grids of a run.

    A training line of metrics.jsonl (`training.log_every`) has means since the last such line: loss, gradient_norm and
    loss_t1of4 .. loss_t4of4 (by quartile of the timestep). It also has values of its step: parameter_norm, ema_distance
    (to the parameters, relative to their norm; ema_distance_2 for a second rate), learning_rate, and skipped_steps (all
    so far).

    Its `TIMING_FIELDS` are: images_per_second; model_flops_per_second of all devices (`hae_jax.model.flops`);
    peak_share, the share of the devices' peak, if it is known; device_memory_gib, the largest peak of this host's
    devices or, on a CPU, the current memory of the process; input_wait_seconds, the time per step that the loop waited
    for a batch; input_wait_share, its share of the time, which is the most that a faster input could save. These times
    do not include compilation, validation and samples. A line of only the first step has no speeds.

    The line of a step with validation (`training.validate_every`) has validation_loss and validation_loss_null. A line
    with `training.localization_every` has the metrics of `localization.Localization`. The EMA weights with the largest
    expected Dice times slice AUC so far are in best/.
    """

    def __init__(
        self,
        workdir: Path,
        config: ml_collections.ConfigDict,
        network: UNetConfig,
        mesh: Mesh,
        start: int,
        *,
        sampler: Callable[..., jax.Array] | None,
        validation: Callable[[nnx.State], dict[str, float]] | None,
        localization: Callable[[nnx.State], dict[str, float]] | None = None,
    ):
        """Opens the log.

        Args:
          start: number of steps done so far.
          sampler: made by `make_sampler`; None: no sample grids.
          validation: a `Validation`; None: no validation.
          localization: a `Localization`; None: no localization metrics.
        """
        self._workdir, self._config, self._network, self._mesh = workdir, config, network, mesh
        self._sampler, self._validation, self._localization = sampler, validation, localization
        self._speaks = jax.process_index() == 0
        self._log = RunLog(workdir, start, config.training.wandb, config.to_dict()) if self._speaks else None
        self._rate = learning_rate(config.training)
        self._graph = abstract_network(network)[0]
        lines = self._log.lines() if self._log else []  # only this process writes the best weights
        self._best = max((score for line in lines if (score := localization_score(line)) > 0), default=0.0)
        self._clock = _Clock(config.training.batch_size, network, mesh)
        self._empty = jax.jit(lambda window: jax.tree.map(jnp.zeros_like, window), out_shardings=replicated(mesh))
        self._bar = tqdm(total=config.training.steps, initial=start, unit="step", desc="training",
                         disable=not self._speaks)

    def next(self, batches: Iterator[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """The next batch. The time until it is available counts as waiting for input, also in a profile."""
        with self._clock.waiting(), jax.profiler.TraceAnnotation("wait for input"):
            return next(batches)

    def stepped(self, done: int, metrics: dict[str, jax.Array]) -> None:
        """Call it after step `done` was dispatched to the devices."""
        if not self._clock.runs:
            jax.block_until_ready(metrics)  # the first step includes compilation
            self._clock.start(done)
        self._bar.update()

    def due(self, done: int) -> bool:
        """Whether `write` must be called at this step."""
        return any(self._due(done, every) for every in _REGULAR)

    def write(self, done: int, state: TrainState) -> TrainState:
        """Writes what is due at a step. Call it before the step's checkpoint is saved.

        Returns:
          The state. Its window is empty if a training line was written.
        """
        values: dict[str, float] = {}
        if self._due(done, "log_every"):
            # The clock is read after the window, since reading the window waits for the step.
            values |= window_means(state.window) | self._clock.read(done)
        with self._clock.paused():
            if self._due(done, "log_every"):
                values |= self._state_of(done, state)
                state = state._replace(window=self._empty(state.window))
            if self._validation is not None and self._due(done, "validate_every"):
                values |= self._validation(state.ema[0])
            if self._localization is not None and self._due(done, "localization_every"):
                values |= self._localization(state.ema[0])
                self._keep_best(done, state, values)
            if values and self._log is not None:
                self._log.write(done, values)
                self._bar.set_postfix({name: f"{values[name]:.4f}" for name in _IN_BAR if name in values},
                                      refresh=False)
            if self._sampler is not None and self._due(done, "sample_every"):
                self._sample(self._sampler, done, state)
        return state

    def close(self) -> None:
        """Closes the bar and draws the loss curve."""
        self._bar.close()
        if self._log is not None:
            self._log.close()

    def _due(self, done: int, every: str) -> bool:
        needed = {"log_every": True, "validate_every": self._validation, "localization_every": self._localization,
                  "sample_every": self._sampler}[every]
        training = self._config.training
        return bool(needed is not None and training[every]
                    and (done == training.steps or done % training[every] == 0))

    def _keep_best(self, done: int, state: TrainState, values: dict[str, float]) -> None:
        """Exports the EMA weights if their localization score is the highest of this run."""
        params = jax.jit(lambda p: p, out_shardings=replicated(self._mesh))(state.ema[0])  # by all processes
        score = localization_score(values)
        if self._speaks and score > self._best:  # False for NaN, if no lesion was found
            self._best = score
            self._export(done, params)

    def _export(self, done: int, params: nnx.State) -> None:
        write_weights(self._workdir / BEST, nnx.merge(self._graph, params), self._config.to_dict(), done)

    def _state_of(self, done: int, state: TrainState) -> dict[str, float]:
        norms = {name: float(value) for name, value in state_norms(state).items()}
        skipped = int(state.skipped)  # the schedule does not advance in these steps
        return norms | {"learning_rate": float(self._rate(done - 1 - skipped)), "skipped_steps": skipped}

    def _sample(self, sampler: Callable[..., jax.Array], done: int, state: TrainState) -> None:
        strengths = tuple(self._config.training.sample_guidance) if self._network.num_classes else (0.0,)
        images = draw_samples(sampler, state.ema[0], self._config.seed, strengths)
        if self._speaks:
            path = self._workdir / "samples" / f"step_{done:07d}.png"
            write_samples(path, images, strengths, self._network.num_classes, self._config.data.modalities)


def localization_score(values: Mapping[str, float | None]) -> float:
    """Expected Dice times slice AUC, by which the best network is chosen; NaN if one is missing."""
    expected, auc = (values.get(f"localization_{name}") for name in ("expected_dice", "auc"))
    return float("nan") if expected is None or auc is None else expected * auc


class _Clock:
    """Measures the time of steps. It does not run before `start` and while paused."""

    def __init__(self, batch_size: int, network: UNetConfig, mesh: Mesh):
        self._batch_size, self._devices = batch_size, list(mesh.devices.flat)
        self._flops = training_flops(network)
        self._peak = device_peak_flops(self._devices[0], network.dtype)
        self.runs, self._done, self._waited, self._begin = False, 0, 0.0, 0.0

    def start(self, done: int) -> None:
        """Starts the clock. Steps after `done` count."""
        self.runs, self._done, self._waited, self._begin = True, done, 0.0, time.monotonic()

    def read(self, done: int) -> dict[str, float]:
        """The timing fields of the steps since the last call, or since the start."""
        values, steps = {"device_memory_gib": _memory_gib(self._devices)}, done - self._done
        if steps:
            seconds = time.monotonic() - self._begin
            images_per_second = steps * self._batch_size / seconds
            values |= {
                "images_per_second": images_per_second,
                "model_flops_per_second": self._flops * images_per_second,
                "input_wait_seconds": self._waited / steps,
                "input_wait_share": self._waited / seconds,
            }
            if self._peak is not None:
                values["peak_share"] = self._flops * images_per_second / (self._peak * len(self._devices))
        self.start(done)
        return values

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Context whose time counts as waiting for input."""
        begin = time.monotonic()
        yield
        self._waited += time.monotonic() - begin

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Context whose time does not count."""
        begin = time.monotonic()
        yield
        self._begin += time.monotonic() - begin


def _memory_gib(devices: list[jax.Device]) -> float:
    own = [device.memory_stats() for device in devices if device.process_index == jax.process_index()]
    peaks = [stats["peak_bytes_in_use"] for stats in own if stats and "peak_bytes_in_use" in stats]
    return (max(peaks) if peaks else psutil.Process().memory_info().rss) / 2**30
