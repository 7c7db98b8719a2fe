"""Description of a training without running it: `train.py --dry-run`. Nothing is compiled or written."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.sharding import Mesh

from hae_jax.data.splits import SPLITS
from hae_jax.data.store import Store, open_store
from hae_jax.errors import UserError
from hae_jax.model import UNetConfig
from hae_jax.model.config import FORM_FIELDS
from hae_jax.model.flops import TRAINING_FACTOR, device_peak_flops, forward_flops, training_flops
from hae_jax.model.layers import Randomness
from hae_jax.training.mesh import bytes_per_device, check_batch_size, make_mesh
from hae_jax.training.settings import check_settings
from hae_jax.training.state import (
    TrainState,
    abstract_network,
    abstract_state,
    make_optimizer,
    network_config,
    remembered_timesteps,
    shardings_of,
)

_REMAT_PRIMITIVES = ("remat", "remat2", "checkpoint")  # the name differs between versions of JAX


def describe(config: ml_collections.ConfigDict, devices: Sequence[jax.Device] | None = None) -> list[str]:
    """Describes the training of a config.

    Args:
      devices: the devices of the training; None: all devices of all hosts.

    Returns:
      Lines of text: network, devices, memory, operations, data. They name data that are missing or do not fit.

    Raises:
      UserError: settings do not fit together or to the devices.
    """
    check_settings(config)
    network, mesh = network_config(config.to_dict()), make_mesh(config.training.mesh, devices)
    check_batch_size(config.training.batch_size, config.training.accumulation, mesh, "training.batch_size")
    optimizer = make_optimizer(config.training)
    state = abstract_state(network, optimizer, len(config.training.ema_rates), remembered_timesteps(config))
    return [*_network_lines(network, state), *_device_lines(config, mesh), *_memory_lines(config, network, mesh, state),
            *_operation_lines(config, network, mesh), *_data_lines(config, network)]


def activation_bytes(network: UNetConfig, rows: int) -> int:
    """Bytes that the forward pass of a training step keeps for the backward pass, from the shapes of the program.

    With remat, the memory of the largest recomputed part is added, since it is needed at the same time. XLA may need
    less, if it recomputes cheap operations, or more, for its workspaces. The count is for the forms of accelerators
    (`hae_jax.ops.forms`), which are an upper bound for CPUs, unless the config names other forms.

    Args:
      rows: images on one device at a time.
    """
    forms = {field: "xla" for field in FORM_FIELDS if getattr(network, field) == "auto"}
    loss, params = _loss(dataclasses.replace(network, **forms), rows)
    return _needed_bytes(loss, [params])


def _network_lines(network: UNetConfig, state: TrainState) -> list[str]:
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    return [f"network: {network.variant}, {network.image_size} x {network.image_size} px, {network.in_channels} "
            f"channels, {network.num_classes or 'no'} classes, computing in {network.dtype}, remat {network.remat}",
            f"parameters: {count:,} ({4 * count / 1e6:.1f} MB in float32)"]


def _device_lines(config: ml_collections.ConfigDict, mesh: Mesh) -> list[str]:
    training, devices = config.training, list(mesh.devices.flat)
    rows = training.batch_size // training.accumulation // mesh.size
    hosts = len({device.process_index for device in devices})
    return [f"devices: {mesh.size} x {devices[0].device_kind} on {hosts} host{'s' * (hosts > 1)}, mesh data "
            f"{mesh.shape['data']} x model {mesh.shape['model']}",
            f"batch: {training.batch_size} = {mesh.size} devices x {training.accumulation} accumulated parts x {rows} "
            "images"]


def _memory_lines(
    config: ml_collections.ConfigDict, network: UNetConfig, mesh: Mesh, state: TrainState
) -> list[str]:
    shardings = shardings_of(mesh, state)
    sizes = {name: bytes_per_device(getattr(state, field), getattr(shardings, field)) for name, field in (
        ("parameters", "params"), ("EMA weights", "ema"), ("optimiser", "opt_state"))}
    # With accumulation, the sum and the gradients of one part are in memory at the same time.
    sizes["gradients"] = sizes["parameters"] * (1 + (config.training.accumulation > 1))
    rows = config.training.batch_size // config.training.accumulation // mesh.size
    sizes["activations"] = activation_bytes(network, rows)
    total = sum(sizes.values())
    lines = [f"memory per device, about {_bytes(total)}: "
             + ", ".join(f"{name} {_bytes(size)}" for name, size in sizes.items()),
             "  activations are estimated: what the backward pass needs, by shapes, before the compiler saves any"]
    limit = _memory_limit(mesh)
    if limit is not None:
        fits = "fits" if total < limit else ("does not fit: set model.remat = \"block\", or a larger "
                                             "training.accumulation, or shard with training.mesh = (1, -1)")
        lines.append(f"  of {_bytes(limit)} that a device has: {fits}")
    return lines


def _memory_limit(mesh: Mesh) -> int | None:
    stats = [device.memory_stats() or {} for device in mesh.local_devices]
    limits = [s["bytes_limit"] for s in stats if "bytes_limit" in s]
    return min(limits, default=None)


def _operation_lines(config: ml_collections.ConfigDict, network: UNetConfig, mesh: Mesh) -> list[str]:
    training = config.training
    step = training_flops(network) * training.batch_size
    lines = [f"operations: {_operations(forward_flops(network))} per image forward, {_operations(step)} per step "
             f"({TRAINING_FACTOR} x forward x {training.batch_size} images; recomputation not counted), "
             f"{_operations(step * training.steps)} in all {training.steps:,} steps"]
    peak = device_peak_flops(mesh.devices.flat[0], network.dtype)
    if peak is not None:
        seconds = step / (peak * mesh.size)
        lines.append(f"  at the devices' peak of {mesh.size} x {_operations(peak)}/s: {1e3 * seconds:.1f} ms per step, "
                     f"{seconds * training.steps / 3600:.1f} h in all; expect several times that")
    return lines


def _data_lines(config: ml_collections.ConfigDict, network: UNetConfig) -> list[str]:
    try:
        store = open_store(config.data.root)
    except UserError as error:
        if config.data.phantom is not None and not Path(config.data.root).exists():
            return [f"data: {config.data.root} does not exist; training would make a phantom of "
                    f"{config.data.phantom.subjects} subjects first"]
        return [f"data: {error}"]
    lines = [f"data: {config.data.root}", *(_split_line(store, split) for split in SPLITS)]
    shape, wanted = store.manifest["slice_shape"], [network.image_size, network.image_size, network.in_channels]
    if shape is not None and shape != wanted:
        lines.append(f"  its slices are {shape}, but the network needs {wanted}: set model.image_size and "
                     "model.in_channels, or prepare the data again")
    try:
        store.check_modalities(config.data.modalities)
    except UserError as error:
        lines.append(f"  {error}")
    images, slices = config.training.steps * config.training.batch_size, store.manifest["splits"]["train"]["slices"]
    if slices:
        lines.append(f"  {config.training.steps:,} steps of {config.training.batch_size} images are "
                     f"{images / slices:,.1f} epochs")
    return lines


def _split_line(store: Store, split: str) -> str:
    totals = store.manifest["splits"][split]
    share = f", {totals['lesion_slices'] / totals['slices']:.1%} of them with a lesion" if totals["slices"] else ""
    return f"  {split}: {totals['cases']} cases, {totals['slices']:,} slices{share}"


def _bytes(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _operations(count: float) -> str:
    prefix = min(int(math.log10(count)) // 3, 6)  # up to exa
    return f"{count / 10 ** (3 * prefix):.3g} {' kMGTPE'[prefix].strip()}FLOP"


def _loss(network: UNetConfig, rows: int) -> tuple[Callable[[nnx.State], jax.Array], nnx.State]:
    """A loss function of the parameters, like that of a training step, and the parameters' shapes."""
    graph, params = abstract_network(network)

    def loss(params: nnx.State) -> jax.Array:
        image = jnp.zeros((rows, network.image_size, network.image_size, network.in_channels))
        t = jnp.zeros(rows, jnp.int32)
        condition = {} if network.num_classes is None else {"y": t, "drop": t > 0}
        randomness = Randomness(jax.random.split(jax.random.key(0), rows), jax.random.key(0))
        return jnp.square(nnx.merge(graph, params)(image, t, rngs=randomness, **condition)).mean()

    return loss, params


