"""Batches that are read ahead, so that all hosts can stop at the same step if one of them gets no more data."""

import collections
from collections.abc import Callable

import numpy as np

from hae_jax.errors import UserError

# A process asks the others to stop with a flag in the batch of a step. They read the flag after the next step has
# started. So a process that gets no more data still needs batches for two steps.
_STEPS = 2
Batch = dict[str, np.ndarray]


class ReadAhead:
    """The batches of the remaining steps.

    Attributes:
      error: why there are no more, if reading has failed; after it, two more batches are available.
    """

    def __init__(self, read: Callable[[], Batch], count: int):
        """Reads the first batches.

        Args:
          read: gives the next batch.
          count: how many are wanted in all.

        Raises:
          UserError: one of the first batches cannot be read.
        """
        self.error: UserError | None = None
        self._read, self._left = read, count
        self._waiting: collections.deque[Batch] = collections.deque()
        for _ in range(_STEPS):
            self._fetch()

    def next(self) -> Batch:
        """The batch of the next step."""
        if self.error is None:
            try:
                self._fetch()
            except UserError as error:
                self.error = error
        return self._waiting.popleft()

    def _fetch(self) -> None:
        if self._left:
            self._waiting.append(self._read())
            self._left -= 1
