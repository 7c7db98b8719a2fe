"""The GPU report: all metrics that this project states about a machine, from one command.

Each step runs in a separate process (`gpu_steps`) with its own time limit. If a step fails or exceeds its limit, the
others run nevertheless. A step writes each metric as soon as it is measured. This process collects the metrics and
rewrites `results.json`. A training step takes minutes to compile for a GPU. So several steps run at the same time, and
a step that measures stops the others meanwhile (`gpu_steps.Report.alone`).
"""

import contextlib
import dataclasses
import fcntl
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hae_jax.benchmark.results import number, render
from hae_jax.errors import UserError
from hae_jax.files import write_json, written_whole
from hae_jax.provenance import cores, record

RESULTS = "results.json"
LOG = "log.txt"  # output of the steps
DEVICE_LOCK = "device.lock"  # held by the step that measures
_POLL = 1.0  # seconds between two checks of a step
_GRACE = 5.0  # seconds that a step has to end after SIGTERM
_REHEARSAL_FACTOR = 4  # for the limits of steps, since a CPU is slower
_LEAST = 5.0  # seconds; with less time left, a step is not started
_BETWEEN_STARTS = 12.0  # seconds, so that fewer steps select the fastest kernels on the GPU at the same time
_CORES = 4  # per step. With fewer, compilations slow each other down, and steps that wait take memory of the GPU.
WAITING, RUNNING = "waiting", "running"
_ABOUT_PAGE = """\
This page has the GPU reports of one machine, the newest first. Each row is one metric of one step of the report.

- `batch 28`: training steps with 28 images. `fits 0` and `fits beside other steps 0`: the program did not fit into the
  memory, which other steps used as well.
- `kernel 1`: the kernel that takes longest, with its share of the time of all kernels of a training step.
- `600 steps, from 60`: time of 600 steps, computed from 60 that were timed.
- goal: the limit for the metric, and whether the metric keeps it."""


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of the report.

    Attributes:
      name: name in the table.
      limit: time limit in seconds.
      about: short description.
      command: command that runs it, without the arguments of `gpu_steps`. None: the step of this name.
      flags: options of XLA for the step.
      alone: whether it runs without other steps: after those before it, and before those after it.
    """

    name: str
    limit: float
    about: str
    command: tuple[str, ...] | None = None
    flags: str = ""
    alone: bool = False


# In order of importance. Limits are for an H100 or H200, where it took up to 360 s until a training step was compiled.
# The last step uses the remaining time.
STEPS = (
    Step("facts", 60, "device, matrix products, copies", alone=True),
    Step("training", 420, "training step of the full network, and the kernels that take longest"),
    Step("compare", 900, "the training step in our forms and in eager PyTorch, in turns"),
    Step("training-xla", 420, "the training step with XLA's attention"),
    Step("training-naive", 420, "the training step in the naive form"),
    Step("translation", 420, "steps of the forward process"),
    Step("numbers", 420, "golden values, bfloat16, translation, resume"),
    Step("blocks", 420, "attention implementations, simplex noise"),
    Step("deterministic", 420, "resume with XLA's deterministic operations", flags="--xla_gpu_deterministic_ops=true"),
    Step("torch-compile", 900, "the training step with torch.compile, in turns with ours"),
    Step("training-112", 420, "the training step with 112 images"),
    Step("translation-112", 420, "steps of the forward process with 112 images"),
    Step("training-224", 420, "the training step with 224 images"),
    Step("training-56", 420, "the training step with 56 images"),
    Step("training-options", 600, "the training step with XLA's own compiler options"),
    Step("reference", 3600, "training of the phantom's reference network", alone=True),
)


def gpu_report(
    output: str | Path, seconds: float, *, rehearse: bool = False, steps: Sequence[Step] = STEPS,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Runs the steps and writes `results.json` and `log.txt`. Steps may write further files.

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
    (output / LOG).unlink(missing_ok=True)
    end = time.monotonic() + seconds
    results = {**record(), "seconds": seconds, "rehearsal": rehearse, "machine": {}, "figures": [],
               "steps": [{"step": step.name, "status": WAITING, "seconds": 0.0} for step in steps]}
    waiting, most = list(zip(steps, results["steps"], strict=True)), max(2, cores() // _CORES)
    running: list[_Running] = []
    with tempfile.TemporaryDirectory() as work, contextlib.ExitStack() as open_steps:
        started = -math.inf
        while waiting or running:
            with _device_is_free(Path(work)) as free:
                if free:
                    for step in running:
                        step.resume()  # it may have been stopped by a step that was ended during its measurement
                    while waiting and _may_start(waiting[0][0], running, most) and (
                            rehearse or not running or time.monotonic() - started >= _BETWEEN_STARTS):
                        step, done = waiting.pop(0)
                        say(f"{step.name}: {step.about}")
                        step = open_steps.enter_context(
                            _Running(step, done, output, Path(work), end, rehearse, results))
                        started = time.monotonic()
                        running.append(step)
            time.sleep(_POLL)
            for step in running:
                step.poll()
                if not step.running:
                    say(f"  {step.done['step']}: {step.done['status']}, {step.done['seconds']:.0f} s")
            running = [step for step in running if step.running]
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
    write_json(folder / f"{name}-{found['created'][:16].replace(':', '')}.json", found)  # "a-gpu-2026-01-31T2359.json"
    return write_pages(folder)


def write_pages(folder: str | Path) -> list[Path]:
    """Writes the pages from the results in their folder."""
    folder, machines = Path(folder), {}
    for path in sorted(folder.glob("*.json"), key=lambda path: path.stem[-15:], reverse=True):
        report = _read(path)
        machines.setdefault(path.stem[:-16], []).append((report["created"][:16].replace("T", " "), report))
    pages = {f"{name}.md": "\n\n".join([f"# {reports[0][1]['machine']['device']}", _ABOUT_PAGE, *(
        f"## {date}, revision {report['git_revision']}\n\n{table(report)}" for date, report in reports)])
        for name, reports in machines.items()}
    has_gpu = any(report["machine"].get("platform") == "gpu" for reports in machines.values() for _, report in reports)
    pages["README.md"] = "\n\n".join([
        "# Measured machines", "This page lists the machines that were measured. Each link leads to the reports of one "
        "machine.\n`python tools/gpu_report.py --seconds 900 --output results/gpu` measures a machine.\n`python "
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


@contextlib.contextmanager
def _device_is_free(work: Path) -> Iterator[bool]:
    """Yields whether no step measures. While it yields True, none begins to."""
    with (work / DEVICE_LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def _may_start(step: Step, running: Sequence["_Running"], most: int) -> bool:
    return not running or (not step.alone and not any(other.alone for other in running) and len(running) < most)


class _Running:
    """A step's process. It is ended when the context is left."""

    def __init__(self, step: Step, done: dict[str, Any], output: Path, work: Path, end: float, rehearse: bool,
                 results: dict[str, Any]):
        self.done, self.alone = done, step.alone
        self.done["status"] = RUNNING
        self._output, self._results = output, results
        self._log, self._figures, self._text = work / f"{step.name}.log", work / f"{step.name}.jsonl", ""
        self._start = time.monotonic()
        self._limit = min(step.limit * (_REHEARSAL_FACTOR if rehearse else 1), end - self._start)
        if self._limit < _LEAST:
            self.done["status"] = "not begun, no time left"
        write_json(output / RESULTS, results)
        if not self.running:
            return
        command = step.command or (sys.executable, "-m", "hae_jax.benchmark.gpu_steps")
        command = [*command, step.name, "--figures", str(self._figures), "--results", str(output / RESULTS),
                   "--output", str(output), "--end", f"{self._start + self._limit - _GRACE}",
                   *(["--rehearse"] if rehearse else [])]
        # Steps share a new compilation cache: "compare" uses the programs that other steps compile.
        environment = {**os.environ, "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {step.flags}".strip(),
                       "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}
        if not rehearse:
            environment["JAX_COMPILATION_CACHE_DIR"] = str(work / "compiled")
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
                cwd=Path(__file__).resolve().parents[2], env=environment)
        self._pid_file = work / f"{step.name}.pid"
        self._pid_file.write_text(str(self._process.pid))

    def __enter__(self) -> "_Running":
        return self

    def __exit__(self, *_: object) -> None:
        if self.running:
            self._end("stopped with the report")

    @property
    def running(self) -> bool:
        """Whether the step is neither finished nor ended."""
        return self.done["status"] == RUNNING

    def resume(self) -> None:
        """Lets the step and its processes run on, if they are stopped."""
        if self.running:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.killpg(self._process.pid, signal.SIGCONT)

    def poll(self) -> None:
        """Collects the metrics so far. Ends the step if it is late."""
        if not self.running:
            return
        code, taken = self._process.poll(), time.monotonic() - self._start
        self.done["seconds"] = round(taken, 1)
        if (text := self._figures.read_text() if self._figures.exists() else "") != self._text:
            self._text = text
            _add_figures(self.done["step"], text, self._results)
            write_json(self._output / RESULTS, self._results)
        if code is not None:
            self._end("finished" if code == 0 else f"failed: {_last_line(self._log)}")
        elif taken > self._limit:
            self._end(f"stopped after {self._limit:.0f} s")

    def _end(self, status: str) -> None:
        """Ends the step and all processes that it has started, and adds its output to the log."""
        self._pid_file.unlink()
        for number_ in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number_)
                os.killpg(self._process.pid, signal.SIGCONT)  # a stopped process does not react to SIGTERM
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_GRACE)
                break
        self.done["status"] = status
        write_json(self._output / RESULTS, self._results)
        with (self._output / LOG).open("a") as log:
            log.write(f"== {self.done['step']}\n{self._log.read_text(errors='replace')}")


def _add_figures(step: str, text: str, results: dict[str, Any]) -> None:
    """Replaces a step's metrics, and adds facts about the machine. Incomplete lines are ignored."""
    found = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            if "machine" in entry:
                results["machine"] = entry["machine"]
            else:
                found.append({"step": step, **entry})
    order = [done["step"] for done in results["steps"]]
    others = [figure for figure in results["figures"] if figure["step"] != step]
    results["figures"] = sorted(others + found, key=lambda figure: order.index(figure["step"]))


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:200] if lines else "it printed nothing"
