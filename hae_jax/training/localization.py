"""Localization metrics during training, with the method `residual` on slices of the validation split.

The training loss does not show how well a network finds lesions: networks with the same loss differ widely. The metrics
here need image labels only. If the dataset has ground truth, the true Dice is added.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import ml_collections
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from hae_jax.data.slices import to_model_range
from hae_jax.data.store import Store
from hae_jax.localization.denoisers import network_denoisers
from hae_jax.localization.map_threshold import ValidationSlice, without_mm
from hae_jax.localization.measures import measure
from hae_jax.localization.methods import residual_method
from hae_jax.localization.residual import Residual, ResidualMap
from hae_jax.localization.validation import describe_slices, heights_in_head
from hae_jax.training.mesh import batch_sharding, replicated, rows_on_devices

_SEED = 0  # of the noise


class _Map(NamedTuple):
    """Of the results, what is measured."""

    map: np.ndarray  # [H, W]


class Localization:
    """A callable that returns the metrics. All processes must call it, and all get the same values."""

    def __init__(
        self, mesh: Mesh, shardings: nnx.State, graph: nnx.GraphDef, config: ml_collections.ConfigDict, store: Store,
        *, batch_size: int,
    ):
        """Chooses the slices. The computation is compiled at the first call.

        Args:
          shardings: of the parameters.
          config: the config tree; `training.localization_slices` are taken, evenly spread over the split.
          store: of which the validation split is used, not empty.
          batch_size: slices at once over all devices, which must divide it; does not change the result.
        """
        self._mesh, self._store, self._scaling = mesh, store, config.data.scaling
        self._method = residual_method(config)
        if any(case["affine"] is None for case in store.cases):  # slices that were prepared for the PyTorch code
            self._method = without_mm(self._method)
        self._reader = store.split("val")
        count = min(config.training.localization_slices, len(self._reader))
        self._rows = ((np.arange(count) + 0.5) * len(self._reader) / count).astype(int)
        self._shape = (batch_size, *store.manifest["slice_shape"])
        rows = batch_sharding(mesh)
        self._maps = jax.jit(_maps(graph, self._method), in_shardings=(shardings, rows, rows),
                             out_shardings=replicated(mesh))

    def __call__(self, params: nnx.State) -> dict[str, float]:
        """Measures a network.

        Returns:
          localization_expected_dice: of all lesion slices' pixels together, by the rule `mixture`; NaN where the rule
            finds no lesion. localization_auc: of the slices' anomaly scores; NaN with one class of slices.
            localization_dice: the true mean Dice of the lesion slices at that rule's threshold; absent without ground
            truth. reconstruction_error: mean absolute difference of pseudo-healthy reconstructions from healthy slices
            in the head, in the network's range.
        """
        results, items, inputs = self._translated(params)
        found = measure(self._method, (
            (_Map(map), item) for map, item in zip(results.map, items, strict=True)))
        values = {"localization_expected_dice": found.expected_dice, "localization_auc": found.slice_auc}
        if not math.isnan(found.auprc):
            values["localization_dice"] = found.mixture_dice
        errors = [np.abs(image[..., list(self._method.modality)] - healthy)[item.head].mean()
                  for image, healthy, item in zip(inputs, results.healthy, items, strict=True)
                  if not item.label and item.head.any()]
        values["reconstruction_error"] = float(np.mean(errors)) if errors else np.nan
        return values

    def _translated(self, params: nnx.State) -> tuple[ResidualMap, list[ValidationSlice], np.ndarray]:
        """The results of all chosen slices, their descriptions, and the network's inputs [S, H, W, C]."""
        results = [jax.tree.map(np.asarray, self._maps(params, *batch)) for batch in self._batches()]
        count = len(self._rows)
        stacked = jax.tree.map(lambda *parts: np.concatenate(parts)[:count], *results)
        rows, everything = self._reader.read(self._rows), self._reader.rows
        heights = heights_in_head(everything["cases"], everything["slices"])[self._rows]
        return stacked, describe_slices(self._store.cases, rows, heights), to_model_range(rows["image"], self._scaling)

    def _batches(self) -> Iterator[tuple[jax.Array, ...]]:
        """Yields batches of one shape, the last one padded. A host reads only the rows of its devices."""
        size = self._shape[0]
        for start in range(0, len(self._rows), size):
            rows = self._rows[np.minimum(np.arange(start, start + size), len(self._rows) - 1)]
            yield (rows_on_devices(self._mesh, self._shape, functools.partial(self._read, rows)),
                   rows_on_devices(self._mesh, (size,), rows.astype(np.uint32).__getitem__))

    def _read(self, rows: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:  # [b, H, W, C]
        return to_model_range(self._reader.read(rows[index[0]])["image"], self._scaling)


def _maps(graph: nnx.GraphDef, method: Residual) -> Callable[..., ResidualMap]:
    def maps(params, images, rows):
        keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.key(_SEED), row))(rows)
        return method(network_denoisers(nnx.merge(graph, params)), images, keys)

    return maps
