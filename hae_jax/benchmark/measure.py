"""Measurement of programs: time in turns with other programs, memory, kernels, and the device's peak."""

import collections
import gzip
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hae_jax.training.mesh import replicated

_SHORTEST_TURN = 0.5  # seconds; of shorter calls, several are timed together
_COPIED = (2**28, 2**25)  # values per device to measure the copy speed; the second on CPUs
_PEAK_SIZES = {"cpu": 2048}  # size of the square matrices to measure the device's peak; 8192 elsewhere


class Compiled(NamedTuple):
    """A compiled program."""

    executable: jax.stages.Compiled
    seconds: float  # to trace and compile it
    memory: int | None  # bytes of XLA's plan, on all devices that share a memory; None if there is no plan
    arguments: int  # bytes of the arguments on each device


def compile_program(
    lower: Callable[[], jax.stages.Lowered], devices: int, options: dict[str, Any] | None = None
) -> Compiled:
    """Traces and compiles a program.

    Args:
      lower: function that traces the program.
      devices: number of its devices that share one memory, such as cores of a CPU; else 1.
      options: of XLA, which replace those of the program.
    """
    start = time.perf_counter()
    executable = lower().compile(compiler_options=options)
    seconds = time.perf_counter() - start
    plan = executable.memory_analysis()
    if plan is None:
        return Compiled(executable, seconds, None, 0)
    # Results that overwrite arguments count once. On CPUs, XLA's own peak leaves out temporary arrays.
    planned = (plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
               + plan.temp_size_in_bytes)
    return Compiled(executable, seconds, planned * devices, plan.argument_size_in_bytes)


def sharing_memory(mesh: Mesh) -> int:
    """The number of devices that share one memory: all devices of a CPU, else one."""
    return mesh.size if mesh.devices.flat[0].platform == "cpu" else 1


def in_turns(calls: Sequence[Callable[[], Any]], repeats: int) -> np.ndarray:  # [calls, repeats] seconds
    """Times the calls in turns, `repeats` times, so that the machine's state is the same for all of them.

    Each call is made once before the measurement. Short calls are repeated several times per turn. As in a training,
    they are started one after the other, and only the last one is waited for.

    Args:
      calls: functions that start work and return its results: JAX arrays, or any object with `block_until_ready`.
      repeats: number of turns.
    """
    counts = []
    for call in calls:
        jax.block_until_ready(call())
        counts.append(math.ceil(_SHORTEST_TURN / max(_seconds(call, 1), 1e-6)))
    turns = [[_seconds(call, min(count, 1000)) for call, count in zip(calls, counts, strict=True)]
             for _ in range(repeats)]
    return np.array(turns).T


def _seconds(call: Callable[[], Any], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count - 1):
        call()
    jax.block_until_ready(call())
    return (time.perf_counter() - start) / count


def copy_speed(mesh: Mesh, repeats: int = 5) -> float:
    """Bytes per second, read plus written, of the fastest pass over large arrays on all devices at the same time."""
    rows = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    x = jax.device_put(jnp.ones((mesh.size, _COPIED[mesh.devices.flat[0].platform == "cpu"]), jnp.float32), rows)
    add = jax.jit(lambda x: x + 1, out_shardings=rows)
    best = in_turns([lambda: add(x)], repeats).min()
    return 2 * x.nbytes / float(best)


def matmul_peak(mesh: Mesh, dtype: str, repeats: int = 5) -> float:
    """FLOP/s of the fastest of several large matrix products on all devices of the mesh at the same time."""
    size = _PEAK_SIZES.get(mesh.devices.flat[0].platform, 8192)
    rows = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    # Values are random. Equal values save power, so some processors multiply ones faster than a network's values.
    left = jax.device_put(jax.random.normal(jax.random.key(0), (mesh.size * size, size), dtype), rows)
    right = jax.device_put(jax.random.normal(jax.random.key(1), (size, size), dtype), replicated(mesh))
    product = jax.jit(jnp.matmul, out_shardings=rows)
    best = in_turns([lambda: product(left, right)], repeats).min()
    return 2 * mesh.size * size**3 / float(best)


def peak_of_first_call(device: jax.Device, call: Callable[[], Any], arguments: int) -> int | None:
    """Peak memory of a call in bytes, including its arguments, from the device's statistics.

    The statistics give only the largest peak of the process. The result is None if the call stays below it, or if there
    are no statistics.

    Args:
      device: one device of the mesh; all do the same.
      call: function that is called once.
      arguments: bytes of its arguments, which are already on the device.
    """
    before = device.memory_stats()
    jax.block_until_ready(call())
    after = device.memory_stats()
    if not before or not after or "peak_bytes_in_use" not in before:
        return None
    peak = after["peak_bytes_in_use"]
    return peak - before["bytes_in_use"] + arguments if peak > before["peak_bytes_in_use"] else None


def longest_kernels(
    call: Callable[[], Any], count: int = 10, keep: Path | None = None
) -> list[tuple[str, float, float]]:
    """Profiles one call.

    Args:
      call: function that is called once.
      count: number of kernels.
      keep: file for the profile, `.xplane.pb.gz`. XProf and TensorBoard read it once it is decompressed.

    Returns:
      Name, seconds on all devices together and share of all kernels' time, of those that take longest.
    """
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            jax.block_until_ready(call())
        (path,) = Path(folder).rglob("*.xplane.pb")
        if keep:
            keep.write_bytes(gzip.compress(path.read_bytes()))
        total: dict[str, float] = collections.defaultdict(float)
        for name, time_ in _own_times(path):
            total[name] += time_
    whole = sum(total.values())
    longest = sorted(total.items(), key=lambda item: item[1], reverse=True)[:count]
    return [(name, time_, time_ / whole) for name, time_ in longest]


def _own_times(path: Path) -> Iterator[tuple[str, float]]:
    """Yields name and seconds of each kernel of a profile, without those of kernels inside it (such as in a loop)."""
    profile = jax.profiler.ProfileData.from_file(str(path))
    planes = list(profile.planes)
    for plane in [plane for plane in planes if plane.name.startswith("/device:")] or planes:
        for line in plane.lines:
            if plane.name.startswith("/device:GPU"):
                # Many kernels form one operation (a CUDA graph), and some run at the same time.
                if line.name.startswith("Stream"):
                    yield from ((event.name, event.duration_ns / 1e9) for event in line.events)
                continue
            yield from _own_times_of_line((event.start_ns, event.duration_ns, name) for event in line.events
                                          if (name := dict(event.stats).get("hlo_op")))


def _own_times_of_line(events: Iterable[tuple[float, float, str]]) -> Iterator[tuple[str, float]]:
    """The same for events (start, duration, name) of one thread, which are nested or disjoint."""
    own: list[list] = []
    open_events: list[tuple[float, list]] = []  # (end, entry of `own`)
    for start, duration, name in sorted(events, key=lambda event: (event[0], -event[1])):
        while open_events and open_events[-1][0] <= start:
            open_events.pop()
        if open_events:
            open_events[-1][1][1] -= duration
        own.append([name, duration])
        open_events.append((start + duration, own[-1]))
    return ((name, max(duration, 0) / 1e9) for name, duration in own)
