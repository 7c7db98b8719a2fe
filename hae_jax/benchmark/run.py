"""The benchmark: parts x variants x (ours, baselines), which are compiled and then timed in turns."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import ml_collections
import numpy as np
from jax.sharding import Mesh

from hae_jax.benchmark.blocks import measure_blocks
from hae_jax.benchmark.loader import slices_per_second, training_slices
from hae_jax.benchmark.measure import (
    Compiled,
    compile_program,
    copy_speed,
    in_turns,
    matmul_peak,
    peak_of_first_call,
    sharing_memory,
)
from hae_jax.benchmark.programs import PROGRAMS, Program, Settings, check_steps, forms_of, program, with_model
from hae_jax.benchmark.results import OURS, TORCH, Result, Row, machine
from hae_jax.errors import UserError
from hae_jax.training.mesh import check_batch_size
from hae_jax.training.state import network_config

_LOADER_SECONDS = 3.0


def benchmark(
    config: ml_collections.ConfigDict, settings: Settings, mesh: Mesh, say: Callable[[str], None] = print
) -> Result:
    """Runs the benchmark.

    Args:
      config: the config tree; the variant is replaced by those of the settings.
      say: is told what is being done, which may take minutes.

    Raises:
      UserError: for settings that do not fit together.
    """
    check_batch_size(settings.batch, config.training.accumulation, mesh, "--batch")
    check_steps(config, settings)
    where = machine(mesh)
    if TORCH in settings.baselines:
        where += f", {_check_torch(config, settings, mesh)}"
    say("matrix products and copies")
    best = matmul_peak(mesh, config.model.dtype), copy_speed(mesh)
    rows = [row for part in settings.parts if part in PROGRAMS for row in _measure(part, config, settings, mesh, say)]
    if "blocks" in settings.parts:
        rows += measure_blocks(settings.batch, config.model.dtype, settings.repeats, mesh, say)
    if "input" in settings.parts:
        say("loader")
        rows.append(_loader_row(config, settings, rows))
    return Result(rows, *best, where, dataclasses.asdict(settings) | {"config": config.to_dict()})


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A program in one form, ready for timing."""

    program: Program
    variant: str
    form: str
    call: Callable[[], Any]  # starts it; see `in_turns`
    memory: int | None
    flops: int | None = None  # None for PyTorch, as is `compiled`
    compiled: Compiled | None = None


def _measure(
    part: str, config: ml_collections.ConfigDict, settings: Settings, mesh: Mesh, say: Callable[[str], None]
) -> list[Row]:
    entries = list(_compiled(part, config, settings, mesh, say))
    say(f"timing {part}: {settings.repeats} turns of {len(entries)} programs")
    turns = in_turns([entry.call for entry in entries], settings.repeats)
    first = {entry.variant: i for i, entry in reversed(list(enumerate(entries)))}
    return [_row(part, entries, turns, i, first[entry.variant] if entry.form != OURS else 0)
            for i, entry in enumerate(entries)]


def _compiled(part, config, settings, mesh, say) -> Iterator[_Entry]:
    for variant in settings.variants:
        tree = with_model(config, variant=variant)
        network = network_config(tree.to_dict())
        of_part = program(part, tree, mesh, settings)
        for form in forms_of(part, network, settings):
            if form.name == TORCH:
                say(f"building {part} {variant} {TORCH}")
                yield _torch_entry(part, tree, variant, of_part, mesh)
                continue
            say(f"compiling {part} {variant} {form.name}")
            compiled = compile_program(functools.partial(of_part.lower, form), sharing_memory(mesh))
            of_part.place()
            call = functools.partial(of_part.call, compiled.executable)
            used = peak_of_first_call(mesh.devices.flat[0], call, compiled.arguments)
            yield _Entry(of_part, variant, form.name, call, used or compiled.memory, of_part.flops(form), compiled)


def _torch_entry(
    part: str, config: ml_collections.ConfigDict, variant: str, ours: Program, mesh: Mesh
) -> _Entry:
    """The same part in PyTorch, with the same images."""
    torch_programs = _torch_programs()
    device = torch_programs.device_for(mesh.devices.flat[0].platform, mesh.size)
    theirs = torch_programs.PROGRAMS[part](config, ours.images, device)
    return _Entry(ours, variant, TORCH, theirs.call, theirs.peak_memory())


def _check_torch(config: ml_collections.ConfigDict, settings: Settings, mesh: Mesh) -> str:
    """Describes PyTorch's version and device."""
    torch_programs = _torch_programs()
    if "train" in settings.parts:
        torch_programs.check_training(config)
    return torch_programs.description(torch_programs.device_for(mesh.devices.flat[0].platform, mesh.size))


def _torch_programs() -> ModuleType:
    try:
        import torch  # noqa: F401  an extra: nothing else of the benchmark needs it
    except ImportError as error:
        raise UserError("--baseline torch: needs PyTorch; pip install torch (the extra: pip install '.[torch]')"
                        ) from error
    from hae_jax.benchmark import torch_programs

    return torch_programs


def _row(part: str, entries: Sequence[_Entry], turns: np.ndarray, i: int, reference: int) -> Row:
    entry, other = entries[i], entries[reference]
    ours = next(e for e in entries if e.variant == entry.variant and e.form == OURS)
    # The memory ratio uses XLA's plans, since the devices' statistics may exist for only one of the programs.
    plan, other_plan = (e.compiled.memory if e.compiled else None for e in (entry, other))
    return Row(
        part, entry.variant, entry.form,
        seconds=turns[i].tolist(), images=entry.program.images, flops=entry.flops, model_flops=ours.flops,
        memory=entry.memory,
        compile_seconds=entry.compiled.seconds if entry.compiled else None,
        time_ratio=float(np.median(turns[i] / turns[reference])),
        memory_ratio=plan / other_plan if plan and other_plan else None)


def _loader_row(config: ml_collections.ConfigDict, settings: Settings, rows: Sequence[Row]) -> Row:
    with training_slices(config) as (reader, name):
        speed = slices_per_second(reader, config, settings.batch, _LOADER_SECONDS)
    need = next((row.images_per_second for row in rows if row.part == "train" and row.form == OURS), None)
    return Row("input", name, f"{config.data.workers} workers", [settings.batch / speed], settings.batch,
               time_ratio=speed / need if need else None)
