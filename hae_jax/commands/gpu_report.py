"""`tools/gpu_report.py`: measures a machine, step by step, within a given time."""

import argparse
import importlib.metadata
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from hae_jax.benchmark.gpu_report import STEPS
from hae_jax.commands.common import entry_point, stop_when_told
from hae_jax.errors import UserError

_REPOSITORY = Path(__file__).resolve().parents[2]
_DESCRIPTION = """\
Measure this project on a machine with a GPU. Each step is a process with its own time limit. If a step fails or times
out, the others still run. As many steps run at the same time as the cores allow, and a step that measures stops the
others meanwhile. Every value is written to FOLDER/results.json as soon as it is measured."""
_EPILOG = """\
examples:
  python tools/gpu_report.py --seconds 900 --output results/gpu
  python tools/gpu_report.py --seconds 600 --output results/rehearsal --rehearse     # small sizes, on any machine
  python tools/gpu_report.py --requirements > wheels.txt    # packages that an offline GPU machine lacks
  pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64 \\
      --platform manylinux2014_x86_64 --platform manylinux_2_17_x86_64 -r wheels.txt -d wheels
  python tools/gpu_report.py --requirements wheels          # the same list with the size of each wheel
  pip install --no-index --find-links wheels --no-deps wheels/*.whl                  # on that machine"""
# Packages that a machine for JAX already has, with their dependencies.
_PRESENT = ("jax", "flax", "optax", "orbax-checkpoint", "tensorstore", "scikit-learn", "scikit-image", "scipy",
            "matplotlib")


def _parser() -> argparse.ArgumentParser:
    steps = "steps:\n" + "\n".join(f"  {step.name:18}{step.about}" for step in STEPS)
    parser = argparse.ArgumentParser(
        prog="gpu_report.py", description=_DESCRIPTION, epilog=f"{steps}\n\n{_EPILOG}", allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--seconds", type=float, default=900, metavar="N", help="time limit of all steps together; default: 900")
    add("--output", metavar="FOLDER", help="folder for results.json, log.txt, the profile, and the reference network "
        "with its log")
    add("--steps", metavar="A,B", help="run only these steps; default: all of those below")
    add("--rehearse", action="store_true", help="run all steps with small sizes, on any device")
    add("--publish", metavar="RESULTS", help="add a report's results.json to docs/benchmarks and exit")
    add("--requirements", nargs="?", const="", metavar="WHEELS", help="list the packages that a GPU machine with JAX "
        "lacks and exit; with a folder of their wheels, also list the sizes")
    return parser


@entry_point
def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line and measures."""
    arguments = _parser().parse_args(argv)
    if arguments.requirements is not None:
        print("\n".join(_requirements(arguments.requirements)))
        return
    if arguments.publish:
        from hae_jax.benchmark.gpu_report import publish

        print("\n".join(map(str, publish(arguments.publish, _REPOSITORY / "docs" / "benchmarks"))))
        return
    if not arguments.output:
        raise UserError("--output is missing; give the folder for the results")
    stop_when_told()
    from hae_jax.benchmark.gpu_report import gpu_report

    names = arguments.steps.split(",") if arguments.steps else [step.name for step in STEPS]
    if unknown := [name for name in names if name not in [step.name for step in STEPS]]:
        raise UserError(f"--steps {unknown[0]}: choose among {', '.join(step.name for step in STEPS)}")
    gpu_report(arguments.output, arguments.seconds, rehearse=arguments.rehearse,
               steps=[step for step in STEPS if step.name in names])


def _requirements(wheels: str) -> Iterator[str]:
    """The lines of requirements.txt that a machine with JAX lacks; with a folder of wheels, also their sizes."""
    present = _closure(_PRESENT)
    lines = [line.strip() for line in (_REPOSITORY / "requirements.txt").read_text().splitlines() if line[:1].isalpha()]
    lacking = [line for line in lines if _normal(line.partition("==")[0]) not in present]
    if not wheels:
        yield from lacking
        return
    sizes = {}
    for line in lacking:
        name = _normal(line.partition("==")[0])
        found = [path for path in Path(wheels).glob("*.whl") if _normal(path.name.split("-")[0]) == name]
        if not found:
            raise UserError(f"--requirements {wheels}: has no wheel of {line}; download it with pip")
        sizes[line] = sum(path.stat().st_size for path in found)
    yield from (f"{line:32}# {size / 2**20:5.1f} MiB" for line, size in sizes.items())
    yield f"# {len(sizes)} wheels, {sum(sizes.values()) / 2**20:.1f} MiB"


def _closure(names: Sequence[str]) -> set[str]:
    """The packages and their dependencies, as far as they are installed here."""
    found, waiting = set(), list(names)
    while waiting:
        name = _normal(waiting.pop())
        if name in found:
            continue
        try:
            needed = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        found.add(name)
        waiting += [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in needed if "extra ==" not in line]
    return found


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
