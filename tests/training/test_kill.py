"""Real processes that are killed at any moment, or asked to stop: run again, they give the run that nobody disturbed."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest

from hae_jax.data.slices import CaseSlices
from hae_jax.data.store import StoreWriter

ROOT = Path(__file__).resolve().parents[2]
STEPS, LOG_EVERY, SAVE_EVERY = 70, 3, 5
# What is waited for, then seconds until the kill: nothing (it builds and restores), a line of the log, the n-th save.
KILLS = [("begins", None), ("save", 1), ("line", 0.4), ("save", 2), ("line", 0.6), ("save", 1), ("line", 0.2),
         ("save", 2), ("line", 0.8), ("save", 1)]
SCRIPT = f"""
import sys
from configs import default
from hae_jax.training import log, loop

write = log.RunLog.write

def announced(*args, **kwargs):
    write(*args, **kwargs)
    print("line", flush=True)

log.RunLog.write = announced
config = default.get_config()
config.data.root = sys.argv[1]
config.model.update(dict(variant="fpdm", image_size=8, model_channels=32, num_res_blocks=1, channel_mult=(1,),
                         attention_resolutions=(), dropout=0.0))
config.training.update(dict(batch_size=2, steps={STEPS}, log_every={LOG_EVERY}, save_every={SAVE_EVERY}, sample_every=0,
                            ema_rates=(0.9,), learning_rate=1e-3))
if len(sys.stdin.readline()) > 1:
    print("begins", flush=True)
    loop.train(config, sys.argv[2])
"""


class Worker:
    """A process that has imported everything (which takes longest) and trains when it is told to."""

    def __init__(self, store, workdir):
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "PYTHONPATH": str(ROOT)}
        self.workdir = workdir
        self.process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, store, workdir], env=environment, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self._error = []
        self._reader = threading.Thread(target=lambda: self._error.append(self.process.stderr.read()), daemon=True)
        self._reader.start()

    def begin(self):
        self._tell("train\n")
        self.wait_for("begins")

    def dismiss(self):
        """Ends a worker that has not begun."""
        self._tell("\n")
        self.end()

    def wait_for(self, word):
        """Returns when the process has said this."""
        if not any(line == f"{word}\n" for line in self.process.stdout):
            raise AssertionError(f"ended before {word!r}: {self.end()}")

    def wait_for_save(self, number):
        """Returns while the `number`-th save from now is under way."""
        seen = set()
        while len(seen) < number:
            assert self.process.poll() is None, self.end()
            seen.update(half_written(self.workdir))
            time.sleep(0.001)

    def end(self):
        """Waits for the end and returns the exit status and what went to stderr."""
        self.process.stdout.read()
        self._reader.join()
        return self.process.wait(), self._error[0]

    def _tell(self, line):
        self.process.stdin.write(line)
        self.process.stdin.close()


class Workers:
    """Workers for one folder, one after the other; the next one always gets ready meanwhile."""

    def __init__(self, store, workdir):
        self._make = lambda: Worker(store, workdir)
        self._next = self._make()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._next.dismiss()

    def begin(self):
        worker, self._next = self._next, self._make()
        worker.begin()
        return worker


def half_written(workdir):
    folder = workdir / "checkpoints"
    return [name for name in os.listdir(folder) if "tmp" in name] if folder.exists() else []


def arrays(workdir):
    """Every array of the last checkpoint under its name."""
    folder, handler = workdir / "checkpoints" / str(STEPS), ocp.PyTreeCheckpointHandler()
    found = {}
    for item in ("params", "ema", "optimizer", "progress"):
        as_numpy = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in handler.metadata(folder / item).tree}
        values = handler.restore(folder / item, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
        found |= {f"{item}/{name}": value for name, value in values.items()}
    return found


def log_of(workdir):
    """The lines of the log, without what depends on the clock."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name == "step" or name.startswith(("loss", "gradient"))}
            for line in lines]


def assert_same_run(workdir, undisturbed):
    found, expected = arrays(workdir), arrays(undisturbed)
    assert found.keys() == expected.keys()
    assert len(found) > 50
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    assert [line["step"] for line in log_of(workdir)] == [*range(LOG_EVERY, STEPS, LOG_EVERY), STEPS]
    assert log_of(workdir) == log_of(undisturbed)
    assert not half_written(workdir)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Twelve slices of 8 px."""
    root = tmp_path_factory.mktemp("small_store")
    masks = np.zeros((12, 8, 8), np.float32)
    masks[::2, 2:4, 2:4] = 1
    images = np.random.default_rng(0).random((12, 8, 8, 4), np.float32)
    writer = StoreWriter(root)
    writer.add("case", "train", CaseSlices(images, masks, np.arange(12), (8, 8, 12)), np.eye(4))
    writer.finish({})
    return root


@pytest.fixture(scope="module")
def undisturbed(store, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    worker = Worker(store, workdir)
    worker.begin()
    status, error = worker.end()
    assert status == 0, error
    return workdir


def test_a_run_that_is_killed_ten_times_is_the_run_that_was_not(store, undisturbed, tmp_path):
    rng, workdir, in_saves = random.Random(0), tmp_path / "run", 0
    with Workers(store, workdir) as workers:
        for event, value in KILLS:
            worker = workers.begin()
            if event == "save":
                worker.wait_for_save(value)
                time.sleep(rng.choice([0, 0.01, 0.03]))
            elif event == "line":
                worker.wait_for("line")
                time.sleep(rng.uniform(0, value))
            else:
                time.sleep(rng.uniform(0, 3))
            worker.process.kill()
            status, error = worker.end()
            assert status == -signal.SIGKILL, error
            in_saves += bool(half_written(workdir))
        assert in_saves >= 3
        status, error = workers.begin().end()
        assert status == 0, error
    assert_same_run(workdir, undisturbed)


def test_a_run_that_is_asked_to_stop_saves_and_goes_on_exactly(store, undisturbed, tmp_path):
    workdir, saved = tmp_path / "run", 0
    with Workers(store, workdir) as workers:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            worker = workers.begin()
            worker.wait_for("line")
            worker.process.send_signal(number)
            status, error = worker.end()
            assert status == 75, error
            before, saved = saved, max(int(path.name) for path in (workdir / "checkpoints").iterdir())
            assert before < saved < STEPS
            assert f"{workdir}: stopped by {number.name}, step {saved} is saved; the same command goes on" in error
        status, error = workers.begin().end()
        assert status == 0, error
    assert_same_run(workdir, undisturbed)
