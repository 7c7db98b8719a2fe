"""Batches of slices for training, read from a prepared dataset with Grain. This is the last stage of the data flow.

The order of the training slices depends only on the seed and the position. No state has to be saved: a run that
stopped after step k requests the batches from step k on and gets the same data, with any number of processes and
workers.
"""

import contextlib
import errno
import os
import re
import shutil
import signal
from collections.abc import Iterator
from multiprocessing import resource_tracker

import grain
import numpy as np
from absl import flags

from hae_jax.data.slices import to_model_range
from hae_jax.data.store import SplitReader
from hae_jax.errors import UserError
from hae_jax.processes import end_with_parent


def train_batches(
    reader: SplitReader,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
    prefetch: int = 4,
    balance: bool = False,
    healthy_only: bool = False,
    scaling: str = "slice",
) -> "grain.DatasetIterator[dict[str, np.ndarray]] | _Workers":
    """Endless batches in random order; every slice once per epoch, each epoch in another order.

    Batches run across the ends of epochs, so that all have the same size. Process p of P gets rows p B/P .. (p+1) B/P
    of each global batch of B.

    With `balance`, healthy and lesion slices alternate. Each class has separate epochs.

    Args:
      reader: the training split.
      batch_size: global batch size B, over all processes.
      seed: seed of the order; any integer >= 0.
      start_step: number of global batches to skip, at no cost.
      process_index: number of this process, p.
      process_count: P; must divide B.
      workers: processes that read and scale; 0 uses threads of this process, which is enough for most disks.
      prefetch: batches to read ahead (per worker); 0 reads on demand.
      balance: draw healthy and lesion slices equally often.
      healthy_only: leave out slices with a lesion.
      scaling: see `to_model_range`.

    Returns:
      An iterator of dictionaries: image [B/P, H, W, C] float32 in [-1, 1]; label, case, slice [B/P] int32. With
      workers, call `close()` at the end. If a worker dies, the iterator raises a UserError.

    Raises:
      UserError: the split is empty, a class is missing with `balance` or `healthy_only`, or a number is wrong.
    """
    _check_batch_size(batch_size, reader)
    if batch_size % process_count:
        raise UserError(f"batch_size {batch_size}: not divisible by the {process_count} processes; "
                        f"use a multiple of {process_count}")
    for name, value in (("seed", seed), ("start_step", start_step), ("workers", workers), ("prefetch", prefetch)):
        if value < 0:
            raise UserError(f"{name} {value}: must not be negative")
    # Indices are batched before the slices are read, so that each batch is one request to TensorStore.
    order = _balanced_order(reader, seed) if balance else _reshuffled(_chosen(reader, healthy_only), seed, stream=0)
    shares = order.batch(batch_size // process_count)
    batches = shares[start_step * process_count + process_index::process_count].map(_TrainBatch(reader, scaling))
    dataset = batches.to_iter_dataset(_read_ahead(prefetch))
    return _Workers(dataset, workers) if workers else iter(dataset)


def _chosen(reader: SplitReader, healthy_only: bool) -> np.ndarray:  # [n] indices
    if not healthy_only:
        return np.arange(len(reader))
    healthy = np.flatnonzero(reader.rows["labels"] == 0)
    if not len(healthy):
        raise UserError(f"data.healthy_only: {reader.folder} has no healthy slices; set it to False, or prepare other "
                        "data")
    return healthy


def _reshuffled(indices: np.ndarray, seed: int, stream: int) -> grain.MapDataset[np.int64]:
    """Repeats the indices without end, in a new order each epoch. Streams of one seed are shuffled independently."""
    # Grain shuffles epoch e with seed + e. With hashed seeds, epoch 1 of seed 0 differs from epoch 0 of seed 1.
    shuffle_seed = int(np.random.SeedSequence(seed).generate_state(stream + 1)[stream])
    return grain.MapDataset.source(indices).shuffle(seed=shuffle_seed).repeat()


def _balanced_order(reader: SplitReader, seed: int) -> grain.MapDataset[np.int64]:
    """An order with healthy slices at even positions and lesion slices at odd positions."""
    labels = reader.rows["labels"]
    classes = {"healthy": np.flatnonzero(labels == 0), "lesion": np.flatnonzero(labels != 0)}
    for name, indices in classes.items():
        if not len(indices):
            raise UserError(f"data.balance: {reader.folder} has no {name} slices; set it to False, or prepare the data "
                            "again with other split fractions")
    return grain.MapDataset.mix([_reshuffled(indices, seed, i) for i, indices in enumerate(classes.values())])


class _TrainBatch(grain.transforms.Map):
    """Reads and scales the batch of slices with the given indices [b]."""

    def __init__(self, reader: SplitReader, scaling: str):
        self._reader, self._scaling = reader, scaling

    def map(self, element: np.ndarray) -> dict[str, np.ndarray]:
        rows = self._reader.read(element)
        kept = {key: rows[key] for key in ("label", "case", "slice")}
        return {"image": to_model_range(rows["image"], self._scaling), **kept}


def _read_ahead(prefetch: int) -> grain.ReadOptions:
    return grain.ReadOptions(num_threads=prefetch, prefetch_buffer_size=prefetch)


class _Workers:
    """An iterator that reads the dataset in worker processes. If a worker dies, it raises a UserError."""

    def __init__(self, dataset: grain.IterDataset, workers: int):
        if not flags.FLAGS.is_parsed():
            # Grain reads its own absl flags before it starts a worker. absl raises an error if no flags were parsed.
            flags.FLAGS.mark_as_parsed()
        self._workers = workers
        _start_quiet_tracker()
        with self._deaths():
            self._iterator = iter(dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers),
                                                      worker_init_fn=end_with_parent))

    def __iter__(self) -> "_Workers":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        with self._deaths():
            return next(self._iterator)

    def close(self) -> None:
        """Ends the processes."""
        self._iterator.close()

    @contextlib.contextmanager
    def _deaths(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, OSError) as error:
            died = re.search(r"terminated unexpectedly with exit code (-?\d+)", str(error))
            if died is None and not (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.ENOMEM)):
                raise
            raise UserError(f"one of {self._workers} data workers {_fate(int(died[1]) if died else None)}; or set "
                            "data.workers=0, which reads in threads of this process") from error


def _start_quiet_tracker() -> None:
    """Starts Python's resource tracker without its warnings.

    The tracker removes the files that a dead worker leaves in /dev/shm. It would also print a warning after our error.
    """
    before = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, (before, "ignore:resource_tracker:UserWarning")))
    try:
        resource_tracker.ensure_running()
    finally:
        del os.environ["PYTHONWARNINGS"]
        if before is not None:
            os.environ["PYTHONWARNINGS"] = before


def _fate(code: int | None) -> str:
    """Describes why a worker ended, according to its exit code, and how to prevent it. None: /dev/shm was full."""
    shared = "/dev/shm"
    if code in (None, -signal.SIGBUS):
        free = f", {shutil.disk_usage(shared).free / 2**20:.3g} MiB are free" if os.path.isdir(shared) else ""
        return f"had no space in {shared}{free}: make it larger (Docker: --shm-size=2g), lower data.prefetch"
    if code == -signal.SIGKILL:
        return "was killed (SIGKILL), most likely for want of memory: lower data.workers or data.prefetch"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"exit status {code}"
    return f"died ({name}); see its output above"


def _check_batch_size(batch_size: int, reader: SplitReader) -> None:
    if batch_size <= 0:
        raise UserError(f"batch_size {batch_size}: must be at least 1")
    if len(reader) == 0:
        raise UserError(f"{reader.folder}: the split has no slices; prepare the data again with other split fractions")
