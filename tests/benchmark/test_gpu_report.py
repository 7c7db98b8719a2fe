"""The GPU report: a rehearsal with small sizes, steps that fail or hang, and publishing."""

import contextlib
import dataclasses
import functools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import pytest

from hae_jax.benchmark import gpu_steps
from hae_jax.benchmark.gpu_report import STEPS, Step, gpu_report, publish, write_pages
from hae_jax.benchmark.gpu_steps import Report
from hae_jax.benchmark.measure import Compiled
from hae_jax.commands.gpu_report import main
from hae_jax.errors import UserError

_WRITES = """\
import json, sys, time
path = sys.argv[sys.argv.index("--figures") + 1]
with open(path, "a") as file:
    file.write(json.dumps({"machine": {"device": "a GPU", "platform": "gpu", "driver": "1.0", "versions": {}}}) + "\\n")
    file.write(json.dumps({"name": "speed", "value": 3.0, "unit": "m/s", "at_least": 4}) + "\\n")
"""


def step(name: str, code: str, limit: float = 60) -> Step:
    return Step(name, limit, "", (sys.executable, "-c", code))


def test_the_rehearsal_has_finite_figures_from_every_step(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    # Steps are separate processes, and several of them compile the same program.
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir)
    steps = [step for step in STEPS if step.name not in ("training-56", "training-224")]  # as training-112, which stays
    results = gpu_report(tmp_path / "report", 1800, rehearse=True, steps=steps)
    assert json.loads((tmp_path / "report" / "results.json").read_text()) == results
    assert [(s["step"], s["status"]) for s in results["steps"]] == [(s.name, "finished") for s in steps]
    assert {figure["step"] for figure in results["figures"]} == {s.name for s in steps}
    assert all(math.isfinite(figure["value"]) for figure in results["figures"])
    for figure in results["figures"]:  # goals that every machine must reach
        if figure["step"] == "numbers":
            assert figure["value"] <= figure.get("at_most", math.inf), figure
            assert figure["value"] >= figure.get("at_least", -math.inf), figure
    files = {path.name for path in (tmp_path / "report").iterdir()}
    assert files == {"results.json", "log.txt", "profile.xplane.pb.gz", "model.safetensors", "config.json",
                     "metrics.jsonl", "samples.png"}
    assert results["machine"]["versions"]["jax"]
    with pytest.raises(UserError, match="rehearsal"):
        publish(tmp_path / "report" / "results.json", tmp_path / "docs")


def test_a_step_that_fails_or_hangs_does_not_stop_the_others(tmp_path):
    said = []
    results = gpu_report(tmp_path, 60, say=said.append, steps=[
        step("fails", _WRITES + "raise ValueError('broken')"),
        step("hangs", _WRITES + "file.close(); time.sleep(60)", limit=5.5),
        step("works", _WRITES)])
    assert [s["status"] for s in results["steps"]] == ["failed: ValueError: broken", "stopped after 6 s", "finished"]
    assert [figure["step"] for figure in results["figures"]] == ["fails", "hangs", "works"]
    assert "m/s" in said[-1]
    assert "NO" in said[-1]
    assert "failed: ValueError: broken" in said[-1]


def test_steps_of_a_group_run_at_the_same_time(tmp_path):
    meets = _WRITES + """
mine = path + ".here"
other = path.replace("one.jsonl", "two.jsonl.here") if "one" in path else path.replace("two.jsonl", "one.jsonl.here")
open(mine, "w").close()
while not __import__("os").path.exists(other):
    time.sleep(0.1)
"""
    results = gpu_report(tmp_path, 60, steps=[
        dataclasses.replace(step("one", meets, limit=30), group="a"),
        dataclasses.replace(step("two", meets, limit=30), group="a"),
        dataclasses.replace(step("flags", "import os; assert '--new' in os.environ['XLA_FLAGS']"), flags="--new")])
    assert [s["status"] for s in results["steps"]] == ["finished"] * 3
    assert [figure["step"] for figure in results["figures"]] == ["one", "two"]


def test_a_compilation_that_takes_too_long_is_named(tmp_path):
    results = gpu_report(tmp_path, 60, steps=[step("late", "import signal, time; signal.alarm(1); time.sleep(60)")])
    assert [s["status"] for s in results["steps"]] == ["stopped, its compilation took too long"]


@pytest.mark.parametrize(("held", "waits"), [("beside()", True), ("first(2)", True), ("first(1)", False)])
def test_measurements_wait_for_compilations_and_for_the_first_step(held, waits, tmp_path):
    """Another process holds a lock, exclusively (2) or not (1), until it is killed."""
    code = f"""import time; from pathlib import Path
from hae_jax.benchmark.gpu_steps import Report
with Report(Path({str(tmp_path / "other.jsonl")!r}), [], Path(), 0, True).{held}:
    print("holds", flush=True); time.sleep(60)"""
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    report = Report(tmp_path / "figures.jsonl", [], tmp_path, time.monotonic() + 60, True)
    assert other.stdout.readline() == "holds\n"
    with report.beside():  # two that do not measure go on
        assert other.poll() is None
    killed = threading.Event()
    end = threading.Timer(1.0 if waits else 50.0, lambda: (killed.set(), other.kill()))
    end.start()
    with report.alone():
        assert killed.is_set() == waits
    end.cancel()
    other.kill()
    other.wait()


