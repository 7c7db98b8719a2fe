"""Training with several processes: two processes on this machine, started by flags and as by schedulers."""

import contextlib
import itertools
import json
import os
import shutil
import signal
import socket
import time

import jax
import numpy as np
import pytest
from spawned import spawned

from hae_jax.commands.common import entry_point
from hae_jax.errors import UserError
from hae_jax.training import hosts

SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_PROCID": "0",
         "SLURM_LOCALID": "0"}
OPEN_MPI = {"OMPI_MCA_orte_hnp_uri": "4096.0;tcp://127.0.0.1:1", "OMPI_COMM_WORLD_SIZE": "2",
            "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
KUBERNETES = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}


@pytest.mark.parametrize(("environment", "several"), [
    ({}, False),
    (SLURM, True),
    (SLURM | {"SLURM_NTASKS": "1"}, False),
    ({name: SLURM[name] for name in SLURM if name != "SLURM_STEP_NODELIST"}, False),  # of the batch script itself
    (OPEN_MPI, True),
    (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"}, False),
    (KUBERNETES, True),
    ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),
])
def test_schedulers_are_recognised(environment, several):
    assert hosts.in_cluster(environment) == several


def test_a_scheduler_that_hides_the_first_process_is_named():
    with pytest.raises(UserError, match=r"Open MPI 5 .* --coordinator"):
        hosts.in_cluster({name: OPEN_MPI[name] for name in OPEN_MPI if name != "OMPI_MCA_orte_hnp_uri"})


@pytest.mark.parametrize(("environment", "all_gpus"), [
    (SLURM | {"SLURM_STEP_NUM_NODES": "2"}, True),  # one task per node
    (SLURM | {"SLURM_STEP_NUM_NODES": "1"}, False),  # one task per GPU
    (SLURM | {"SLURM_STEP_NUM_NODES": "1", "CUDA_VISIBLE_DEVICES": "0,1"}, False),
    (SLURM | {"SLURM_STEP_NUM_NODES": "1", "CUDA_VISIBLE_DEVICES": "1"}, True),  # and it sees one GPU only
    (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, False),
    (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, True),
    (SLURM | {"SLURM_STEP_NUM_NODES": "2", "JAX_LOCAL_DEVICE_IDS": "0"}, False),  # the variable has priority
])
def test_a_process_uses_all_gpus_that_are_its_own(environment, all_gpus):
    assert hosts.has_host_to_itself(environment) == all_gpus


@pytest.mark.parametrize(("flags", "message"), [
    (("node1:12345", None, 0), r"--coordinator .* belong together"),
    ((None, 2, None), r"belong together"),
    (("node1", 2, 0), r"--coordinator is 'node1': give HOST:PORT"),
    (("node1:99999", 2, 0), r"give HOST:PORT"),
    (("node1:12345", 2, 2), r"--process-id is 2: .* 0 \.\. 1"),
    (("node1:12345", 0, 0), r"--num-processes is 0"),
])
def test_flags_that_do_not_fit_together_are_named(flags, message):
    with pytest.raises(UserError, match=message), hosts.joined(*flags):
        pass


