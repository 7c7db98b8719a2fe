"""Protection of a run: a lock against a second job in its folder, a check of disk space, and handling of signals."""

import contextlib
import errno
import fcntl
import json
import logging
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import jax
import numpy as np
from jax.experimental import multihost_utils

from hae_jax.errors import UserError

REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: run the same command again
_LOG = logging.getLogger(__name__)
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # schedulers send them before they end a job
_HOST = 64  # bytes of a host's name
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class Stopped(SystemExit):
    """Raised to stop a run on request, after its checkpoint was saved. The process exits with status 75."""

    def __init__(self, message: str):
        super().__init__(REQUEUE)
        self.message = message


class RunLock:
    """Context in which only this process uses `workdir`. The kernel releases the lock when the process ends.

    With several processes, only the first takes the lock. On a file system without locks, the run continues with a
    warning.
    """

    def __init__(self, workdir: str | Path):
        self._workdir = Path(workdir)
        self._file = None

    def __enter__(self) -> "RunLock":
        """Takes the lock, and makes the folder if it does not exist.

        Raises:
          UserError: another process has it (the message names its host and id), or the folder cannot be written.
        """
        with agreed():
            if jax.process_index() == 0:
                self._take()
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def _take(self) -> None:
        try:
            self._workdir.mkdir(parents=True, exist_ok=True)
            file = self._file = (self._workdir / ".lock").open("a+")
        except OSError as error:
            raise _unwritable(self._workdir, error) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{self._workdir}: {self._holder(file)} is training in this folder; wait until it ends, "
                            "stop it, or give another --workdir") from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            _LOG.warning("%s: its file system has no locks (%s); make sure that no other job uses this folder",
                         self._workdir, error.strerror)
        self._sign(file)
        # Removes half-written files of a killed run. With the lock, no other process writes here.
        for leftover in filter(Path.is_file, self._workdir.glob(".*.partial.*")):
            leftover.unlink()

    @staticmethod
    def _sign(file: TextIO) -> None:
        file.truncate(0)
        started = datetime.now().astimezone().isoformat(timespec="seconds")
        json.dump({"host": socket.gethostname(), "pid": os.getpid(), "started": started}, file)
        file.flush()

    @staticmethod
    def _holder(file: TextIO) -> str:
        try:
            file.seek(0)
            holder = json.load(file)
            return f"process {holder['pid']} on host {holder['host']} (since {holder['started']})"
        except (ValueError, KeyError):  # the other process has not written its name yet
            return "another process"
        finally:
            file.close()


class Guard:
    """Context in which SIGTERM and SIGUSR1 request a stop instead of ending the run at once.

    A second signal of the same kind has its usual effect. Outside of the main thread, signals are not handled.
    """

    def __init__(self):
        self._first = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Guard":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._remember) for number in _SIGNALS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        for number in list(self._previous):
            self._give_back(number)
        # The message is printed only now, since the checkpoint is complete only after the inner contexts have closed.
        if isinstance(error, Stopped) and jax.process_index() == 0:
            print(error.message, file=sys.stderr, flush=True)

    def stop_requested(self) -> bool:
        """Whether a signal has arrived."""
        return self._first is not None

    def stopped(self, workdir: str | Path, step: int) -> Stopped:
        """The exception to raise after saving of the checkpoint of `step` has started."""
        reason = "another host's signal" if self._first is None else signal.Signals(self._first).name
        return Stopped(f"{workdir}: stopped by {reason}, step {step} is saved; the same command resumes from there")

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._first = self._first or number
        # A second signal of this kind ends the process at once.
        self._give_back(number)

    def _give_back(self, number: int) -> None:
        # None: the previous handler was not installed from Python.
        previous = self._previous.pop(number, signal.SIG_DFL)
        signal.signal(number, signal.SIG_DFL if previous is None else previous)


def check_workdir(workdir: str | Path, checkpoint_bytes: int, keep: int) -> None:
    """Checks before the first step that the run's results can be written.

    Args:
      workdir: the run's folder; made if absent.
      checkpoint_bytes: size of one checkpoint.
      keep: number of checkpoints that are kept. Temporarily, there is one more.

    Raises:
      UserError: the folder cannot be written, or the checkpoints do not fit on the disk.
    """
    with agreed():
        _check_room(Path(workdir), checkpoint_bytes, keep)


def _check_room(workdir: Path, checkpoint_bytes: int, keep: int) -> None:
    try:
        (workdir / "checkpoints").mkdir(parents=True, exist_ok=True)
        for folder in (workdir, workdir / "checkpoints"):
            with tempfile.TemporaryFile(dir=folder) as probe:
                probe.write(b"x")
                probe.flush()
                os.fsync(probe.fileno())
    except OSError as error:
        raise _unwritable(workdir, error) from error
    there = sum(path.name.isdecimal() for path in (workdir / "checkpoints").iterdir())
    missing = max(1, keep + 1 - there)
    free = shutil.disk_usage(workdir).free
    if free < missing * checkpoint_bytes:
        raise UserError(f"{workdir}: only {_size(free)} are free, but {missing} more checkpoints of "
                        f"{_size(checkpoint_bytes)} are needed; free some space, lower training.keep, or give another "
                        "--workdir")


@contextlib.contextmanager
def agreed() -> Iterator[None]:
    """Context at whose end all processes stop if one has raised a UserError in it, so that none waits for it.

    Raises:
      UserError: in every process, if there was one in any.
    """
    found = None
    try:
        yield
    except UserError as error:
        found = error
    failing = _failing(found is not None)
    if failing is not None:
        raise found or UserError(f"{failing} failed; see its message")


def _failing(here: bool) -> str | None:
    """Describes the first failed process; None if none has failed. All processes must call it. `here`: this failed."""
    if jax.process_count() == 1:
        return "this process" if here else None
    host = np.frombuffer(socket.gethostname().encode().ljust(_HOST)[:_HOST], np.uint8)
    failed, hosts = multihost_utils.process_allgather((np.int32(here), host))  # [P], [P, _HOST]
    if not failed.any():
        return None
    first = int(np.argmax(failed))
    return f"process {first} of {len(failed)} on {bytes(hosts[first]).decode(errors='replace').strip()}"


@contextlib.contextmanager
def disk_errors(what: Callable[[], str]) -> Iterator[None]:
    """Context that turns disk errors into a UserError. Other errors are not changed.

    Args:
      what: returns the beginning of the message: the folder and what failed.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        # The text of TensorStore's errors has the number of the system's error.
        number = re.search(r"os_error_code='(\d+)'", str(error))
        if isinstance(error, UserError) or not (number or isinstance(error, OSError)):
            raise
        system: Any = error  # an OSError where the text has no number
        reason = os.strerror(int(number[1])) if number else f"{system.strerror}: {system.filename}"
        raise UserError(f"{what()} ({reason}); make space or restore the permissions of the folder, then run the "
                        "same command again") from error


def _unwritable(workdir: Path, error: OSError) -> UserError:
    return UserError(f"{workdir}: cannot be written ({error.strerror}: {error.filename}); give another --workdir, or "
                     "make it writable")


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
