"""What XLA makes of the programs for a GPU that is not there: memory, kernels, traffic. Nothing is run or timed."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import ml_collections
from jax.sharding import Mesh, Sharding

from hae_jax.benchmark import hlo, naive
from hae_jax.benchmark.blocks import blocks, with_gradients
from hae_jax.benchmark.measure import Compiled, compile_program
from hae_jax.benchmark.options import tried
from hae_jax.benchmark.programs import PROGRAMS, check_steps, forms_of, program
from hae_jax.benchmark.results import TORCH, write
from hae_jax.benchmark.settings import Settings, with_model
from hae_jax.benchmark.table import number, render, seconds, size
from hae_jax.benchmark.target import TARGETS, target_device
from hae_jax.errors import UserError
from hae_jax.model.flops import TRAINING_FACTOR, count_flops, device_peak_flops
from hae_jax.ops.platform import accelerator_forms
from hae_jax.training.mesh import batch_sharding, make_mesh, replicated
from hae_jax.training.state import network_config

_TOP = 15  # parts in the table of traffic
_PARTS = *PROGRAMS, "blocks"


@dataclasses.dataclass(frozen=True)
class PlanRow:
    """One compiled program.

    Attributes:
      part: which program.
      variant: of the network; for a block, which one.
      form: "ours", or what of it is naive, or what it was tried with.
      images: of a call.
      memory: bytes at the peak, by XLA's plan; cuDNN's own workspace is not in it.
      kernels: launched by a call.
      bytes: that they read and write; a little too much where one reads slices.
      flops: of a call, as this program computes.
      convolutions: what became of them.
      bytes_by_part: the parts of the network with their bytes, the most first.
      compile_seconds: tracing and compilation, here.
    """

    part: str
    variant: str
    form: str
    images: int
    memory: int | None
    kernels: int
    bytes: int
    flops: int
    convolutions: hlo.Convolutions
    bytes_by_part: list[tuple[str, int]]
    compile_seconds: float


@dataclasses.dataclass(frozen=True)
class PlanResult:
    """All rows, and what they are about."""

    rows: list[PlanRow]
    target: str
    peak_flops: float
    dtype: str
    settings: dict[str, Any]

    def text(self) -> str:
        """The tables, with a line above that says what they are about, and that nothing was timed."""
        gpu = TARGETS[self.target]
        head = (f"compiled for {gpu.name}, {self.dtype}, by jax {jax.__version__}, and not run: no figure here is a "
                f"measured time. Floors by the data sheet: {self.peak_flops / 1e12:.0f} TFLOP/s, "
                f"{gpu.bandwidth / 1e12:.2f} TB/s.")
        header = ("part", "variant", "form", "memory", "kernels", "traffic", "GFLOP/image", "floor by operations",
                  "floor by traffic", "convolutions", "NHWC", "16 bits", "maps turned", "compiling")
        rows = [(row.part, row.variant, row.form, size(row.memory), str(row.kernels), size(row.bytes),
                 number(row.flops / row.images / 1e9), seconds(row.flops / self.peak_flops),
                 seconds(row.bytes / gpu.bandwidth), *map(str, row.convolutions), seconds(row.compile_seconds))
                for row in self.rows]
        return "\n\n".join([head, render(header, rows), *(_parts(row) for row in self.rows if row.part != "blocks")])

    def write(self, folder: str | Path) -> list[Path]:
        """Writes plan.json and plan.md."""
        rows = [dataclasses.asdict(row) | {"convolutions": row.convolutions._asdict()} for row in self.rows]
        return write(folder, "plan", self.text(), {
            "target": TARGETS[self.target]._asdict(), "peak_flops": self.peak_flops, "settings": self.settings,
            "rows": rows})


def plan(
    config: ml_collections.ConfigDict, settings: Settings, target: str, say: Callable[[str], None] = print
) -> PlanResult:
    """Compiles the programs for one GPU and reads what became of them.

    Args:
      config: the config tree; the variant is replaced by those of the settings.
      target: of `target.TARGETS`.
      say: is told what is being done, which may take minutes.

    Raises:
      UserError: for an unknown GPU, no compiler for it, or settings that do not fit.
    """
    for part in settings.parts:
        if part not in _PARTS:
            raise UserError(f"--target {target}: --part {part} cannot be compiled for it; choose among "
                            f"{', '.join(_PARTS)}")
    if TORCH in settings.baselines:
        raise UserError(f"--target {target}: PyTorch (--baseline torch) cannot be compiled for it; leave it out")
    check_steps(config, settings)
    device = target_device(target)
    mesh = make_mesh(devices=[device])
    rows = [row for part in settings.parts for row in (
        _rows_of_blocks(config.model.dtype, settings, mesh, say) if part == "blocks" else
        _rows(part, config, settings, mesh, say))]
    return PlanResult(rows, target, device_peak_flops(device, config.model.dtype), config.model.dtype,
                      dataclasses.asdict(settings) | {"config": config.to_dict()})


def _rows(part: str, config, settings: Settings, mesh: Mesh, say) -> Iterator[PlanRow]:
    for variant in settings.variants:
        tree = with_model(config, variant=variant)
        network = network_config(tree.to_dict())
        for form, pieces, option in forms_of(part, network, settings):
            say(f"compiling {part} {variant} {form}")
            with accelerator_forms("gpu"), naive.swapped_in(pieces), tried(option) as of_xla:
                of_part = program(part, tree, mesh, settings)
                compiled = compile_program(of_part.lower, 1, options=of_xla)
                with accelerator_forms():  # with XLA's attention: the operations of a kernel do not show
                    flops = of_part.flops()
            yield _row(part, variant, form, of_part.images, flops, compiled)


def _rows_of_blocks(dtype: str, settings: Settings, mesh: Mesh, say) -> Iterator[PlanRow]:
    for block in blocks(settings.batch, dtype):
        arguments = _abstract(block.params, replicated(mesh)), *_abstract(block.inputs, batch_sharding(mesh))
        for gradients in (False, True)[:1 + block.has_gradients]:
            name = f"{block.name}, {'with gradients' if gradients else 'forward'}"
            say(f"compiling blocks: {name}")
            for form, f in block.forms.items():
                traced = jax.jit(with_gradients(f) if gradients else f)
                with accelerator_forms("gpu"):
                    compiled = compile_program(functools.partial(traced.lower, *arguments), 1)
                    flops = (TRAINING_FACTOR if gradients else 1) * count_flops(f, *arguments)
                yield _row("blocks", name, form, len(block.inputs[0]), flops, compiled)


def _abstract(arrays: Any, sharding: Sharding) -> Any:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), arrays)


def _row(part: str, variant: str, form: str, images: int, flops: int, compiled: Compiled) -> PlanRow:
    text = compiled.executable.as_text()
    kernels = hlo.kernels(text)
    return PlanRow(part, variant, form, images, compiled.memory, sum(kernel.times for kernel in kernels),
                   hlo.traffic(kernels), flops, hlo.convolutions(text), hlo.traffic_by_part(kernels), compiled.seconds)


def _parts(row: PlanRow) -> str:
    title = f"{row.part} {row.variant} {row.form}: traffic by part"
    lines = [(part, size(count), f"{count / row.bytes:.1%}") for part, count in row.bytes_by_part[:_TOP]]
    return f"{title}\n\n{render(('part', 'traffic', 'share'), lines)}"
