"""What a program takes: time in turns with the programs it is compared with, memory, kernels, the device's best."""

import collections
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

_SHORTEST_TURN = 0.2  # seconds; quicker calls are timed several at once
_COPIED = (2**28, 2**25)  # numbers on each device, for its speed of copying; the second one on CPUs
_PEAK_SIZES = {"cpu": 2048}  # of the square matrices whose product is the device's peak; 8192 elsewhere


class Compiled(NamedTuple):
    """A program ready to run."""

    executable: jax.stages.Compiled
    seconds: float  # to trace and compile it
    memory: int | None  # bytes by XLA's plan, on all devices that share a memory; None where it gives none
    arguments: int  # bytes of them, on each device


def compile_program(lower: Callable[[], jax.stages.Lowered], devices: int) -> Compiled:
    """Traces and compiles.

    Args:
      lower: traces the program.
      devices: that it runs on and that share one memory: the cores of a CPU; else 1.
    """
    start = time.perf_counter()
    executable = lower().compile()
    seconds = time.perf_counter() - start
    plan = executable.memory_analysis()
    if plan is None:
        return Compiled(executable, seconds, None, 0)
    # Results that are written over arguments count once. XLA's own peak leaves out what lies between on CPUs.
    planned = (plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
               + plan.temp_size_in_bytes)
    return Compiled(executable, seconds, planned * devices, plan.argument_size_in_bytes)


def sharing_memory(mesh: Mesh) -> int:
    """How many of its devices share one memory: all of them where they are cores of one CPU."""
    return mesh.size if mesh.devices.flat[0].platform == "cpu" else 1


def in_turns(calls: Sequence[Callable[[], Any]], repeats: int) -> np.ndarray:  # [calls, repeats] seconds
    """Times the calls one after the other, again and again, so that all meet the same state of the machine.

    Each is called once before the clock starts. Quick ones are called several times a turn.
    """
    counts = []
    for call in calls:
        call()
        counts.append(math.ceil(_SHORTEST_TURN / max(_seconds(call, 1), 1e-6)))
    turns = [[_seconds(call, min(count, 1000)) for call, count in zip(calls, counts, strict=True)]
             for _ in range(repeats)]
    return np.array(turns).T


def _seconds(call: Callable[[], Any], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count


def copy_speed(mesh: Mesh, repeats: int = 5) -> float:
    """Bytes per second, read and written, of the best of some passes over large arrays on all devices at once."""
    rows = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    x = jax.device_put(jnp.ones((mesh.size, _COPIED[mesh.devices.flat[0].platform == "cpu"]), jnp.float32), rows)
    add = jax.jit(lambda x: x + 1, out_shardings=rows)
    best = in_turns([lambda: add(x).block_until_ready()], repeats).min()
    return 2 * x.nbytes / float(best)


def matmul_peak(mesh: Mesh, dtype: str, repeats: int = 5) -> float:
    """FLOP/s of the best of some large matrix products on all devices of the mesh at once."""
    size = _PEAK_SIZES.get(mesh.devices.flat[0].platform, 8192)
    rows = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    # Random: processors that save power on equal bits run ones faster than any network's numbers.
    left = jax.device_put(jax.random.normal(jax.random.key(0), (mesh.size * size, size), dtype), rows)
    right = jax.device_put(jax.random.normal(jax.random.key(1), (size, size), dtype), replicated(mesh))
    product = jax.jit(jnp.matmul, out_shardings=rows)
    best = in_turns([lambda: product(left, right).block_until_ready()], repeats).min()
    return 2 * mesh.size * size**3 / float(best)


def peak_of_first_call(device: jax.Device, call: Callable[[], Any], arguments: int) -> int | None:
    """Bytes at the peak of a call, its arguments included, by the device's own statistics.

    These know the largest peak of the process alone: None where the call stays below it, and where there are none.

    Args:
      device: one of the mesh; all do the same.
      call: done once.
      arguments: bytes of its arguments, which are on the device already.
    """
    before = device.memory_stats()
    call()
    after = device.memory_stats()
    if not before or not after or "peak_bytes_in_use" not in before:
        return None
    peak = after["peak_bytes_in_use"]
    return peak - before["bytes_in_use"] + arguments if peak > before["peak_bytes_in_use"] else None


def longest_kernels(call: Callable[[], Any], count: int = 10) -> list[tuple[str, float, float]]:
    """Profiles one call.

    Returns:
      Name, seconds on all devices together and share of all kernels' time, of those that take longest.
    """
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            call()
        (path,) = Path(folder).rglob("*.xplane.pb")
        total: dict[str, float] = collections.defaultdict(float)
        for name, time_ in _own_times(path):
            total[name] += time_
    whole = sum(total.values())
    longest = sorted(total.items(), key=lambda item: item[1], reverse=True)[:count]
    return [(name, time_, time_ / whole) for name, time_ in longest]


def _own_times(path: Path) -> Iterator[tuple[str, float]]:
    """The name and the seconds of each kernel of a profile, less those of the kernels within it (such as a loop's)."""
    profile = jax.profiler.ProfileData.from_file(str(path))
    planes = list(profile.planes)
    for plane in [plane for plane in planes if plane.name.startswith("/device:")] or planes:
        for line in plane.lines:
            yield from _own_times_of_line((event.start_ns, event.duration_ns, name) for event in line.events
                                          if (name := dict(event.stats).get("hlo_op")))


def _own_times_of_line(events: Iterable[tuple[float, float, str]]) -> Iterator[tuple[str, float]]:
    """Of (start, duration, name): events of one thread lie within each other or apart."""
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
