"""Work in several processes."""

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hae_jax.errors import UserError
from hae_jax.processes import in_order

_PARENT = """
import os, signal
from hae_jax.processes import in_order

if __name__ == "__main__":
    for _ in in_order(int, ["0", "1"], 2):
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_order(workers):
    assert list(in_order(abs, range(-7, 0), workers)) == [7, 6, 5, 4, 3, 2, 1]


def test_a_killed_worker_is_an_error():
    with pytest.raises(UserError, match="one of 2 worker processes was killed"):
        list(in_order(os._exit, [1, 1], 2))


def test_workers_end_with_a_killed_parent(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(_PARENT)
    reader, writer = os.pipe()  # the workers inherit the end for writing as their output
    parent = subprocess.run([sys.executable, script], stdout=writer,
                            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])})
    os.close(writer)
    assert parent.returncode == -signal.SIGKILL
    ended, _, _ = select.select([reader], [], [], 60)  # readable when no process holds the other end
    assert ended
    assert os.read(reader, 1) == b""
    os.close(reader)
