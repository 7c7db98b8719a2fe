"""Independence of the environment: other git repositories, proxies, backends, foreign folders."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import hae_jax
from hae_jax import provenance
from hae_jax.commands.common import entry_point
from hae_jax.commands.runs import newest_run
from hae_jax.data import layouts
from hae_jax.data.layout_rules import CaseFiles
from hae_jax.errors import UserError
from hae_jax.training import hosts

PACKAGE = Path(hae_jax.__file__).parent


def git(folder, *arguments):
    subprocess.run(["git", "-C", folder, "-c", "user.email=a@b.c", "-c", "user.name=a", *arguments], check=True,
                   capture_output=True, env={name: value for name, value in os.environ.items() if name[:4] != "GIT_"})


@pytest.mark.parametrize("place", [".venv/site", "."])
def test_another_repository_is_not_taken_for_this_program_s(tmp_path, place):
    package = tmp_path / place / "hae_jax"
    package.mkdir(parents=True)
    for name in ("__init__.py", "provenance.py"):
        shutil.copy(PACKAGE / name, package)
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "theirs"\n')
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "theirs")
    code = "from hae_jax import provenance as p; print(p.git_revision(), p.versions()['hae-jax'])"
    said = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": package.parent},
                          capture_output=True, text=True, check=True).stdout.split()
    assert said == ["None", hae_jax.__version__]


def test_a_hook_s_variables_name_no_other_revision(monkeypatch, tmp_path):
    own = provenance.git_revision()
    git(tmp_path, "init", "-q")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(tmp_path))
    provenance.git_revision.cache_clear()
    assert provenance.git_revision() == own


def test_processes_find_each_other_without_proxies(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    seen = []
    monkeypatch.setattr(hosts.jax.distributed, "initialize", lambda **_: seen.extend(
        name for name in os.environ if name.lower().endswith("_proxy") and name.lower() != "no_proxy"))
    hosts._initialize({"coordinator_address": "localhost:1", "num_processes": 2, "process_id": 0}, timeout=60)
    assert seen == []
    assert os.environ["http_proxy"] == os.environ["HTTPS_PROXY"] == "http://127.0.0.1:9"


def test_devices_that_jax_lacks_are_one_line(monkeypatch, capsys):
    def main(argv):
        exec(compile("raise RuntimeError('Unable to initialize backend')", "jax/_src/xla_bridge.py", "exec"))

    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    with pytest.raises(SystemExit) as stop:
        entry_point(main)([])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "JAX_PLATFORMS is 'cuda': unset it" in line
    assert os.environ["MPLBACKEND"] == "Agg"
    with pytest.raises(RuntimeError):  # that of another program stays
        entry_point(lambda argv: (_ for _ in ()).throw(RuntimeError("ours")))([])


def failing(error):
    """A command that fails with `error`."""

    def main(argv):
        raise error

    return entry_point(main)


@pytest.mark.parametrize(("error", "says"), [
    (OSError(errno.ENOTDIR, "Not a directory", "a/b"), "a/b: Not a directory; something else is there"),
    (OSError(errno.EISDIR, "Is a directory", "a.tmp", None, "a"), "a: Is a directory; something else is there"),
    (OSError(errno.ENOTCONN, "Transport endpoint is not connected", "a"), "a: Transport endpoint .*; check its perm"),
    (OSError(errno.EFBIG, "File too large", "a"), "a: File too large"),
    (OSError(errno.ENOSPC, "No space left on device", "a"), "a: No space left on device; .* make space"),
    (FileNotFoundError(errno.ENOENT, "No such file or directory"), "the current folder no longer exists"),
    (MemoryError("Unable to allocate 1 TiB"), r"there is not enough memory \(Unable to allocate 1 TiB\)"),
    (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nallocating"),
     r"the device does not have enough memory \(RESOURCE_EXHAUSTED: Out of memory\); lower the batch size"),
])
def test_what_the_environment_refuses_is_one_line(error, says, capsys):
    with pytest.raises(SystemExit) as stop:
        failing(error)([])
    assert stop.value.code == 2
    assert re.fullmatch(rf"error: {says}.*\n", capsys.readouterr().err)


@pytest.mark.parametrize("error", [
    FileNotFoundError(errno.ENOENT, "No such file or directory", "a"), BrokenPipeError(), KeyError(1)])
def test_other_errors_are_bugs_and_keep_their_traceback(error, monkeypatch, tmp_path):
    with (tmp_path / "out").open("w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with pytest.raises(type(error)):
            failing(error)([])


def test_closed_standard_streams_stop_nothing(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    done = []
    entry_point(lambda argv: (print("a"), print("b", file=sys.stderr), done.append(argv)))(["c"])
    assert done == [["c"]]


def test_output_that_nobody_reads_any_more_ends_a_command(monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with pytest.raises(SystemExit) as stop:
            entry_point(lambda argv: print("a"))([])
    assert stop.value.code == 141
    assert capsys.readouterr().err == "stopped: the program that reads this output has ended\n"


@pytest.mark.parametrize("config", ["{}", "[]", "null", '{"data": 3}', '{"data": {"root": []}}', "{", "\udcff"])
def test_foreign_folders_in_runs_are_passed_over(tmp_path, config):
    for name, text in (("theirs", config), ("ours", json.dumps({"data": {"root": "data/a"}}))):
        (tmp_path / name / "checkpoints" / "5").mkdir(parents=True)
        (tmp_path / name / "config.json").write_text(text, errors="surrogateescape")
    assert newest_run("a.py", "data/a", tmp_path) == tmp_path / "ours"
    with pytest.raises(UserError, match="no checkpoint that was trained on data/b"):
        newest_run("a.py", "data/b", tmp_path)


def test_a_locale_that_cannot_read_a_name_is_named(monkeypatch):
    monkeypatch.setattr(layouts.sys, "getfilesystemencoding", lambda: "iso8859-1")
    assert "set PYTHONUTF8=1" in layouts._encodable(CaseFiles("M\udcfcller", (), None)).problem


@pytest.mark.parametrize(("name", "shown", "says"), [
    ("a\nb\x7f", "a?b?", "its name has a line break or another control character"),
    ("ä" * 120, "ä" * 50, "its name has 240 bytes, and results are named after it; rename it, 200 are allowed"),
])
def test_a_name_that_no_results_can_have_is_a_problem(name, shown, says):
    case = layouts._encodable(CaseFiles(name, (), None))
    assert case.name == shown
    assert case.problem.startswith(shown)
    assert says in case.problem