def _needed_bytes(f: Callable, inputs: list[Any]) -> int:
    """Bytes that f keeps, plus the bytes that the largest recomputed part needs in the backward pass."""
    parts = _recomputed(jax.make_jaxpr(f)(*inputs).jaxpr)
    return _kept_bytes(f, *inputs) + max((_needed_bytes(part, shapes) for part, shapes in parts), default=0)


def _kept_bytes(f: Callable, *inputs: Any) -> int:
    """Bytes that f's forward pass keeps for its backward pass, without its inputs."""
    jaxpr = jax.make_jaxpr(lambda *inputs: jax.tree.leaves(jax.vjp(f, *inputs)[1]))(*inputs).jaxpr
    given = {id(variable) for variable in jaxpr.invars}
    kept: dict[int, Any] = {id(variable): variable.aval for variable in jaxpr.outvars if id(variable) not in given}
    return sum(aval.size * aval.dtype.itemsize for aval in kept.values())


def _recomputed(jaxpr: Any) -> Iterator[tuple[Callable, list[jax.ShapeDtypeStruct]]]:
    """Yields the parts of a program that its backward pass recomputes, each with the shapes of its inputs."""
    varying = {id(variable) for variable in jaxpr.invars}
    for equation in jaxpr.eqns:
        varies = [id(variable) in varying for variable in equation.invars]
        if any(varies):
            varying.update(map(id, equation.outvars))
        if equation.primitive.name in _REMAT_PRIMITIVES:
            yield _part(equation, varies)
            continue
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _recomputed(inner)


def _part(equation: Any, varies: list[bool]) -> tuple[Callable, list[jax.ShapeDtypeStruct]]:
    """A recomputed part as a function of the inputs that vary. The other inputs are constants without gradients."""
    shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in equation.invars]
    whole = jaxpr_as_fun(ClosedJaxpr(equation.params["jaxpr"], ()))

    def part(*inputs: jax.Array) -> list[jax.Array]:
        given = iter(inputs)
        return whole(*(next(given) if v else jnp.zeros(shape.shape, shape.dtype)
                       for shape, v in zip(shapes, varies, strict=True)))

    return part, list(itertools.compress(shapes, varies))