@pytest.mark.parametrize("name", ["training", "training-naive", "translation"])
def test_steps_compile_beside_each_other_and_measure_alone(name, tmp_path, monkeypatch):
    monkeypatch.setattr(signal, "alarm", lambda seconds: None)
    inside, seen = [], []

    @contextlib.contextmanager
    def context(self, kind):
        inside.append(kind)
        yield
        inside.remove(kind)

    for kind in ("beside", "alone"):
        monkeypatch.setattr(Report, kind, functools.partialmethod(context, kind))
    monkeypatch.setattr(gpu_steps, "compile_program", lambda *_: seen.append(("compile", *inside)) or _Program())
    for program in (gpu_steps.TrainingStep, gpu_steps.TranslationOfBatch):
        monkeypatch.setattr(program, "place", lambda self: seen.append(("place", *inside)))
        monkeypatch.setattr(program, "call", lambda self, _: seen.append(("call", *inside)))
    monkeypatch.setattr(gpu_steps, "longest_kernels", lambda call, keep: call() or [])
    gpu_steps._STEPS[name](Report(tmp_path / f"{name}.jsonl", [], tmp_path, time.monotonic() + 60, True))
    assert set(seen) == {("compile", "beside"), ("place", "beside"), ("call", "alone")}


class _Program(Compiled):
    """A compiled program that does nothing."""

    def __new__(cls):
        return super().__new__(cls, None, 1.0, 1, 1)


def test_a_terminated_report_ends_its_step(tmp_path):
    """As the command, the test lets SIGTERM act as Ctrl-C."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    code = f"""import os, signal, time
with open({str(tmp_path / "pid")!r}, "w") as file:
    file.write(str(os.getpid()))
os.kill(os.getppid(), signal.SIGTERM)
time.sleep(60)"""
    try:
        with pytest.raises(KeyboardInterrupt):
            gpu_report(tmp_path / "report", 60, steps=[step("terminates", code)])
    finally:
        signal.signal(signal.SIGTERM, before)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_steps_that_no_time_is_left_for_are_named(tmp_path):
    results = gpu_report(tmp_path, 6, steps=[step("sleeps", "import time; time.sleep(3)"), step("late", _WRITES)])
    assert [s["status"] for s in results["steps"]] == ["finished", "not begun, no time left"]


def test_reports_are_published_a_page_for_each_machine_newest_first(tmp_path):
    write_pages(tmp_path / "docs")
    assert (tmp_path / "docs" / "README.md").read_text().endswith("**No GPU has been measured yet.**\n")
    results = gpu_report(tmp_path / "report", 60, steps=[step("works", _WRITES)])
    for date in ("2026-01-02", "2026-03-04"):
        (tmp_path / "results.json").write_text(json.dumps(results | {"created": f"{date}T00:00:00"}))
        publish(tmp_path / "results.json", tmp_path / "docs")
    page = (tmp_path / "docs" / "a-gpu.md").read_text()
    assert 0 < page.index("2026-03-04") < page.index("2026-01-02")
    assert (tmp_path / "docs" / "README.md").read_text().startswith("# Measured machines")
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(UserError, match="no results of a GPU report"):
        publish(tmp_path / "results.json", tmp_path / "docs")


def test_the_pages_in_the_docs_are_those_of_the_results_beside_them(tmp_path):
    docs = Path(__file__).parents[2] / "docs" / "benchmarks"
    shutil.copytree(docs, tmp_path / "docs")
    pages = {path.name: path.read_text() for path in write_pages(tmp_path / "docs")}
    assert pages == {path.name: path.read_text() for path in docs.glob("*.md")}


def test_requirements_are_those_that_a_machine_with_jax_lacks(capsys, tmp_path):
    main(["--requirements"])
    names = {line.partition("==")[0] for line in capsys.readouterr().out.split()}
    assert {"grain", "array_record", "nibabel", "nilearn", "ml_collections", "tensorboardX"} <= names
    assert not {"jax", "jaxlib", "flax", "numpy", "scipy", "matplotlib"} & names
    for name in names:
        (tmp_path / f"{name.replace('-', '_')}-1-py3-none-any.whl").write_bytes(b"0" * 2**20)
    main(["--requirements", str(tmp_path)])
    assert f"# {len(names)} wheels, {len(names)}.0 MiB" in capsys.readouterr().out
    (tmp_path / "grain-1-py3-none-any.whl").unlink()
    with pytest.raises(SystemExit):
        main(["--requirements", str(tmp_path)])


@pytest.mark.parametrize("arguments", [
    ["--seconds", "1", "--output", "x"], ["--steps", "nothing", "--output", "x"], []])
def test_mistakes_are_one_line(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "x").exists()