def test_alone_nothing_is_joined(monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", None)
    with hosts.joined():
        assert hosts.describe().startswith("process 0 of 1 on ")
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    with hosts.joined(num_processes=1):
        pass


@pytest.fixture(scope="module")
def one_process(one_level_settings, tmp_path_factory):
    """A run of four steps in one process on two devices. Tests must not change it."""
    workdir = tmp_path_factory.mktemp("one")
    config = settings(one_level_settings())
    train(config, workdir, jax.devices()[:2])
    return workdir


def test_two_processes_train_as_one_does_and_one_reads_what_they_wrote(one_level_config, tmp_path, one_process):
    """The parameters are sharded over both, so each has half of every checkpoint. A signal to one stops both."""
    config, workdir = settings(one_level_config), tmp_path / "two"
    config.training.mesh = (1, -1)
    config.training.steps = 1_000_000
    config.training.sample_every = 4
    config.training.sample_steps = 2
    with two_processes(run_training, config, workdir, output=tmp_path) as processes:
        wait_for(lambda: len(losses(workdir)) >= 4, processes, tmp_path)
        os.kill(processes[1].pid, signal.SIGUSR1)
        for process in processes:
            process.join(120)
    assert [process.exitcode for process in processes] == [75, 75], printed(tmp_path)
    last = len(losses(workdir))
    assert (workdir / "checkpoints" / str(last)).is_dir()
    assert f"step {last} is saved" in (tmp_path / "0.txt").read_text()
    assert "training" not in (tmp_path / "1.txt").read_text()
    assert len(list((workdir / "tensorboard").iterdir())) == 1
    expected = losses(one_process)
    np.testing.assert_allclose(losses(workdir)[:4], expected, rtol=1e-5)
    config.training.mesh = (-1, 1)
    config.training.steps = 4
    config.training.sample_every = 0
    train(config, at_step_two(workdir, tmp_path / "one"), jax.devices()[:2])
    np.testing.assert_allclose(losses(tmp_path / "one"), expected, rtol=1e-5)


def test_two_processes_read_what_one_wrote_and_end_together(one_level_config, tmp_path, one_process):
    """The processes are started as by SLURM. The second is killed during a long run."""
    config = settings(one_level_config)
    config.training.steps = 1_000_000
    workdir = at_step_two(one_process, tmp_path / "two")
    with two_processes(run_training, config, workdir, output=tmp_path, environment=SLURM) as processes:
        wait_for(lambda: len(losses(workdir)) >= 4, processes, tmp_path)
        processes[1].kill()
        killed = time.monotonic()
        processes[0].join(60)
    assert time.monotonic() - killed < 60
    assert processes[0].exitcode == 1, printed(tmp_path)
    assert "error: process 1 of 2 died, so process 0 stops" in (tmp_path / "0.txt").read_text().splitlines()[-1]
    np.testing.assert_allclose(losses(workdir)[:4], losses(one_process), rtol=1e-5)


def test_all_save_at_the_same_step_when_the_data_of_one_end(one_level_config, tmp_path, one_process):
    config, workdir = settings(one_level_config), tmp_path / "two"
    config.training.steps, config.training.save_every = 1_000_000, 1_000_000
    with two_processes(run_training_on, config, workdir, 1, 5, output=tmp_path) as processes:
        for process in processes:
            process.join(120)
    assert [process.exitcode for process in processes] == [2, 2], printed(tmp_path)
    said = [(tmp_path / f"{i}.txt").read_text() for i in range(2)]
    kept = "; step 5 is saved: the same command resumes from there\n"
    assert said[0].endswith(f"error: process 1 of 2 on {socket.gethostname()} failed; see its message{kept}")
    assert said[1].endswith(f"error: one of 2 data workers was killed{kept}")
    assert [path.name for path in (workdir / "checkpoints").iterdir() if path.name.isdecimal()] == ["5"]
    np.testing.assert_allclose(losses(workdir)[:4], losses(one_process), rtol=1e-5)


def test_the_others_end_when_the_first_process_dies(tmp_path):
    """The processes are started as by Open MPI."""
    with two_processes(run_idle, output=tmp_path, environment=OPEN_MPI) as processes:
        wait_for(lambda: printed(tmp_path).count(" of 2 on ") == 2, processes, tmp_path)
        processes[0].kill()
        processes[1].join(60)
    assert processes[1].exitcode == 1, printed(tmp_path)
    assert "error: process 0 of 2 died, so process 1 stops" in (tmp_path / "1.txt").read_text().splitlines()[-1]


def test_the_others_end_when_a_process_fails(tmp_path):
    with two_processes(run_idle, 1, output=tmp_path) as processes:
        for process in processes:
            process.join(60)
    assert [process.exitcode for process in processes] == [1, 2], printed(tmp_path)
    assert (tmp_path / "1.txt").read_text().splitlines()[-1] == "error: no data here"
    assert "error: process 1 of 2 failed, so process 0 stops" in (tmp_path / "0.txt").read_text().splitlines()[-1]


def test_processes_that_do_not_come_are_not_waited_for(tmp_path):
    flags = f"127.0.0.1:{free_port()}", 2, 1
    with spawned(run_idle, flags, None, 3, devices=1, output=tmp_path / "1.txt") as process:
        process.join(60)
    assert process.exitcode == 2
    assert (tmp_path / "1.txt").read_text().startswith(f"error: the processes did not find each other at {flags[0]}")


# Functions that run in the processes.


def train(config, workdir, devices=None):
    from hae_jax.training import loop  # here, so that idle processes start faster

    loop.train(config, workdir, devices)


def run_training(flags, config, workdir):
    @entry_point
    def main(_):
        with hosts.joined(*flags, timeout=120):
            train(config, workdir)

    main()


def run_training_on(flags, config, workdir, process, count):
    """Trains. The data of one process end after `count` batches."""
    from hae_jax.training import loop

    batches = loop.train_batches

    def ending(*arguments, **options):
        endless = batches(*arguments, **options)
        yield from endless if jax.process_index() != process else itertools.islice(endless, count)
        raise UserError("one of 2 data workers was killed")

    loop.train_batches = ending
    run_training(flags, config, workdir)


def run_idle(flags, failing=None, timeout=60):
    """Prints its description and waits, or fails after a moment."""

    @entry_point
    def main(_):
        with hosts.joined(*flags, timeout=timeout):
            print(hosts.describe(), flush=True)
            if jax.process_index() == failing:
                raise UserError("no data here")
            time.sleep(60)

    main()


# Helpers of the tests.


@contextlib.contextmanager
def two_processes(function, *args, output, environment=None):
    """Runs `function(flags, *args)` twice, on one CPU device each. The output of process i is in `output`/i.txt.

    Args:
      environment: a scheduler's variables of the first process; None: explicit flags.
    """
    port = free_port()
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(spawned(
            function, () if environment else (f"127.0.0.1:{port}", 2, i), *args, devices=1, output=output / f"{i}.txt",
            environment=_of_process(i, environment or {}) | {"JAX_COORDINATOR_PORT": str(port)})) for i in range(2)]


