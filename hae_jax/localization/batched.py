"""Translation of slices in batches of one fixed shape over all devices. A batch may hold slices of several cases.

The input comes from `data.slices`. The results are used for calibrations and masks. A slice's result depends neither
on the other slices in its batch nor on the number of devices.
"""

import contextlib
import itertools
import logging
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hae_jax.errors import UserError
from hae_jax.localization.denoisers import network_denoisers
from hae_jax.ops.forms import compiler_options

_LOG = logging.getLogger(__name__)
LARGEST_BATCH = 256  # slices; far fewer are enough to keep a device busy
_OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"
_GB = 1e9


class Slice(NamedTuple):
    """One slice to translate."""

    image: np.ndarray  # [H, W, C] float32 in [-1, 1]
    case: str
    index: int  # position along the volume's axis 2
    intensity: np.ndarray  # [H, W, C] float32, normalised by volume: 1 is the 99th percentile


class SliceTranslator:
    """Applies a method to a stream of slices. It is compiled once, for one shape.

    Attributes:
      batch_size: slices in a batch, over all devices. Becomes smaller when the devices run out of memory.
    """

    def __init__(
        self,
        model: nnx.Module,
        method: Callable[..., NamedTuple],
        *,
        batch_size: int,
        seed: int,
        mesh: Mesh,
        conditional: bool = True,
        max_memory_gb: float | None = None,
    ):
        """Places the parameters on the devices.

        Args:
          model: a network, called as `hae_jax.model.UNet`.
          method: a function of a batch of slices: (denoisers, images, keys) -> a NamedTuple of arrays [B, ...].
          batch_size: rounded up to a multiple of the number of devices.
          seed: seed of the noise. A slice's noise depends on it, the case's name and the slice's position.
          mesh: the devices. Rows are split over all of them; parameters are replicated.
          conditional: whether the network takes class labels.
          max_memory_gb: choose the batch size by memory instead: the largest one up to `LARGEST_BATCH` that needs at
            most this on each device or, if the devices are cores of one CPU, on all of them together.

        Raises:
          UserError: the batch size is not positive.
        """
        if batch_size < 1:
            raise UserError(f"translation.batch_size is {batch_size}: it must be at least 1")
        self.batch_size = -(-batch_size // mesh.size) * mesh.size
        self._mesh, self._max_memory_gb = mesh, max_memory_gb
        replicated, rows = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), (mesh.axis_names,)))
        graph, params = nnx.split(model)
        self._params = jax.device_put(params, replicated)
        self._compiled: dict[int, Any] = {}  # by batch size

        def run(params, images, names, indices):
            return method(network_denoisers(nnx.merge(graph, params), conditional), images,
                          _slice_keys(seed, names, indices))

        self._run = jax.jit(run, in_shardings=(replicated, rows, rows, rows), out_shardings=rows,
                            compiler_options=compiler_options())

    def prepare(self, shape: tuple[int, int, int]) -> None:
        """Compiles for slices of one shape (H, W, C). With `max_memory_gb`, it first chooses the batch size.

        Raises:
          UserError: one slice per device needs more memory than allowed.
        """
        if self._max_memory_gb is not None:
            self.batch_size, self._max_memory_gb = self._chosen_by_memory(shape, self._max_memory_gb), None
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the first batch handles out of memory
            self._executable(self.batch_size, shape)

    def __call__(self, slices: Iterable[Slice]) -> Iterator[tuple[Slice, NamedTuple]]:
        """Translates slices and yields each with its result (NumPy arrays without the batch axis), in order.

        The next batch is read and started before the results of the previous one are fetched. If the devices run out of
        memory, the started batches are repeated in smaller batches.

        Raises:
          UserError: one slice per device does not fit into memory.
        """
        slices, waiting = iter(slices), None
        if (first := next(slices, None)) is None:
            return
        self.prepare(first.image.shape)
        slices = itertools.chain([first], slices)
        while batch := list(itertools.islice(slices, self.batch_size)):
            started = self._start(batch)
            if waiting:
                yield from self._rows(*waiting)
            waiting = batch, started
        if waiting:
            yield from self._rows(*waiting)

    def _start(self, batch: list[Slice]) -> tuple[int, Any]:
        """Starts a batch. Returns the batch size, and the pending results or the error."""
        size = self.batch_size
        full = batch + batch[-1:] * (size - len(batch))  # padding, ignored by `_rows`
        images = np.stack([item.image for item in full])
        names = np.array([zlib.crc32(item.case.encode()) for item in full], np.uint32)
        indices = np.array([item.index for item in full], np.uint32)
        try:
            return size, self._executable(size, images.shape[1:])(self._params, images, names, indices)
        except jax.errors.JaxRuntimeError as error:
            return size, error

    def _rows(self, batch: list[Slice], started: tuple[int, Any]) -> Iterator[tuple[Slice, NamedTuple]]:
        size, results = started
        try:
            if isinstance(results, Exception):
                raise results
            fetched = [np.asarray(values) for values in results]
        except jax.errors.JaxRuntimeError as error:
            del results, started  # frees their memory
            self._shrink(size, error)
            while batch:
                part, batch = batch[:self.batch_size], batch[self.batch_size:]
                yield from self._rows(part, self._start(part))
            return
        for i, item in enumerate(batch):
            # Copies, since views would keep the whole batch in memory until all of its cases are finished.
            yield item, results._make(values[i].copy() for values in fetched)

    def _shrink(self, size: int, error: Exception) -> None:
        """Halves the batch size after a batch of `size` slices ran out of memory, unless it is smaller already."""
        if _OUT_OF_MEMORY not in str(error):
            raise error
        if size > self.batch_size:
            return
        if size == self._mesh.size:
            raise UserError("translation: one slice on each device does not fit into its memory; use bfloat16, a "
                            "smaller network, or a larger device") from error
        self.batch_size = max(size // 2 // self._mesh.size, 1) * self._mesh.size
        self._compiled.clear()
        _LOG.info("out of memory with batches of %d slices: using batches of %d "
                  "(--config.translation.batch_size=%d avoids the first try)", size, self.batch_size, self.batch_size)

    def _executable(self, size: int, shape: tuple[int, ...]) -> Any:
        if size not in self._compiled:
            rows = [jax.ShapeDtypeStruct((size, *shape), np.float32), *[jax.ShapeDtypeStruct((size,), np.uint32)] * 2]
            self._compiled[size] = self._run.lower(self._params, *rows).compile()
        return self._compiled[size]

    def _chosen_by_memory(self, shape: tuple[int, ...], limit: float) -> int:
        """The largest batch size that needs at most `limit` GB, according to XLA's memory plan."""
        unit = self._mesh.size
        one, two = (self._planned_gb(n * unit, shape) for n in (1, 2))
        if one > limit:
            raise UserError(f"--max-memory {limit:g}: a batch of {unit} slices, one on each device, needs {one:.2f} GB")
        # Memory is nearly linear in the batch size. The chosen size is then checked against its own plan.
        count = min(int(1 + (limit - one) / max(two - one, 1e-9)), LARGEST_BATCH // unit or 1)
        while count > 1 and self._planned_gb(count * unit, shape) > limit:
            count = max(count * 9 // 10, 1)
        planned = self._planned_gb(count * unit, shape)
        self._compiled = {count * unit: self._compiled[count * unit]}
        _LOG.info("batches of %d slices: %.2f GB of the %g GB allowed", count * unit, planned, limit)
        return count * unit

    def _planned_gb(self, size: int, shape: tuple[int, ...]) -> float:
        plan = self._executable(size, shape).memory_analysis()
        device = plan.argument_size_in_bytes + plan.output_size_in_bytes + plan.temp_size_in_bytes
        shares_memory = self._mesh.devices.flat[0].platform == "cpu"
        return device * (self._mesh.size if shares_memory else 1) / _GB


class IntensityReader:
    """The equivalent of `SliceTranslator` for methods without a network. It processes slices one by one."""

    def __init__(self, intensity: Callable[[np.ndarray], NamedTuple]):
        """Takes a function from normalised slices [S, H, W, C] to a NamedTuple of arrays [S, ...]."""
        self._intensity = intensity

    def prepare(self, shape: tuple[int, int, int]) -> None:
        """Does nothing; there is nothing to compile."""

    def __call__(self, slices: Iterable[Slice]) -> Iterator[tuple[Slice, NamedTuple]]:
        """Yields each slice with its result, in order."""
        for item in slices:
            rows = self._intensity(item.intensity[None])
            yield item, rows._make(values[0] for values in rows)


Translator = SliceTranslator | IntensityReader


def _slice_keys(seed: int, names: jax.Array, indices: jax.Array) -> jax.Array:  # [B], [B] -> [B] keys
    def key(name, index):
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), name), index)

    return jax.vmap(key)(jnp.asarray(names), jnp.asarray(indices))
