"""Where a program's time goes: a profile of one call, summed up by the parts of the network.

The parts are named scopes (`jax.named_scope`) that the model and the training step open; XLA keeps them as the origin
of each operation, and the profiler says how long each operation took.
"""

import collections
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from hae_jax.benchmark import hlo
from hae_jax.benchmark.table import render, seconds


class Operation(NamedTuple):
    """A part of the network in a profile."""

    name: str
    seconds: float  # on all devices together, without what other operations do within
    share: float  # of the whole program


def longest(
    executable: jax.stages.Compiled, call: Callable[[], Any], count: int = 10, *, kernels: bool = False
) -> list[Operation]:
    """Profiles one call and returns the parts that take longest, the longest first.

    Args:
      executable: the program.
      call: runs it once and waits.
      count: how many parts.
      kernels: name the program's single kernels instead of parts of the network.
    """
    origins = hlo.origins(executable.as_text())
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            call()
        (path,) = Path(folder).rglob("*.xplane.pb")
        total = collections.Counter()
        for operation, time in _own_times(jax.profiler.ProfileData.from_file(str(path))):
            name = operation if kernels else hlo.part(operation, origins.get(operation, ""))
            total[name] += time
    whole = sum(total.values())
    return [Operation(name, time, time / whole) for name, time in total.most_common(count)]


def text(title: str, operations: Iterable[Operation]) -> str:
    """A table under a title."""
    rows = [(operation.name, seconds(operation.seconds), f"{operation.share:.1%}") for operation in operations]
    return f"{title}\n\n{render(('part', 'time', 'share'), rows)}"


def _own_times(profile: jax.profiler.ProfileData) -> Iterator[tuple[str, float]]:
    """The name and the seconds of each operation's event, less those of the events within it."""
    planes = list(profile.planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:")]
    for plane in devices or planes:
        for line in plane.lines:
            yield from _own_times_of_line(
                (event.start_ns, event.duration_ns, operation) for event in line.events
                if (operation := dict(event.stats).get("hlo_op")))


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
    return ((name, max(time, 0) / 1e9) for name, time in own)
