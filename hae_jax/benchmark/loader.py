"""Benchmark of the loader: slices per second from a prepared dataset to batches in memory, without a device."""

import contextlib
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import ml_collections
import numpy as np

from hae_jax.data.batches import train_batches
from hae_jax.data.slices import CaseSlices
from hae_jax.data.store import SplitReader, StoreWriter, open_store
from hae_jax.errors import UserError

_MADE_UP_SLICES = 512
_WARM_UP = 3  # batches before the measurement


def slices_per_second(reader: SplitReader, config: ml_collections.ConfigDict, batch: int, seconds: float) -> float:
    """Reads training batches with the settings of `config.data` for about `seconds`."""
    batches = train_batches(reader, batch_size=batch, seed=config.seed, workers=config.data.workers,
                            prefetch=config.data.prefetch)
    try:
        # Batches that were read ahead before the clock starts would cost no time. So they are consumed first.
        for _ in range(_WARM_UP + config.data.prefetch * max(1, config.data.workers)):
            next(batches)
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            next(batches)
            count += 1
        return count * batch / (time.perf_counter() - start)
    finally:
        batches.close()


@contextlib.contextmanager
def training_slices(config: ml_collections.ConfigDict) -> Iterator[tuple[SplitReader, str]]:
    """The training split of `config.data.root` and its name. If no dataset there fits, a synthetic split."""
    shape = [config.model.image_size, config.model.image_size, config.model.in_channels]
    try:
        store = open_store(config.data.root)
        fits = store.manifest["slice_shape"] == shape and len(store.split("train")) > 0
    except UserError:
        fits = False
    if fits:
        yield store.split("train"), config.data.root
        return
    with tempfile.TemporaryDirectory() as folder:
        yield made_up_slices(Path(folder), shape), f"{_MADE_UP_SLICES} made-up slices"


def made_up_slices(folder: Path, shape: list[int]) -> SplitReader:
    """Writes a training split of noise. It cannot be compressed, so it is as slow to read as real slices."""
    rng = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    writer, count = StoreWriter(folder), 64
    for case in range(_MADE_UP_SLICES // count):
        images = rng.random((count, *shape), np.float32)
        masks = np.zeros((count, *shape[:2]), np.float32)
        masks[::2] = 1
        writer.add(f"case_{case}", "train", CaseSlices(images, masks, np.arange(count), (*shape[:2], count)), None)
    writer.finish({})
    return open_store(folder).split("train")
