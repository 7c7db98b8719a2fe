"""Shared by all commands: a mistake of the user ends in one line, not in a traceback."""

import difflib
import errno
import functools
import io
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence

from hae_jax.commands.config import DEFAULTS, fields, read_config
from hae_jax.console import show_messages
from hae_jax.errors import UserError
from hae_jax.files import disk_refuses, full_places

CASES_HELP = ("CSV table of cases instead of a folder: columns case, patient, one column per modality, segmentation; "
              "paths are relative to the table (docs/data.md)")
_OF_THE_SYSTEM = (errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.ENAMETOOLONG, errno.EMFILE)
_PREFIX = "--config."
_KINDS = {bool: "true or false", int: "a whole number", float: "a number"}


def entry_point(main: Callable[..., None]) -> Callable[..., None]:
    """Wraps a command's `main(argv=None)`: a `UserError` becomes one line on stderr and exit status 2.

    The same holds for a disk that is full or not writable, and for devices that JAX does not find.
    """

    @functools.wraps(main)
    def wrapped(argv=None):
        os.environ["MPLBACKEND"] = "Agg"  # no command opens windows; the backend of a notebook may not be installed
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")  # paths may hold bytes that are no text
        show_messages()
        try:
            main(argv)
        except UserError as error:
            sys.exit(_fail(f"error: {error}", 2))
        except OSError as error:
            if error.errno in _OF_THE_SYSTEM and error.filename:
                sys.exit(_fail(f"error: {error.filename}: {error.strerror}; check its permissions and the disk", 2))
            if not disk_refuses(error):
                raise
            where = error.filename or " and ".join(full_places()) or "the output, /tmp or /dev/shm"
            sys.exit(_fail(f"error: {where}: {error.strerror}; finished results are kept; make space, then run the "
                           "command again", 2))
        except MemoryError as error:
            sys.exit(_fail(f"error: there is not enough memory ({error}); lower the batch size or the workers", 2))
        except (RuntimeError, AssertionError) as error:
            if not traceback.extract_tb(error.__traceback__)[-1].filename.endswith("xla_bridge.py"):
                raise
            sys.exit(_fail(_no_device(error), 2))
        except KeyboardInterrupt:
            sys.exit(_fail("interrupted", 130))

    return wrapped


def checked_table(path: str) -> str:
    """The table of cases that a flag names.

    Raises:
      UserError: its name does not end in .csv.
    """
    if not path.lower().endswith(".csv"):
        raise UserError(f"--cases {path}: must be a CSV file with the ending .csv")
    return path


def check_fields(overrides: Sequence[str]) -> None:
    """Checks overrides such as `--config.seed=1` against the fields that every configuration has.

    Raises:
      UserError: names the first override with an unknown field (and similar fields), or with a value of a wrong type.
    """
    config = read_config(DEFAULTS, [])
    known = fields(config)
    for argument in overrides:
        field = argument.removeprefix(_PREFIX).partition("=")[0]
        # Unknown arguments are read_config's to refuse; data.phantom is None by default, its fields another config's.
        if not argument.startswith(_PREFIX) or field.startswith("data.phantom."):
            continue
        if field not in known:
            raise UserError(f"{argument}: there is no field {field}; {_meant(field, known)}")
        try:
            read_config(DEFAULTS, [argument])
        except UserError as error:
            *sections, name = field.split(".")
            kind = functools.reduce(lambda inner, section: inner[section], sections, config).get_type(name)
            raise UserError(f"{argument}: {field} takes {_KINDS.get(kind, 'another kind of value')}; its default is "
                            f"{known[field]!r}") from error


def _meant(field: str, known: Iterable[str]) -> str:
    """The fields with a similar name, in any section."""
    own_names = {name: name.rpartition(".")[2] for name in known}
    close = difflib.get_close_matches(field.rpartition(".")[2], own_names.values(), cutoff=0.7)
    meant = [name for name, own in own_names.items() if own in close]
    question = f"did you mean {' or '.join(meant)}? " if meant else ""
    return f"{question}configs/default.py lists all fields"


def _no_device(error: BaseException) -> str:
    asked = os.environ.get("JAX_PLATFORMS", "")
    what = f"JAX_PLATFORMS is {asked!r}: unset it, or install a JAX with this platform" if asked else (
        "check the driver, or set JAX_PLATFORMS=cpu")
    return f"error: JAX finds no device{f' ({error})' if str(error) else ''}; {what}"


def _fail(message: str, status: int) -> int:
    print(" ".join(message.split()), file=sys.stderr)
    return status
