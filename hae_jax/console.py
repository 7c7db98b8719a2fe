"""The package's messages on the console. Library code logs to the logger "hae_jax"; commands show it."""

import contextlib
import logging
import sys
from collections.abc import Iterator

from tqdm import tqdm

_LOG = logging.getLogger("hae_jax")
_PREFIXES = {logging.WARNING: "warning: ", logging.ERROR: "error: "}


class _Console(logging.Handler):
    """Writes messages to stdout, and warnings and errors to stderr. A progress bar stays below them."""

    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stdout if record.levelno < logging.WARNING else sys.stderr
        tqdm.write(_PREFIXES.get(record.levelno, "") + self.format(record), file=stream)
        stream.flush()


def show_messages() -> None:
    """Shows the package's log messages from level INFO on. A second call changes nothing."""
    _LOG.setLevel(logging.INFO)
    _LOG.propagate = False
    if not any(isinstance(handler, _Console) for handler in _LOG.handlers):
        _LOG.addHandler(_Console())


@contextlib.contextmanager
def only_warnings() -> Iterator[None]:
    """Context in which only warnings and errors are shown."""
    before = _LOG.level
    _LOG.setLevel(logging.WARNING)
    try:
        yield
    finally:
        _LOG.setLevel(before)
