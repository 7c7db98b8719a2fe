"""Files and folders appear whole or not at all."""

import fcntl
import json

import pytest

from hae_jax.files import folder_written_whole, one_at_a_time, write_json, written_whole


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
