"""Training on several hosts. Their processes connect before the first device is used, and if one fails, all end.

JAX connects the processes. If one of them dies, JAX ends the others, but late and with a stack trace. The lifeline
(`hae_jax.training.lifeline`) ends them at once with a message of one line.
"""

import contextlib
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax.experimental import multihost_utils

from hae_jax.errors import UserError
from hae_jax.training.lifeline import Lifeline

_HEARTBEAT = 60  # seconds without a heartbeat after which JAX treats a process as dead
_SHUTDOWN = 60  # seconds that a process waits for the others at its end
_PROXIES = ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy")
_FLAGS = "--coordinator HOST:PORT, --num-processes N and --process-id I"


@contextlib.contextmanager
def joined(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None,
    timeout: float = 300,
) -> Iterator[None]:
    """Context in which the processes of a run are connected. With a single process, it does nothing.

    Without arguments, the processes are those of the SLURM step, the Open MPI run or the indexed Kubernetes job that
    this process belongs to, if any. Enter the context before JAX's devices are initialised and after the number of CPU
    devices is set. If another process dies, this one ends with one line on stderr and status 1. If an error leaves the
    context, all other processes end in the same way.

    Args:
      coordinator: HOST:PORT of process 0, reachable by all; the port must be free there.
      num_processes: number of processes; 1: only this one, also under a scheduler.
      process_id: number of this process, 0 .. num_processes - 1.
      timeout: seconds in which the processes must connect.

    Raises:
      UserError: the flags do not fit together, or the scheduler's variables are incomplete.
    """
    explicit = _explicit(coordinator, num_processes, process_id)
    if not explicit and (num_processes == 1 or not in_cluster(os.environ)):
        yield
        return
    _initialize(explicit, timeout)
    lifeline = Lifeline(timeout)
    try:
        yield
    except SystemExit:  # an intended end, which is the same on all processes
        lifeline.leave(failed=False)
        raise
    except BaseException:
        lifeline.leave(failed=True)
        raise
    lifeline.leave(failed=False)


def once(work: Callable[[], None]) -> None:
    """Runs `work` in process 0 while the others wait, such as making data on a shared disk."""
    if jax.process_count() > 1:
        # Connects the processes. While they connect, a process does not wait for long.
        multihost_utils.sync_global_devices("before once")
    if jax.process_index() == 0:
        work()
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("once")


def describe() -> str:
    """One line that describes this process and its devices among the others."""
    devices = ", ".join(str(device) for device in jax.local_devices())
    return (f"process {jax.process_index()} of {jax.process_count()} on {socket.gethostname()}: {devices}; "
            f"{jax.device_count()} devices in all")


def in_cluster(environment: Mapping[str, str]) -> bool:
    """Whether a scheduler has started several processes, according to its environment variables.

    These are the variables that `jax.distributed.initialize` uses. A Kubernetes job does not give its number of pods.

    Raises:
      UserError: under Open MPI 5, which no longer gives the address of process 0.
    """
    slurm = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
    if all(name in environment for name in slurm):
        return int(environment["SLURM_NTASKS"]) > 1
    if int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        if "OMPI_MCA_orte_hnp_uri" not in environment:
            raise UserError("Open MPI 5 does not provide the address of process 0; give --coordinator HOST:PORT "
                            "--num-processes $OMPI_COMM_WORLD_SIZE --process-id $OMPI_COMM_WORLD_RANK "
                            "(docs/scaling.md)")
        return True
    return "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment


def _explicit(coordinator: str | None, num_processes: int | None, process_id: int | None) -> dict[str, Any]:
    """The flags as arguments of `jax.distributed.initialize`; empty if the scheduler gives them."""
    flags = {"coordinator_address": coordinator, "num_processes": num_processes, "process_id": process_id}
    if num_processes is not None and num_processes < 1:
        raise UserError(f"--num-processes is {num_processes}: it must be at least 1")
    if all(value is None for value in flags.values()) or num_processes == 1:
        return {}
    if coordinator is None or num_processes is None or process_id is None:
        raise UserError(f"{_FLAGS} belong together: give all of them, or none if SLURM, Open MPI or Kubernetes "
                        "starts the processes")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"--coordinator is {coordinator!r}: give HOST:PORT, such as node1:12345")
    if not 0 <= process_id < num_processes:
        raise UserError(f"--process-id is {process_id}: with --num-processes {num_processes} it must be in "
                        f"0 .. {num_processes - 1}")
    return flags


def _initialize(explicit: dict[str, Any], timeout: float) -> None:
    where = f" at {explicit['coordinator_address']}" if explicit else ""
    # JAX would also end the process, but with a stack trace.
    alarm = threading.Timer(timeout, _give_up, [f"the processes did not find each other{where} within {timeout:g} "
                                                "seconds: are all of them running, and is the port open?"])
    alarm.daemon = True
    alarm.start()
    # With flags, the scheduler's variables are ignored, since they may belong to another job.
    detection: dict[str, Any] = {"cluster_detection_method": "deactivate"} if explicit else {}
    try:
        with _without_proxies():
            jax.distributed.initialize(
                **explicit, **detection, initialization_timeout=int(timeout) + 60, heartbeat_timeout_seconds=_HEARTBEAT,
                shutdown_timeout_seconds=_SHUTDOWN)
    except Exception as error:  # from JAX or from the scheduler's client
        raise UserError(f"the processes cannot connect ({error}); give {_FLAGS}, or --num-processes 1 to train "
                        "alone") from error
    finally:
        alarm.cancel()
    if not explicit and has_host_to_itself(os.environ):
        jax.config.update("jax_cuda_visible_devices", "all")


@contextlib.contextmanager
def _without_proxies() -> Iterator[None]:
    """Context without proxy variables. gRPC would use a proxy of the cluster to reach the other processes."""
    names = [name for name in os.environ if name.lower() in _PROXIES]
    kept = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(kept)


def has_host_to_itself(environment: Mapping[str, str]) -> bool:
    """Whether a scheduled process uses all visible GPUs and not only that with its local number.

    JAX assumes one process per GPU, and that all processes see all GPUs.
    """
    if "JAX_LOCAL_DEVICE_IDS" in environment:
        return False
    shown = environment.get("CUDA_VISIBLE_DEVICES", "")
    one_shown = shown != "" and "," not in shown  # the scheduler gives each process its own
    one_task = "SLURM_NTASKS" in environment and environment["SLURM_NTASKS"] == environment.get("SLURM_STEP_NUM_NODES")
    return one_shown or one_task or environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"


def _give_up(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(2)
