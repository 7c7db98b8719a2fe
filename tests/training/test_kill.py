"""Runs that are killed at random moments or asked to stop, and then resumed, equal an undisturbed run."""

import contextlib
import json
import multiprocessing
import os
import random
import time
from signal import SIGKILL, SIGTERM, SIGUSR1

import numpy as np
import orbax.checkpoint as ocp
import pytest
from spawned import spawned

from hae_jax.data.slices import CaseSlices
from hae_jax.data.store import StoreWriter

STEPS, LOG_EVERY, VALIDATE_EVERY, SAVE_EVERY = 70, 3, 23, 5
# (event, seconds, signal). The event is the start (building and restoring), a line of the log, or the n-th save. The
# signal follows after a random time of at most so many seconds.
DISTURBANCES = [("begins", 3, SIGKILL), ("save 1", 0.03, SIGKILL), ("line", 0.4, SIGKILL), ("save 2", 0.03, SIGKILL),
                ("line", 0.6, SIGKILL), ("save 1", 0.01, SIGKILL), ("line", 0.2, SIGTERM), ("save 2", 0.03, SIGKILL),
                ("line", 0.2, SIGKILL), ("save 1", 0, SIGKILL), ("line", 0.2, SIGUSR1), ("line", 0.8, SIGKILL)]


def train(said, store, workdir):
    """Trains in another process. Reports the start and each written line of the log."""
    from hae_jax.configs import default
    from hae_jax.training import log, loop

    write = log.RunLog.write

    def announced(*args, **kwargs):
        write(*args, **kwargs)
        said.send("line")

    log.RunLog.write = announced
    config = default.get_config()
    config.data.root = str(store)
    config.model.update({"variant": "fpdm", "image_size": 8, "model_channels": 32, "num_res_blocks": 1,
                         "channel_mult": (1,), "attention_resolutions": (), "dropout": 0.0})
    config.training.update({
        "batch_size": 2, "steps": STEPS, "log_every": LOG_EVERY, "save_every": SAVE_EVERY, "sample_every": 0,
        "validate_every": VALIDATE_EVERY, "validation_slices": 2, "localization_every": 0,
        "ema_rates": (0.9,), "learning_rate": 1e-3})
    said.send("begins")
    loop.train(config, workdir)


class Worker:
    """A process that trains."""

    def __init__(self, process, heard, workdir, output):
        self.process, self.workdir, self._heard, self._output = process, workdir, heard, output

    def wait_for(self, word):
        """Waits until the process has reported `word`."""
        try:
            while self._heard.recv() != word:
                pass
        except EOFError:
            raise AssertionError(f"ended before {word!r}: {self.end()}") from None

    def wait_for_save(self, number):
        """Waits until the `number`-th save from now is in progress."""
        seen = set()
        while len(seen) < number:
            assert self.process.is_alive(), self.end()
            seen.update(half_written(self.workdir))
            time.sleep(0.001)

    def end(self):
        """Waits for the end. Returns the exit status and the output."""
        self.process.join()
        return self.process.exitcode, self._output.read_text(errors="replace")


@contextlib.contextmanager
def worker(store, workdir):
    """A process that has started to train."""
    heard, said = multiprocessing.Pipe(duplex=False)
    output = workdir.with_suffix(".txt")
    with spawned(train, said, store, workdir, devices=1, output=output) as process:
        said.close()
        found = Worker(process, heard, workdir, output)
        found.wait_for("begins")
        yield found


def half_written(workdir):
    folder = workdir / "checkpoints"
    return [name for name in os.listdir(folder) if "tmp" in name] if folder.exists() else []


def arrays(workdir):
    """The arrays of the last checkpoint by name."""
    folder, handler = workdir / "checkpoints" / str(STEPS), ocp.PyTreeCheckpointHandler()
    found = {}
    for item in ("params", "ema", "optimizer", "progress"):
        as_numpy = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in handler.metadata(folder / item).tree}
        values = handler.restore(folder / item, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
        found |= {f"{item}/{name}": value for name, value in values.items()}
    return found


def log_of(workdir):
    """The lines of the log without fields that depend on time and machine."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items()
             if not any(word in name for word in ("second", "share", "memory"))} for line in lines]


def assert_same_run(workdir, undisturbed):
    found, expected = arrays(workdir), arrays(undisturbed)
    assert found.keys() == expected.keys()
    assert len(found) > 50
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    for field, every in (("loss", LOG_EVERY), ("validation_loss", VALIDATE_EVERY)):
        written = [line["step"] for line in log_of(workdir) if field in line]
        assert written == [*range(every, STEPS, every), STEPS]
    assert log_of(workdir) == log_of(undisturbed)
    assert not half_written(workdir)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Twelve training slices of 8 px, and two validation slices."""
    root = tmp_path_factory.mktemp("small_store")
    masks = np.zeros((12, 8, 8), np.float32)
    masks[::2, 2:4, 2:4] = 1
    images = np.random.default_rng(0).random((12, 8, 8, 4), np.float32)
    writer = StoreWriter(root)
    for split, count in (("train", 12), ("val", 2)):
        slices = CaseSlices(images[:count], masks[:count], np.arange(count), (8, 8, count))
        writer.add(f"case_{split}", split, slices, np.eye(4))
    writer.finish({})
    return root


def test_a_run_that_is_killed_ten_times_and_asked_to_stop_twice_is_the_run_that_nobody_disturbed(store, tmp_path):
    undisturbed, workdir = tmp_path / "undisturbed", tmp_path / "run"
    run_to_the_end(store, undisturbed)
    rng, in_saves, saved = random.Random(0), 0, 0
    for event, at_most, number in DISTURBANCES:
        with worker(store, workdir) as run:
            if event == "line":
                run.wait_for(event)
            elif event.startswith("save"):
                run.wait_for_save(int(event[-1]))
            time.sleep(rng.uniform(0, at_most))
            os.kill(run.process.pid, number)
            status, printed = run.end()
        if number == SIGKILL:
            assert status == -SIGKILL, printed
            in_saves += bool(half_written(workdir))
        else:
            assert status == 75, printed
            before, saved = saved, max(int(path.name) for path in (workdir / "checkpoints").iterdir())
            assert before < saved < STEPS
            assert f"{workdir}: stopped by {number.name}, step {saved} is saved; the same command resumes" in printed
    assert sum(number == SIGKILL for *_, number in DISTURBANCES) == 10
    assert in_saves >= 3
    run_to_the_end(store, workdir)
    assert_same_run(workdir, undisturbed)


def run_to_the_end(store, workdir):
    with worker(store, workdir) as run:
        status, printed = run.end()
    assert status == 0, printed
