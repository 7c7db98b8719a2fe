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

_SCRIPT = """
import os, signal, sys
from pathlib import Path
import numpy as np
from hae_jax.data.batches import train_batches
from hae_jax.data.slices import CaseSlices
from hae_jax.data.store import StoreWriter, open_store
from hae_jax.processes import in_order

def batches(folder):
    writer, zeros = StoreWriter(folder), np.zeros((9, 4, 4, 1), np.float32)
    writer.add("a", "train", CaseSlices(zeros, zeros[..., 0], np.arange(9, dtype=np.int32), None), None)
    writer.finish({})
    return train_batches(open_store(folder).split("train"), batch_size=2, seed=0, workers=2)

if __name__ == "__main__":
    for _ in PARALLEL:
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_order(workers):
    assert list(in_order(abs, range(-7, 0), workers)) == [7, 6, 5, 4, 3, 2, 1]


def test_a_killed_worker_is_an_error():
    with pytest.raises(UserError, match="one of 2 worker processes was killed"):
        list(in_order(os._exit, [1, 1], 2))


@pytest.mark.parametrize("parallel", ["in_order(int, ['0', '1'], 2)", "batches(Path(sys.argv[1]))"])
def test_workers_end_with_a_killed_parent(tmp_path, parallel):
    script = tmp_path / "parent.py"
    script.write_text(_SCRIPT.replace("PARALLEL", parallel))
    reader, writer = os.pipe()  # the workers inherit the end for writing as their output
    killed = subprocess.run([sys.executable, script, tmp_path / "store"], stdout=writer,
                            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])})
    os.close(writer)
    assert killed.returncode == -signal.SIGKILL
    ended, _, _ = select.select([reader], [], [], 60)  # readable when no process holds the other end
    assert ended
    assert os.read(reader, 1) == b""
    os.close(reader)
