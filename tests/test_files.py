"""Files and folders appear whole or not at all."""

import errno
import fcntl
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from hae_jax.errors import UserError
from hae_jax.files import (
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


def test_json_refuses_not_a_number(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []
    write_json(tmp_path / "a.json", {"loss": None})
    assert json.loads((tmp_path / "a.json").read_text()) == {"loss": None}


def test_who_waited_and_who_comes_later_are_not_inside_together(tmp_path):
    lock, waited = tmp_path / ".lock", []
    with one_at_a_time(lock, pytest.fail):
        waiter = lock.open("a")  # has the file, and will get the lock on it
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
    (b"", "is empty"), (b"{\n 3}", r"is not JSON \(line 2, column 2: "), (b"[NaN]", r"is not JSON .NaN is no number"),
    (b"[" * 100_000, "is nested too deeply"), (b"9" * 5000, "is not JSON"), (b"\xff\xfe\x00", "is not JSON")])
def test_json_that_cannot_be_read_is_one_line(tmp_path, content, says):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.json: {says}"):
        read_json(tmp_path / "a.json")
    with pytest.raises(UserError, match=r"b\.json: cannot be read \(No such file"):
        read_json(tmp_path / "b.json")
