"""Results of the benchmark: a row for each program, as a Markdown table and as JSON."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from hae_jax.files import write_json, written_whole
from hae_jax.provenance import record

OURS, TORCH = "ours", "torch"


@dataclasses.dataclass(frozen=True)
class Row:
    """The metrics of one program; None where unknown.

    Attributes:
      part: the program.
      variant: variant of the network; for the loader, the origin of its slices; for a block, its name.
      form: "ours", the naive pieces, or "torch" for the same network in PyTorch.
      seconds: time of a call in each turn.
      images: images per call.
      flops: operations of a call in this form; not counted for PyTorch.
      model_flops: operations of a call in our form, on which the speed is based.
      memory: peak memory in bytes, per device from its statistics. Without statistics, or after a larger program, it is
        that of XLA's plan, on a CPU for all cores together. For PyTorch, it is the memory allocated on the GPU.
      compile_seconds: time of tracing and compilation.
      time_ratio: time divided by that of the reference: ours for a baseline, the first variant for other variants, the
        first form of a block. For the loader, slices per second divided by those that the training step needs.
      memory_ratio: memory of XLA's plan divided by that of the reference.
    """

    part: str
    variant: str
    form: str
    seconds: list[float]
    images: int
    flops: int | None = None
    model_flops: int | None = None
    memory: int | None = None
    compile_seconds: float | None = None
    time_ratio: float | None = None
    memory_ratio: float | None = None

    @property
    def images_per_second(self) -> float:
        """Images per second in the median turn."""
        return self.images / float(np.median(self.seconds))


@dataclasses.dataclass(frozen=True)
class Result:
    """All rows, and the machine on which they were measured."""

    rows: list[Row]
    peak_flops: float  # of matrix products
    peak_bytes: float  # per second, of copies
    machine: str
    settings: dict[str, Any]

    def text(self) -> str:
        """The table, below a line that names the machine."""
        head = (f"{self.machine}; matrix products reach {number(self.peak_flops / 1e9)} GFLOP/s, copies "
                f"{number(self.peak_bytes / 1e9)} GB/s")
        table = render(_HEADER, [_cells(row, self) for row in self.rows])
        return "\n".join([head, "", table, *_loader_lines(self.rows)])

    def write(self, folder: str | Path) -> list[Path]:
        """Writes benchmark.json and benchmark.md."""
        table, data = Path(folder) / "benchmark.md", Path(folder) / "benchmark.json"
        rows = [dataclasses.asdict(row) | {"images_per_second": row.images_per_second} for row in self.rows]
        write_json(data, record() | {"machine": self.machine, "peak_flops": self.peak_flops,
                                     "peak_bytes": self.peak_bytes, "settings": self.settings, "rows": rows})
        with written_whole(table) as path:
            path.write_text(self.text() + "\n")
        return [table, data]


def machine(mesh: Mesh) -> str:
    """The devices in words."""
    device = mesh.devices.flat[0]
    kind = f"{device.device_kind} ({os.cpu_count()} cores)" if device.platform == "cpu" else device.device_kind
    return f"{mesh.size} x {kind}, jax {jax.__version__}"


_HEADER = ("part", "variant", "form", "time", "fastest", "images/s", "GFLOP/image", "model GFLOP/s", "MFU",
           "memory", "compiling", "time x", "memory x")


def _cells(row: Row, result: Result) -> list[str]:
    median = float(np.median(row.seconds))
    if row.part == "input":
        return ["input", row.variant, row.form, seconds(median), "", number(row.images_per_second), *[""] * 7]
    assert row.model_flops is not None  # unknown only for the loader
    speed = row.model_flops / median
    return [row.part, row.variant, row.form, seconds(median), seconds(min(row.seconds)),
            number(row.images_per_second), number(row.flops and row.flops / row.images / 1e9), number(speed / 1e9),
            f"{speed / result.peak_flops:.0%}",
            size(row.memory), seconds(row.compile_seconds),
            f"{row.time_ratio:.2f}", f"{row.memory_ratio:.2f}" if row.memory_ratio else ""]


def _loader_lines(rows: Sequence[Row]) -> list[str]:
    return ["", *(f"The loader gives {number(row.images_per_second)} slices/s, {number(row.time_ratio)} times what the "
                  "training step needs." for row in rows if row.part == "input" and row.time_ratio)]


def render(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table. Columns of numbers are right-aligned."""
    columns = [[name, *(row[i] for row in rows)] for i, name in enumerate(header)]
    widths = [max(3, *map(len, column)) for column in columns]
    numeric = [_is_numeric(column[1:]) for column in columns]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.rjust(width) if right else cell.ljust(width)
                                 for cell, width, right in zip(cells, widths, numeric, strict=True)) + " |"

    rule = "|" + "|".join("-" * (width + 1) + (":" if right else "-")
                          for width, right in zip(widths, numeric, strict=True)) + "|"
    return "\n".join([line(header), rule, *map(line, rows)])


def number(value: float | None, unit: str = "") -> str:
    """A number with at least three digits; empty for None."""
    if value is None:
        return ""
    text = f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{text} {unit}".rstrip()


def seconds(value: float | None) -> str:
    """A time in s or ms; empty for None."""
    if value is None:
        return ""
    return number(value, "s") if value >= 1 else number(1e3 * value, "ms")


def size(count: float | None) -> str:
    """A size in GB or MB, from bytes; empty for None."""
    if count is None:
        return ""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else number(count / 1e6, "MB")


def _is_numeric(cells: Sequence[str]) -> bool:
    return all(cell == "" or cell[0].isdigit() for cell in cells)
