"""A connection from every process to process 0. If a process dies, its connection closes, and all others end at once.

Without it, the other processes would wait in a collective operation until JAX misses the dead process's heartbeats.
"""

import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener, wait

import jax

# JAX has no public name for the key-value store of its processes. Orbax also uses `global_state` for it.
from jax._src.distributed import global_state
from tqdm import tqdm

_NAME = "hae_jax/lifeline"
_GRACE = 5  # seconds in which every process can print its own message, if all of them fail with the same error
_FAILED, _FINISHED = "failed", "finished"


class Lifeline:
    """This process's end of the connections. Make it after `jax.distributed.initialize`."""

    def __init__(self, timeout: float):
        """Connects in the background.

        Args:
          timeout: seconds to wait for the others.
        """
        self._timeout = timeout
        self._connections: dict[Connection, int] = {}  # -> process at the other end
        self._left = False
        watch = self._watch_others if jax.process_index() == 0 else self._watch_first
        self._thread = threading.Thread(target=_unless_unreachable, args=[watch], name="lifeline", daemon=True)
        self._thread.start()

    def leave(self, failed: bool) -> None:
        """Tells the others that this process will end, so that they do not treat its end as a crash."""
        if failed:
            # If the death of another process is the reason, the other thread reports it and ends this process.
            self._thread.join(1)
        self._left = True
        self._tell((jax.process_index(), _FAILED if failed else _FINISHED))

    def _watch_others(self) -> None:
        """In process 0: accepts the connections of all others, then waits for any of them to end."""
        assert global_state.client is not None  # the processes are connected
        key = secrets.token_bytes(16)
        with Listener(("", 0), backlog=jax.process_count(), authkey=key) as listener:
            global_state.client.key_value_set(_NAME, f"{listener.address[1]} {key.hex()}")
            while len(self._connections) < jax.process_count() - 1:
                try:
                    connection = listener.accept()
                    self._connections[connection] = connection.recv()
                except (AuthenticationError, EOFError, ConnectionError):
                    continue  # not a process of this run
        while self._connections:
            for connection in wait(list(self._connections)):
                assert isinstance(connection, Connection)  # `wait` was given nothing else
                process = self._connections[connection]
                news = _read(connection, process)
                del self._connections[connection]
                if news[1] != _FINISHED and not self._left:
                    self._tell(news)
                    _fall(*news)

    def _watch_first(self) -> None:
        """In the other processes: waits for a message from process 0, or for its end."""
        assert global_state.client is not None
        assert global_state.coordinator_address is not None
        port, key = global_state.client.blocking_key_value_get(_NAME, int(self._timeout * 1000)).split()
        host = global_state.coordinator_address.rpartition(":")[0].strip("[]")
        address = socket.gethostbyname(host), int(port)
        try:
            connection = Client(address, "AF_INET", authkey=bytes.fromhex(key))
            connection.send(jax.process_index())
        except (ConnectionResetError, BrokenPipeError, EOFError):  # process 0 died after it had published its address
            _fall(0, "died")
        self._connections[connection] = 0
        news = _read(connection, 0)
        if news[1] != _FINISHED and not self._left:
            _fall(*news)

    def _tell(self, news: tuple[int, str]) -> None:
        for connection in list(self._connections):
            try:
                connection.send(news)
            except OSError:
                continue  # already closed; the watching thread handles it


def _unless_unreachable(watch: Callable[[], None]) -> None:
    try:
        watch()
    except (OSError, AuthenticationError) as error:
        print(f"warning: process {jax.process_index()} cannot watch the other processes ({error}); if another process "
              "fails, JAX will end this one after a while, with a stack trace", file=sys.stderr, flush=True)


def _read(connection: Connection, process: int) -> tuple[int, str]:
    """Reads a process's last message: the process that ends, and how. Without a message, it has died."""
    try:
        return connection.recv()
    except (EOFError, OSError):
        return process, "died"


def _fall(process: int, how: str) -> None:
    """Ends this process because another one has ended."""
    if how == _FAILED:
        time.sleep(_GRACE)
    with tqdm.get_lock():  # so that no progress bar is drawn after the message
        print(f"\nerror: process {process} of {jax.process_count()} {how}, so process {jax.process_index()} stops; see "
              f"the messages of process {process}, then run the same commands again to resume from the last checkpoint",
              file=sys.stderr, flush=True)
        if how == _FAILED:
            jax.distributed.shutdown()  # the failed process waits for the end of this one
        os._exit(1)