def _of_process(i, environment):
    ranks = {"SLURM_PROCID", "SLURM_LOCALID", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"}
    return {name: str(i) if name in ranks else value for name, value in environment.items()}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(condition, processes, output, seconds=240):
    """Waits until the condition is true. Fails after `seconds` or if a process ends."""
    end = time.monotonic() + seconds
    while not condition():
        assert all(process.is_alive() for process in processes), printed(output)
        assert time.monotonic() < end, printed(output)
        time.sleep(0.1)


def printed(output):
    return "\n".join(path.read_text() for path in sorted(output.glob("?.txt")))


def settings(config):
    """Settings for four steps of a small network, with a checkpoint every two steps."""
    config.model.variant = "fpdm"
    config.model.channel_mult = (1,)
    config.model.attention_resolutions = ()
    config.training.steps = 4
    config.training.save_every = 2
    config.training.keep = 100
    return config


def at_step_two(source, target):
    """Copies a run as if it had been stopped after two steps."""
    shutil.copytree(source, target)
    for checkpoint in (target / "checkpoints").iterdir():
        if checkpoint.name != "2":
            shutil.rmtree(checkpoint)
    log = target / "metrics.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:2]))
    return target


def losses(workdir):
    """The losses in its log."""
    log = workdir / "metrics.jsonl"
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    return [json.loads(line)["loss"] for line in lines if line.endswith("\n")]
