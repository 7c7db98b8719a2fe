"""The GPU report: all metrics that this project states about a machine, from one command.

Each step runs in a separate process (`gpu_steps`) with its own time limit. If a step fails or exceeds its limit, the
next one runs nevertheless. A step writes each metric as soon as it is measured. This process collects the metrics and
rewrites `results.json`.
"""

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hae_jax.benchmark.results import number, render
from hae_jax.errors import UserError
from hae_jax.files import write_json, written_whole
from hae_jax.provenance import record

RESULTS = "results.json"
LOG = "log.txt"  # output of the steps
_POLL = 1.0  # seconds between two checks of a step
_GRACE = 5.0  # seconds that a step has to end after SIGTERM
_REHEARSAL_FACTOR = 4  # for the limits of steps, since a CPU is slower
_LEAST = 5.0  # seconds; with less time left, a step is not started


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of the report.

    Attributes:
      name: name in the table.
      limit: time limit in seconds.
      about: short description.
      command: command that runs it, without the arguments of `gpu_steps`. None: the step of this name.
    """

    name: str
    limit: float
    about: str
    command: tuple[str, ...] | None = None


# In order of importance. Limits are for an H100 or H200. The last step uses the remaining time.
STEPS = (
    Step("facts", 60, "device, matrix products, copies"),
    Step("numbers", 150, "golden values, bfloat16, translation, resume"),
    Step("training", 300, "training step of the full network"),
    Step("torch", 150, "the same step in PyTorch"),
    Step("translation", 150, "600 steps of the forward process"),
    Step("blocks", 90, "attention implementations, simplex noise"),
    Step("profile", 90, "the kernels that take longest"),
    Step("reference", 3600, "training of the phantom's reference network"),
)


def gpu_report(
    output: str | Path, seconds: float, *, rehearse: bool = False, steps: Sequence[Step] = STEPS,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Runs the steps one after the other and writes `results.json` and `log.txt`. Steps may write further files.

    Args:
      output: folder, made if absent; earlier results in it are replaced.
      seconds: time limit of all steps together.
      rehearse: use small sizes, on any device.
      say: function that gets progress messages.

    Returns:
      The contents of `results.json`.

    Raises:
      UserError: the folder cannot be used, or the time is too short for any step.
    """
    if seconds < _LEAST:
        raise UserError(f"--seconds {seconds:g}: give at least {_LEAST:g}")
    output = Path(output)
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output}: is a file; give a folder")
    output.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + seconds
    results = {**record(), "seconds": seconds, "rehearsal": rehearse, "machine": {}, "steps": [], "figures": []}
    with tempfile.TemporaryDirectory() as work, (output / LOG).open("w") as log:
        for step in steps:
            say(f"{step.name}: {step.about}")
            done = {"step": step.name, "status": "running", "seconds": 0.0}
            results["steps"].append(done)
            _run(step, output, Path(work), end, rehearse, results, done, log)
            _write(output, results)
            say(f"  {done['status']}, {done['seconds']:.0f} s")
    say(f"\n{table(results)}")
    return results


def table(results: dict[str, Any]) -> str:
    """The metrics as one table, below a line that names the machine."""
    machine = results["machine"]
    head = (f"{machine.get('device', 'unknown device')}, driver {machine.get('driver')}, "
            f"jax {machine.get('versions', {}).get('jax')}" + (" (rehearsal)" if results["rehearsal"] else ""))
    cells = [(f["step"], f["name"], f"{number(f['value'])} {f['unit']}".strip(), _verdict(f))
             for f in results["figures"]]
    cells += [(s["step"], s["status"], "", "") for s in results["steps"] if s["status"] != "finished"]
    return f"{head}\n\n{render(('step', 'metric', 'value', 'goal'), cells)}"


