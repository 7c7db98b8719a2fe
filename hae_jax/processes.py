"""Parallel work in processes that end with this process."""

import collections
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from hae_jax.errors import UserError


def in_order(function: Callable[[Any], Any], items: Sequence[Any], workers: int) -> Iterator[Any]:
    """Like `map`, in parallel processes. To save memory, at most two results per worker wait to be read.

    Args:
      function: can be pickled, as well as the items and the results.
      workers: number of processes; up to 1: no process is started.

    Raises:
      UserError: a worker process was killed.
    """
    if workers <= 1:
        yield from map(function, items)
        return
    # Processes are spawned and not forked, since the threads of JAX and TensorStore do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=end_with_parent) as pool:
        waiting = collections.deque()
        try:
            for item in items:
                if len(waiting) == 2 * workers:
                    yield waiting.popleft().result()
                waiting.append(pool.submit(function, item))
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise UserError(f"one of {workers} worker processes was killed, most likely for want of memory; use fewer "
                            "workers") from error
        finally:
            pool.shutdown(cancel_futures=True)


def end_with_parent(*_: Any) -> None:
    """Ends this worker as soon as its parent is gone. A killed parent cannot end its workers, which wait forever.

    Call it in the worker. The arguments have no effect.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None  # this process is a worker

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
