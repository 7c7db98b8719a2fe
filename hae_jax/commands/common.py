"""What every command shares: user mistakes end in one line, not in a traceback."""

import functools
import sys
from collections.abc import Callable

from hae_jax.errors import UserError


def entry_point(main: Callable[..., None]) -> Callable[..., None]:
    """Wraps a command's `main(argv=None)`: a `UserError` becomes one line on stderr and exit status 2."""

    @functools.wraps(main)
    def wrapped(argv=None):
        try:
            main(argv)
        except UserError as error:
            sys.exit(_fail(f"error: {error}", 2))
        except KeyboardInterrupt:
            sys.exit(_fail("interrupted", 130))

    return wrapped


def _fail(message: str, status: int) -> int:
    print(" ".join(message.split()), file=sys.stderr)
    return status