def publish(results: str | Path, folder: str | Path) -> list[Path]:
    """Adds a report to the pages of measured machines: one page per machine and an index, newest first.

    Args:
      results: `results.json` of a report that was no rehearsal.
      folder: of the pages, `docs/benchmarks`; a copy of the results is kept there.

    Returns:
      The pages that were written.

    Raises:
      UserError: the file cannot be read, or holds a rehearsal.
    """
    folder, found = Path(folder), _read(Path(results))
    if found["rehearsal"]:
        raise UserError(f"{results}: is a rehearsal; publish a report that was made without --rehearse")
    name = re.sub(r"\W+", "-", found["machine"]["device"].lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{name}-{found['created'][:10]}.json", found)
    return write_pages(folder)


def write_pages(folder: str | Path) -> list[Path]:
    """Writes the pages from the results in their folder."""
    folder, machines = Path(folder), {}
    for path in sorted(folder.glob("*.json"), key=lambda path: path.stem[-10:], reverse=True):
        machines.setdefault(path.stem[:-11], []).append((path.stem[-10:], _read(path)))
    pages = {f"{name}.md": "\n\n".join([f"# {reports[0][1]['machine']['device']}", *(
        f"## {date}, revision {report['git_revision']}\n\n{table(report)}" for date, report in reports)])
        for name, reports in machines.items()}
    has_gpu = any(report["machine"].get("platform") == "gpu" for reports in machines.values() for _, report in reports)
    pages["README.md"] = "\n\n".join([
        "# Measured machines", "This page lists the machines that were measured. Each link leads to the reports of one "
        "machine.\n`python tools/gpu_report.py --seconds 480 --output results/gpu` measures a machine.\n`python "
        "tools/gpu_report.py --publish results/gpu/results.json` adds its report to this folder.",
        *([] if has_gpu else ["**No GPU has been measured yet.**"]),
        *(f"- [{reports[0][1]['machine']['device']}]({name}.md), {reports[0][0]}"
          for name, reports in machines.items())])
    for page, text in pages.items():
        with written_whole(folder / page) as path:
            path.write_text(text + "\n")
    return [folder / page for page in pages]


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
        _ = found["machine"]["device"], found["figures"], found["steps"], found["rehearsal"], found["created"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: no results of a GPU report ({error}); give the results.json that it wrote") from error
    return found


def _verdict(figure: dict[str, Any]) -> str:
    """The goal of a metric and whether it is reached; empty without a goal."""
    for key, sign, reached in (("at_most", "<=", lambda v, g: v <= g), ("at_least", ">=", lambda v, g: v >= g)):
        if (goal := figure.get(key)) is not None:
            return f"{sign} {goal:g}: {'yes' if reached(figure['value'], goal) else 'NO'}"
    return ""


def _run(step, output, work, end, rehearse, results, done, log) -> None:
    """Runs one step until it ends or exceeds its limit, and collects its metrics meanwhile."""
    allowed = step.limit * (_REHEARSAL_FACTOR if rehearse else 1)
    start, limit = time.monotonic(), min(allowed, end - time.monotonic())
    if limit < _LEAST:
        done["status"] = "not begun, no time left"
        return
    figures = work / f"{step.name}.jsonl"
    command = step.command or (sys.executable, "-m", "hae_jax.benchmark.gpu_steps")
    command = [*command, step.name, "--figures", str(figures), "--earlier", str(output / RESULTS), "--output",
               str(output), "--seconds", f"{limit - _GRACE:.0f}", *(["--rehearse"] if rehearse else [])]
    log.write(f"== {step.name}\n")
    log.flush()
    _write(output, results)
    # Steps share the compilation cache, since the steps "torch" and "profile" use the training step again.
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(work / "compiled"),
                   "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                               start_new_session=True, cwd=Path(__file__).resolve().parents[2], env=environment)
    earlier, before, late = len(results["figures"]), "", False
    try:
        while process.returncode is None and not late:
            late = time.monotonic() - start > limit
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0 if late else _POLL)
            if (text := figures.read_text() if figures.exists() else "") != before:
                results["figures"][earlier:], before = _figures(step.name, text, results), text
                _write(output, results)
    finally:
        _end(process)
    done["seconds"] = round(time.monotonic() - start, 1)
    done["status"] = (f"stopped after {limit:.0f} s" if late else "finished" if process.returncode == 0
                      else f"failed: {_last_line(output / LOG)}")


def _figures(step: str, text: str, results: dict[str, Any]) -> list[dict[str, Any]]:
    """A step's metrics. Facts about the machine are added to `results`. Incomplete lines are ignored."""
    found = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            if "machine" in entry:
                results["machine"] = entry["machine"]
            else:
                found.append({"step": step, **entry})
    return found


def _end(process: subprocess.Popen) -> None:
    """Ends a step and all processes that it has started."""
    for number_ in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number_)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE)
            return


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:200] if lines else "it printed nothing"


def _write(output: Path, results: dict[str, Any]) -> None:
    write_json(output / RESULTS, results)
