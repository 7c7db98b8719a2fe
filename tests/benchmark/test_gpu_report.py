"""The GPU report: a rehearsal with small sizes, steps that fail or hang, and publishing."""

import contextlib
import dataclasses
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import jax
import pytest

from hae_jax.benchmark import gpu_report as module
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
    # On a CPU, these run the code of training, translation, compare and numbers, which stay.
    without = ("training-56", "training-112", "training-224", "training-xla", "training-options", "translation-112",
               "torch-compile", "deterministic")
    steps = [step for step in STEPS if step.name not in without]
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


def test_steps_run_at_the_same_time_except_those_that_run_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_BETWEEN_STARTS", 0.0)
    meets = _WRITES + """
mine = path + ".here"
other = path.replace("one.jsonl", "two.jsonl.here") if "one" in path else path.replace("two.jsonl", "one.jsonl.here")
open(mine, "w").close()
while not __import__("os").path.exists(other):
    time.sleep(0.1)
"""
    others = "import glob, os; assert len(glob.glob(os.path.join(os.path.dirname(path), '*.pid'))) == 1"
    results = gpu_report(tmp_path, 60, steps=[
        step("one", meets, limit=30), step("two", meets, limit=30),
        dataclasses.replace(step("flags", _WRITES + others + "; assert '--new' in os.environ['XLA_FLAGS']"),
                            flags="--new", alone=True),
        step("last", _WRITES + others)])
    assert [s["status"] for s in results["steps"]] == ["finished"] * 4
    assert [figure["step"] for figure in results["figures"]] == ["one", "two", "flags", "last"]


_MEASURES = """\
import sys, time; from pathlib import Path
from hae_jax.benchmark.gpu_steps import Report
figures = Path(sys.argv[sys.argv.index("--figures") + 1])
report = Report(figures, figures, figures.parent, 0, True)
"""


def test_a_step_that_measures_stops_the_others(tmp_path, monkeypatch):
    """The other step counts its turns. It also waits for a turn to measure."""
    monkeypatch.setattr(module, "_BETWEEN_STARTS", 0.0)
    counts = f"""{_MEASURES}
count = 0
while not figures.with_name("done").exists():
    count += 1
    figures.with_name("count").write_text(str(count))
    time.sleep(0.01)
with report.alone():
    report.add("count", count)"""
    measures = f"""{_MEASURES}
count = figures.with_name("count")
while not count.exists():
    time.sleep(0.01)
with report.alone():
    before = count.read_text()
    time.sleep(1)
    report.add("stopped", count.read_text() == before)
end = time.monotonic() + 30
while count.read_text() == before and time.monotonic() < end:
    time.sleep(0.01)
report.add("goes on", count.read_text() != before)
figures.with_name("done").touch()"""
    results = gpu_report(tmp_path, 60, steps=[step("counts", counts), step("measures", measures)])
    assert [s["status"] for s in results["steps"]] == ["finished"] * 2
    assert {figure["name"]: bool(figure["value"]) for figure in results["figures"]} == {
        "count": True, "stopped": True, "goes on": True}


def test_others_go_on_after_a_step_that_ended_while_it_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_BETWEEN_STARTS", 0.0)
    dies = f"""{_MEASURES}
with report.alone():
    report.add("measures", 1)
    figures.with_name("died").touch()
    __import__("os").kill(__import__("os").getpid(), 9)"""
    goes_on = f"""{_MEASURES}
while not figures.with_name("died").exists():
    time.sleep(0.01)"""
    results = gpu_report(tmp_path, 90, steps=[step("goes on", goes_on), step("dies", dies)])
    assert [s["status"] for s in results["steps"]] == ["finished", "failed: it printed nothing"]
    assert [figure["name"] for figure in results["figures"]] == ["measures"]


def test_a_step_waits_for_another_one(tmp_path):
    report = Report(tmp_path / "b.jsonl", tmp_path / "results.json", tmp_path, time.monotonic() + 60, True)
    steps = [{"step": "a", "status": "running"}, {"step": "b", "status": "running"}]
    report.results.write_text(json.dumps({"steps": steps, "figures": [{"step": "a", "name": "n", "value": 2}]}))
    assert report.steps_before() == ["a"]
    assert report.found("a", "n") == 2
    assert report.found("a", "other") is None
    report.wait_for("c")  # no part of the report
    ended = threading.Event()

    def end():
        ended.set()
        report.results.write_text(json.dumps({"steps": [{"step": "a", "status": "finished"}], "figures": []}))

    threading.Timer(0.5, end).start()
    report.wait_for("a", "c")
    assert ended.is_set()


@pytest.mark.parametrize("name", ["training", "training-naive", "translation"])
def test_steps_compile_beside_each_other_and_measure_alone(name, tmp_path, monkeypatch):
    inside, seen = [], []

    @contextlib.contextmanager
    def alone(self):
        inside.append("alone")
        yield
        inside.remove("alone")

    monkeypatch.setattr(Report, "alone", alone)
    monkeypatch.setattr(Report, "found", lambda *_: None)
    monkeypatch.setattr(gpu_steps, "compile_program", lambda *_: seen.append(("compile", *inside)) or _Program())
    for program in (gpu_steps.TrainingStep, gpu_steps.TranslationOfBatch):
        monkeypatch.setattr(program, "place", lambda self: seen.append(("place", *inside)))
        monkeypatch.setattr(program, "call", lambda self, _: seen.append(("call", *inside)))
    monkeypatch.setattr(gpu_steps, "longest_kernels", lambda call, keep: call() or [])
    gpu_steps._STEPS[name](Report(tmp_path / f"{name}.jsonl", tmp_path, tmp_path, time.monotonic() + 60, True))
    assert set(seen) == {("compile",), ("place", "alone"), ("call", "alone")}


def test_a_program_that_does_not_fit_is_tried_again_after_the_steps_before(tmp_path, monkeypatch):
    waited, tried = [], []

    def peak(*_):
        tried.append(len(waited))
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(gpu_steps, "compile_program", lambda *_: _Program())
    monkeypatch.setattr(gpu_steps, "_peak", peak)
    monkeypatch.setattr(gpu_steps.TrainingStep, "place", lambda self: None)
    monkeypatch.setattr(Report, "wait_for", lambda self, *names: waited.append(names))
    results, figures = tmp_path / "results.json", tmp_path / "training-112.jsonl"
    names = "training", "compare", "training-112", "blocks"
    results.write_text(json.dumps({"steps": [{"step": name} for name in names], "figures": []}))
    gpu_steps._STEPS["training-112"](Report(figures, results, tmp_path, time.monotonic() + 60, True))
    assert waited == [("training",)]
    assert tried == [0, 1]
    assert json.loads(figures.read_text().splitlines()[-1])["name"] == "batch 2, fits beside other steps"


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
