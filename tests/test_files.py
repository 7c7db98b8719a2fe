"""Files and folders are written completely or not at all."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from hae_jax.errors import UserError
from hae_jax.files import (
    finish_replacing,
    folder_written_whole,
    full_places,
    one_at_a_time,
    read_json,
    remove_leftovers,
    write_json,
    written_whole,
)

KILLED = """
import os, signal, sys
from hae_jax.files import folder_written_whole, written_whole
with written_whole(sys.argv[1] + "/a.txt") as file, folder_written_whole(sys.argv[1] + "/b") as folder:
    file.write_text("half")
    (folder / "c").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""

KILLED_WHILE_REPLACING = """
import os, shutil, signal, sys
from hae_jax.files import folder_written_whole
left, replace = int(sys.argv[2]), os.replace
def step(do):
    def wrapped(*arguments):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        do(*arguments)
    return wrapped
os.replace, shutil.rmtree = step(os.replace), step(shutil.rmtree)
with folder_written_whole(sys.argv[1], replace=True) as folder:
    (folder / "new").touch()
"""


def test_a_file_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "new" / "volume.nii.gz"
    with written_whole(path) as temporary:
        assert temporary.name.endswith(".nii.gz")
        temporary.write_text("x")
        assert not path.exists()
    assert [p.name for p in path.parent.iterdir()] == ["volume.nii.gz"]


def test_an_error_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(RuntimeError), written_whole(path) as temporary:  # noqa: PT012
        temporary.write_text("new")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_appears_when_it_is_complete(tmp_path):
    with folder_written_whole(tmp_path / "store") as temporary:
        (temporary / "a").write_text("x")
        assert not (tmp_path / "store").exists()
    assert (tmp_path / "store" / "a").read_text() == "x"


def test_a_folder_with_something_in_it_is_not_replaced(tmp_path):
    (tmp_path / "a").write_text("x")
    with pytest.raises(FileExistsError), folder_written_whole(tmp_path):
        pass
    assert (tmp_path / "a").read_text() == "x"


@pytest.mark.parametrize(("steps", "back", "kept"), [(0, False, "old"), (1, True, "old"), (2, False, "new"),
                                                     (3, False, "new"), (4, False, "new")])
def test_a_folder_is_whole_wherever_its_replacement_is_killed(tmp_path, steps, back, kept):
    """After 1 step, neither folder is in place, and the old one is restored."""
    store = tmp_path / "real"
    store.mkdir()
    (store / "old").touch()
    (tmp_path / "store").symlink_to("real")  # the folder is replaced, not the link
    done = subprocess.run([sys.executable, "-c", KILLED_WHILE_REPLACING, tmp_path / "store", str(steps)],
                          cwd=Path(__file__).parents[1], check=False)
    assert done.returncode == (0 if steps == 4 else -signal.SIGKILL)
    assert store.exists() == (steps != 1)
    assert finish_replacing(tmp_path / "store") == back
    assert [path.name for path in store.iterdir()] == [kept]
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["real", "store"]


def test_a_folder_that_cannot_be_put_in_place_leaves_the_old_one(tmp_path, monkeypatch):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "old").touch()
    replace, calls = os.replace, []

    def refused(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refused)
    with pytest.raises(OSError, match="Input/output"), folder_written_whole(tmp_path / "store", replace=True):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["old"]


def test_what_somebody_replaces_now_is_left_alone(tmp_path):
    old = tmp_path / ".7-a.replaced.store"
    old.mkdir()
    descriptor = os.open(old, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert not finish_replacing(tmp_path / "store")
    assert old.exists()
    os.close(descriptor)
    assert finish_replacing(tmp_path / "store")


def test_a_mount_point_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: True)
    with pytest.raises(UserError, match=r"store: is a mount point.*give a folder below it"), \
            folder_written_whole(tmp_path / "store"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_json_refuses_not_a_number(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []
    write_json(tmp_path / "a.json", {"loss": None})
    assert json.loads((tmp_path / "a.json").read_text()) == {"loss": None}


def test_who_waited_and_who_comes_later_are_not_inside_together(tmp_path):
    lock, waited = tmp_path / ".lock", []
    with one_at_a_time(lock, pytest.fail):
        waiter = lock.open("a")  # has opened the file and will get the lock
    fcntl.flock(waiter, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with one_at_a_time(lock, lambda: waited.append(True) or waiter.close()):
        assert waited


def test_what_a_killed_writer_left_goes_and_what_another_writes_stays(tmp_path):
    subprocess.run([sys.executable, "-c", KILLED, tmp_path], cwd=Path(__file__).parents[1], check=False)
    assert len(list(tmp_path.iterdir())) == 2
    with written_whole(tmp_path / "a.txt") as file, folder_written_whole(tmp_path / "b") as folder:
        file.write_text("whole")
        remove_leftovers(tmp_path)
        assert sorted(tmp_path.iterdir()) == sorted([file, folder])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "b"]


def test_an_error_of_the_disk_names_the_file(tmp_path):
    with pytest.raises(OSError, match="No space") as error, written_whole(tmp_path / "a.txt"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert error.value.filename == str(tmp_path / "a.txt")


def test_places_without_room_are_named(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=0 if place == "/dev/shm" else 2**30))
    assert full_places() in ([], ["/dev/shm"])
    assert bool(full_places()) == Path("/dev/shm").is_dir()


@pytest.mark.parametrize(("content", "says"), [
    (b"", "is empty"), (b"{\n 3}", r"is not JSON \(line 2, column 2: "),
    (b"[NaN]", r"is not JSON .NaN is not a JSON number"), (b"[" * 100_000, "is nested too deeply"),
    (b"9" * 5000, "is not JSON"), (b"\xff\xfe\x00", "is not JSON")])
def test_json_that_cannot_be_read_is_one_line(tmp_path, content, says):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.json: {says}"):
        read_json(tmp_path / "a.json")
    with pytest.raises(UserError, match=r"b\.json: cannot be read \(No such file"):
        read_json(tmp_path / "b.json")
