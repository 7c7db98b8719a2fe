"""Devices, and what lies where: the mesh, the sharding rules, batches onto devices. The model knows none of it."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from hae_jax.errors import UserError

_SMALLEST_SHARDED = 2**14  # elements; below this, gathering a parameter costs more than holding it


def make_mesh(fsdp: bool = False, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Devices as a mesh ("data", "model").

    Args:
      devices: which; None: all devices of all hosts.
      fsdp: whether the parameters are sharded over the devices, too; they then lie on the "model" axis, which every
        batch is also sharded over.
    """
    count = len(jax.devices() if devices is None else devices)
    shape = (1, count) if fsdp else (count, 1)
    # Auto axes: with Explicit ones, convolutions on sharded kernels fail.
    return jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto), devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over all devices."""
    return NamedSharding(mesh, PartitionSpec(("data", "model")))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def state_shardings(mesh: Mesh, abstract_state: Any) -> Any:
    """A sharding for each leaf of a state: its largest axis that "model" divides; small leaves are replicated.

    Args:
      abstract_state: a tree of anything with a `shape`.

    Returns:
      A tree of NamedSharding, like `abstract_state`.
    """
    size = mesh.shape["model"]

    def rule(leaf) -> NamedSharding:
        axes = [i for i, n in enumerate(leaf.shape) if n % size == 0]
        if size == 1 or not axes or np.prod(leaf.shape) < _SMALLEST_SHARDED:
            return replicated(mesh)
        largest = max(axes, key=lambda i: leaf.shape[i])
        return NamedSharding(mesh, PartitionSpec(*(None,) * largest, "model"))

    return jax.tree.map(rule, abstract_state)


def check_batch_size(batch_size: int, parts: int, mesh: Mesh, field: str) -> None:
    """A batch must be cut into equal parts, and each part over all devices.

    Raises:
      UserError: naming the field and the next size that fits.
    """
    unit = parts * mesh.size
    if batch_size < 1 or batch_size % unit:
        fitting = max(unit, -(-batch_size // unit) * unit)
        raise UserError(f"{field} is {batch_size}: {mesh.size} devices x {parts} accumulated parts need a multiple of "
                        f"{unit}; set it to {fitting}")


def shard_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Puts this host's rows of a batch onto its devices as rows of global arrays.

    Args:
      batch: arrays [b, ...], b the global batch size over the number of hosts.
    """
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in batch.items()}
