"""The device mesh, the sharding rules, and placement of batches on devices. The model does not depend on them."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from hae_jax.errors import UserError

_SMALLEST_SHARDED = 2**14  # elements; gathering a smaller parameter costs more than replicating it
_PARTS = {"params": "parameters", "ema": "EMA weights", "opt_state": "optimiser"}  # names of the state's fields


def make_mesh(shape: Sequence[int] = (-1, 1), devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Makes a mesh ("data", "model") of devices. Batches are split over both axes, the state over "model" only.

    Args:
      shape: number of devices along each axis; one may be -1, for the remaining devices. (-1, 1) copies the state to
        every device (data parallel), (1, -1) splits it over all devices (FSDP), (4, 2) over pairs of devices.
      devices: the devices; None: all devices of all hosts.

    Raises:
      UserError: the shape does not fit the number of devices, or the processes have unequal numbers of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = _axis_sizes(tuple(shape), len(devices))
    per_host = Counter(device.process_index for device in devices)
    if len(set(per_host.values())) > 1:
        counts = ", ".join(f"process {process}: {count}" for process, count in sorted(per_host.items()))
        raise UserError(f"training.mesh: every process must have as many devices as the others ({counts})")
    # Devices are sorted by host, so that a host reads the rows that its own devices hold.
    devices = sorted(devices, key=lambda device: device.process_index)
    # The axes are Auto, since convolutions on sharded kernels fail with Explicit axes.
    return Mesh(np.array(devices).reshape(sizes), ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))


def _axis_sizes(shape: tuple[int, ...], count: int) -> tuple[int, ...]:
    """The shape with -1 replaced by the number that fits."""
    if len(shape) != 2 or any(n != -1 and n < 1 for n in shape) or shape == (-1, -1):
        raise UserError(f"training.mesh is {shape}: give two numbers, devices along data and model; one may be -1")
    given = abs(math.prod(shape))
    if count % given or (-1 not in shape and given != count):
        fitting = (-1, math.gcd(shape[1], count)) if shape[1] > 0 else (math.gcd(shape[0], count), -1)
        raise UserError(f"training.mesh is {shape}: it does not fit {count} device{'s' * (count > 1)}; set it to "
                        f"{fitting}")
    return tuple(count // given if n == -1 else n for n in shape)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch's rows over all devices."""
    return NamedSharding(mesh, PartitionSpec(("data", "model")))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays that are the same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def rows_on_devices(
    mesh: Mesh, shape: tuple[int, ...], part: Callable[[tuple[slice, ...]], np.ndarray]
) -> jax.Array:
    """A batch of this shape. Each host makes the rows of its devices with `part(index)`."""
    # JAX's annotation allows None as the index, which does not occur.
    return jax.make_array_from_callback(shape, batch_sharding(mesh), part)  # pyright: ignore[reportArgumentType]


def state_shardings(mesh: Mesh, abstract_state: Any) -> Any:
    """A sharding for each leaf of a state, along its largest axis that "model" divides. Small leaves are replicated.

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


def bytes_per_device(abstract_state: Any, shardings: Any) -> int:
    """Bytes of a state on each device. The rules split evenly, so the number is the same on all devices.

    Args:
      abstract_state: a tree of anything with `shape` and `dtype`.
      shardings: a tree of shardings, like `abstract_state`.
    """
    leaves = zip(jax.tree.leaves(abstract_state), jax.tree.leaves(shardings), strict=True)
    return sum(_shard_bytes(leaf, sharding) for leaf, sharding in leaves)


def _shard_bytes(leaf: Any, sharding: NamedSharding) -> int:
    return math.prod(sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize


def sharding_table(abstract_state: Any, shardings: Any) -> str:
    """A table of the sharding: a line for each parameter, then sums for each part of the state.

    Only sums are given for EMA weights and the optimiser, since their shapes and shardings equal those of parameters.

    Args:
      abstract_state: the state, or its shapes and dtypes.
      shardings: a tree of NamedSharding, like `abstract_state`.
    """
    mesh = jax.tree.leaves(shardings)[0].mesh
    rows, whole, held = [("parameter", "shape", "dtype", "axes", "bytes per device")], Counter(), Counter()
    leaves = jax.tree_util.tree_leaves_with_path(abstract_state)
    for (path, leaf), sharding in zip(leaves, jax.tree.leaves(shardings), strict=True):
        part = _PARTS.get(jax.tree_util.keystr(path[:1], simple=True), "rest")
        whole[part] += math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
        held[part] += _shard_bytes(leaf, sharding)
        if part == "parameters":
            name = jax.tree_util.keystr(path[1:], simple=True, separator="/").removesuffix("/value")
            rows.append((name, " x ".join(map(str, leaf.shape)), str(leaf.dtype), _axes(sharding, len(leaf.shape)),
                         f"{_shard_bytes(leaf, sharding):,}"))
    sums = [("", "bytes in all", "bytes per device")]
    sums += [(part, f"{whole[part]:,}", f"{held[part]:,}") for part in (*_PARTS.values(), "rest")]
    sums.append(("state", f"{sum(whole.values()):,}", f"{sum(held.values()):,}"))
    title = f"mesh: data {mesh.shape['data']} x model {mesh.shape['model']}"
    return "\n".join([title, "", *_columns(rows, "<<<<>"), "", *_columns(sums, "<>>")])


def _axes(sharding: NamedSharding, ndim: int) -> str:
    """The mesh axis over which each axis of an array is split, such as "-, model"; "replicated" if none is."""
    names = tuple(sharding.spec) + (None,) * (ndim - len(sharding.spec))
    return ", ".join(name or "-" for name in names) if any(names) else "replicated"


def _columns(rows: Sequence[Sequence[str]], alignment: str) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:{align}{width}}" for cell, align, width in zip(row, alignment, widths, strict=True))
            .rstrip() for row in rows]


def check_batch_size(batch_size: int, parts: int, mesh: Mesh, field: str) -> None:
    """Checks that a batch can be split into equal parts, and each part over all devices.

    Raises:
      UserError: it cannot. The message names the field and the next size that fits.
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
