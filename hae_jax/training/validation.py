"""The validation loss: the training loss of the EMA weights on a fixed set of samples.

Slice, timestep, noise and label of each sample are fixed and do not depend on the run's seed. So the losses of one run
can be compared with each other, and with those of other runs on the same data. There is no dropout, and no labels are
dropped.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from hae_jax.data.slices import to_model_range
from hae_jax.data.store import SplitReader
from hae_jax.diffusion.loss import training_loss
from hae_jax.diffusion.noise import draw_noise
from hae_jax.diffusion.process import Process
from hae_jax.model import UNetConfig
from hae_jax.training.mesh import batch_sharding, replicated, rows_on_devices

_SEED = 0  # of the fixed set


class Samples(NamedTuple):
    """The fixed set: S slices, each with its label and, if the network has classes, again without it."""

    row: np.ndarray  # [N] int, row of the split
    label: np.ndarray  # [N] int32
    t: np.ndarray  # [N] int32
    null: np.ndarray  # [N] bool


def fixed_samples(reader: SplitReader, slices: int, steps: int, *, conditional: bool) -> Samples:
    """Chooses slices evenly spaced over a split, and timesteps evenly spaced over 0..steps-1 in a fixed random order.

    Args:
      reader: the validation split; where it has fewer slices than wanted, all are taken.
      slices: how many are wanted.
      steps: T of the diffusion process.
      conditional: whether to add the same slices, timesteps and noise under the null condition.
    """
    count = min(slices, len(reader))
    middle = np.arange(count) + 0.5  # of `count` equal parts
    row = (middle * len(reader) / count).astype(int)
    t = np.random.default_rng(_SEED).permutation((middle * steps / count).astype(np.int32))
    label, null = reader.rows["labels"][row], np.zeros(count, bool)
    once = Samples(row, label, t, null)
    return Samples(np.tile(row, 2), np.tile(label, 2), np.tile(t, 2), np.append(null, ~null)) if conditional else once


class Validation:
    """A callable that returns the validation loss. All processes must call it, and all get the same value."""

    def __init__(
        self,
        mesh: Mesh,
        shardings: nnx.State,  # of the parameters
        graph: nnx.GraphDef,
        network: UNetConfig,
        process: Process,
        reader: SplitReader,
        *,
        slices: int,
        batch_size: int,
        noise: str = "gaussian",
        scaling: str = "slice",
    ):
        """Chooses the samples. The computation is compiled at the first call.

        Args:
          reader: the validation split, not empty.
          slices: see `fixed_samples`.
          batch_size: rows computed at once over all devices, which must divide it; does not change the result.
          noise: `diffusion.noise`, as in training.
          scaling: of the slices, as in training.
        """
        self._mesh, self._reader, self._scaling = mesh, reader, scaling
        self._image_shape = (batch_size, network.image_size, network.image_size, network.in_channels)
        self._samples = fixed_samples(reader, slices, process.schedule.steps,
                                      conditional=network.num_classes is not None and network.task == "denoise")
        rows = batch_sharding(mesh)
        self._losses = jax.jit(_sample_losses(graph, network, process, noise), in_shardings=(shardings, *(rows,) * 5),
                               out_shardings=replicated(mesh))

    def __call__(self, params: nnx.State) -> dict[str, float]:
        """The means over the set: validation_loss and, if the network has classes, validation_loss_null."""
        losses = np.concatenate([np.asarray(self._losses(params, *batch)) for batch in self._batches()])
        # The mean is in float64 and in a fixed order, so that it does not depend on batches and devices.
        losses, null = losses[:len(self._samples.null)].astype(np.float64), self._samples.null
        means = {"validation_loss": float(losses[~null].mean())}
        return means | ({"validation_loss_null": float(losses[null].mean())} if null.any() else {})

    def _batches(self) -> Iterator[tuple[jax.Array, ...]]:
        """Yields batches of one shape, the last one padded with its last sample. A host reads its own rows."""
        count, size = len(self._samples.row), self._image_shape[0]
        for start in range(0, count, size):
            index = np.minimum(np.arange(start, start + size), count - 1)
            row, *others = (a[index] for a in self._samples)
            # The noise of a slice is the same with and without its label.
            number = (index % np.count_nonzero(~self._samples.null)).astype(np.int32)
            yield (rows_on_devices(self._mesh, self._image_shape, functools.partial(self._read, row)),
                   *(rows_on_devices(self._mesh, (size,), values.__getitem__) for values in (number, *others)))

    def _read(self, row: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:  # [b, H, W, C] of the chosen rows
        return to_model_range(self._reader.read(row[index[0]])["image"], self._scaling)


def _sample_losses(graph: nnx.GraphDef, network: UNetConfig, process: Process, noise: str) -> Callable:
    """Returns `f(params, image, number, label, t, null) -> [B]`, losses that do not depend on the rest of the batch."""

    def losses(params, image, number, label, t, null):
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(_SEED), i))(number)
        eps = draw_noise(noise, process, keys, image.shape[1:], t)
        x_t = process.noised(image, t, eps)
        if network.task == "classify":
            logits = nnx.merge(graph, params)(x_t, process.original(t))
            return optax.softmax_cross_entropy_with_integer_labels(logits, label)
        condition = {} if network.num_classes is None else {"y": label, "null": null}
        output = nnx.merge(graph, params)(x_t, process.original(t), **condition)
        return training_loss(process, output, image, x_t, t, eps).loss.astype(jnp.float32)

    return losses
