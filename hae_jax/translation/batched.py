"""Slices of any cases through the network, in batches of one fixed shape over all devices.

Stands between `volume.py`, which gives slices, and `calibration` and `masks`, which read what comes out. A slice's
result depends neither on the slices that share its batch nor on the number of devices.
"""

import itertools
import zlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hae_jax.diffusion.noise import gaussian
from hae_jax.diffusion.process import Process
from hae_jax.errors import UserError
from hae_jax.translation.forward_process import ForwardSettings, Translation, forward_process, network_denoisers


class Slice(NamedTuple):
    """One slice to translate."""

    image: np.ndarray  # [H, W, C] float32 in [-1, 1]
    case: str
    index: int  # position along the volume's axis 2


class SliceTranslator:
    """The forward process for a stream of slices; compiled once, at the first batch.

    Attributes:
      batch_size: slices in a batch, over all devices.
    """

    def __init__(
        self,
        model: nnx.Module,
        process: Process,
        settings: ForwardSettings,
        *,
        batch_size: int,
        seed: int,
        mesh: Mesh,
    ):
        """Places the parameters on the devices.

        Args:
          model: a class-conditional network, called as `hae_jax.model.UNet`.
          process: the diffusion process, respaced or not.
          settings: of the forward process.
          batch_size: rounded up to a multiple of the number of devices.
          seed: of the noise; that of a slice is a function of this, its case's name and its position.
          mesh: the devices; rows lie over all of them, parameters on each.

        Raises:
          UserError: if the batch size is not positive.
        """
        if batch_size < 1:
            raise UserError(f"translation.batch_size is {batch_size}: it must be at least 1")
        self.batch_size = -(-batch_size // mesh.size) * mesh.size
        replicated, rows = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), (mesh.axis_names,)))
        graph, params = nnx.split(model)
        self._params = jax.device_put(params, replicated)

        def run(params, images, names, indices):
            denoisers = network_denoisers(nnx.merge(graph, params))
            keys = _slice_keys(seed, names, indices)

            def noise(step):
                return gaussian(jax.vmap(lambda key: jax.random.fold_in(key, step))(keys), images.shape[1:])

            return forward_process(process, denoisers, images, noise, settings)

        self._run = jax.jit(run, in_shardings=(replicated, rows, rows, rows), out_shardings=rows)

    def __call__(self, slices: Iterable[Slice]) -> Iterator[tuple[Slice, Translation]]:
        """Translates slices and yields each with its result (NumPy arrays without the batch axis), in order.

        The next batch is read and started before the results of the last one are waited for.
        """
        slices, waiting = iter(slices), None
        while batch := list(itertools.islice(slices, self.batch_size)):
            started = self._start(batch)
            if waiting:
                yield from _rows(*waiting)
            waiting = batch, started
        if waiting:
            yield from _rows(*waiting)

    def _start(self, batch: list[Slice]) -> Translation:
        full = batch + batch[-1:] * (self.batch_size - len(batch))  # padding; `_rows` never looks at it
        images = np.stack([item.image for item in full])
        names = np.array([zlib.crc32(item.case.encode()) for item in full], np.uint32)
        return self._run(self._params, images, names, np.array([item.index for item in full], np.uint32))


def stacked(results: Iterable[Translation]) -> Translation:
    """Results of single slices as those of a batch."""
    return Translation(*map(np.stack, zip(*results, strict=True)))


def _slice_keys(seed: int, names: jax.Array, indices: jax.Array) -> jax.Array:  # [B], [B] -> [B] keys
    def key(name, index):
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), name), index)

    return jax.vmap(key)(jnp.asarray(names), jnp.asarray(indices))


def _rows(batch: list[Slice], results: Translation) -> Iterator[tuple[Slice, Translation]]:
    fetched = [np.asarray(values) for values in results]
    for i, item in enumerate(batch):
        # Copies: a view would keep the whole batch for as long as one of its cases is unfinished.
        yield item, Translation(*(values[i].copy() for values in fetched))
