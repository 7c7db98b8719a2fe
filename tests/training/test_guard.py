"""One job per folder, signals, and disk space."""

import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from hae_jax.errors import UserError
from hae_jax.training import guard
from hae_jax.training.guard import Guard, RunLock, Stopped, check_workdir

ROOT = Path(__file__).resolve().parents[2]
HOLDER = """
import sys, time
from hae_jax.training.guard import RunLock
with RunLock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_job_is_refused_until_the_first_is_gone_even_by_kill_9(tmp_path):
    workdir = tmp_path / "run"
    with subprocess.Popen([sys.executable, "-c", HOLDER, workdir], cwd=ROOT, stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout.readline() == b"held\n"
            for _ in range(2):  # a refusal changes nothing
                with pytest.raises(UserError, match=rf"process {holder.pid} on host .* is training in this folder"), \
                        RunLock(workdir):
                    pass
        finally:
            holder.kill()
    (workdir / ".123.partial.config.json").touch()
    with RunLock(workdir), pytest.raises(UserError, match=f"process {os.getpid()} on host"), RunLock(workdir):
        pass
    assert [path.name for path in workdir.iterdir()] == [".lock"]
    with RunLock(workdir):
        pass


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_the_first_signal_is_remembered_and_the_second_has_its_usual_effect(number, tmp_path, capsys):
    usual = []

    def run():
        with Guard() as watch:
            assert not watch.stop_requested()
            os.kill(os.getpid(), number)
            assert watch.stop_requested()
            assert usual == []
            os.kill(os.getpid(), number)
            assert usual == ["usual"]
            raise watch.stopped("runs/a", 12)

    before = signal.signal(number, lambda *_: usual.append("usual"))
    try:
        with pytest.raises(Stopped) as stopped:
            run()
        os.kill(os.getpid(), number)
        assert usual == ["usual"] * 2
    finally:
        signal.signal(number, before)
    assert stopped.value.code == 75
    assert capsys.readouterr().err == (
        f"runs/a: stopped by {number.name}, step 12 is saved; the same command resumes from there\n")


def test_outside_the_main_thread_nothing_is_caught():
    found = []

    def work():
        with Guard() as watch:
            found.extend([signal.getsignal(signal.SIGTERM), watch.stop_requested()])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGTERM), False]


def test_a_folder_without_room_or_that_cannot_be_written_is_named_before_the_first_step(tmp_path, monkeypatch):
    check_workdir(tmp_path / "run", 1000, keep=3)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoints"]  # no file of the check remains
    (tmp_path / "file").touch()
    for refused in (lambda folder: check_workdir(folder, 1000, keep=3), lambda folder: RunLock(folder).__enter__()):
        with pytest.raises(UserError, match=r"file/run: cannot be written \(Not a directory: .*another --workdir"):
            refused(tmp_path / "file" / "run")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=3_500_000))
    with pytest.raises(UserError, match=r"run: only 3\.5 MB are free, but 4 more checkpoints of 1 MB are needed"):
        check_workdir(tmp_path / "run", 1_000_000, keep=3)
    (tmp_path / "run" / "checkpoints" / "5").mkdir()  # it will be replaced by another one
    check_workdir(tmp_path / "run", 1_000_000, keep=3)


def test_a_file_system_without_locks_is_said_aloud(tmp_path, monkeypatch, capsys):
    def none(*_):
        raise OSError(guard.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(guard.fcntl, "flock", none)
    with RunLock(tmp_path):
        pass
    assert "its file system has no locks" in capsys.readouterr().err
