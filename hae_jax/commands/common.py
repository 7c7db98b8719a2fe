"""Shared by the commands: the parser, and one line instead of a traceback for user mistakes."""

import argparse
import difflib
import errno
import functools
import io
import itertools
import os
import re
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from hae_jax.commands.config import DEFAULTS, fields, read_config
from hae_jax.console import show_messages
from hae_jax.errors import UserError
from hae_jax.files import disk_refuses, full_places

CASES_HELP = ("CSV table of cases instead of a folder: columns case, patient, one column per modality, segmentation; "
              "paths are relative to the table (docs/data.md)")
_OF_THE_SYSTEM = (errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.ENAMETOOLONG, errno.EMFILE, errno.EFBIG,
                  errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENODEV)
_IN_THE_WAY = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENOTEMPTY, errno.EXDEV, errno.EBUSY)
_SIGPIPE = 128 + 13  # exit status of a program whose reader has ended
_PREFIX = "--config."
_SCRIPT = re.compile(  # a script of a clone that the wheel installs as hae-...
    r"(?<![\w/])(?:python )?(?:tools/)?"
    r"(train|translate|make_phantom|prepare_data|ablate|compare_methods|convert_torch_weights|benchmark|report)\.py\b"
    r"(?!:)")  # "train.py: no such file" is about a file
_KINDS = {bool: "true or false", int: "a whole number", float: "a number"}


class CommandParser(argparse.ArgumentParser):
    """The parser of a command. Its help and its errors use the name by which the command was called.

    That is `translate.py` in a clone and `hae-translate` after `pip install`.
    """

    def __init__(self, description: str, epilog: str, may_be_empty: Sequence[str] = ()):
        self._may_be_empty = may_be_empty  # options for which an empty value has a meaning
        super().__init__(description=description, epilog=epilog, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def parse_known_args(self, args=None, namespace=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        """As in argparse.

        Raises:
          UserError: a value is empty, as an unset variable of the shell gives it. A default must not take its place.
        """
        args = sys.argv[1:] if args is None else args
        for before, value in itertools.pairwise(["", *args]):
            name, equals, rest = value.partition("=") if value.startswith("--") else (before, "", value)
            is_empty = not rest and (equals or not value)
            if is_empty and name not in self._may_be_empty and not name.startswith("--config."):
                raise UserError(f"{name if name.startswith('-') else 'an argument'} is empty; give a value, or leave "
                                "it out")
        return super().parse_known_args(args, namespace)

    def format_help(self) -> str:
        """The text of --help. In the help of an installed command, names of scripts are replaced."""
        return as_called(super().format_help())


def as_called(text: str) -> str:
    """The text. If the user called an installed command, scripts have their installed names (`hae-train`)."""
    if not Path(sys.argv[0]).name.startswith("hae-"):
        return text
    return _SCRIPT.sub(lambda script: "hae-" + script[1].replace("_", "-"), text)


def entry_point(main: Callable[..., None]) -> Callable[..., None]:
    """Wraps a command's `main(argv=None)`: a `UserError` becomes one line on stderr and exit status 2.

    The same holds for errors whose cause is outside the program (`_outside`). A closed standard stream is replaced by
    an empty one.
    """

    @functools.wraps(main)
    def wrapped(argv=None):
        os.environ["MPLBACKEND"] = "Agg"  # no command opens windows; the backend of a notebook may not be installed
        for name in ("stdout", "stderr"):
            if getattr(sys, name) is None:
                setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")  # paths may contain bytes that are not text
        show_messages()
        try:
            main(argv)
            sys.stdout.flush()
        except KeyboardInterrupt:
            sys.exit(_fail("interrupted", 130))
        except Exception as error:
            if isinstance(error, BrokenPipeError) and _nobody_reads():
                sys.exit(_fail("stopped: the program that reads this output has ended", _SIGPIPE))
            if (message := _outside(error)) is None:
                raise
            sys.exit(_fail(f"error: {as_called(message)}", 2))

    return wrapped


def source_name(source: str | os.PathLike) -> str:
    """The name for the results of a source: that of the folder, or of the table of cases without its ending."""
    name = os.path.basename(os.path.realpath(source))
    return name[:-4] if name.lower().endswith(".csv") else name


def stop_when_told() -> None:
    """Makes SIGTERM act as Ctrl-C, so that no half-written file and no process remains.

    Schedulers send SIGTERM before they kill.
    """
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, signal.default_int_handler)


def _outside(error: Exception) -> str | None:
    """The message for an error whose cause is outside the program; None for a bug.

    Causes are bad input, a full or read-only disk, paths that are in use, too little memory, and devices that JAX does
    not have.
    """
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, FileNotFoundError) and error.filename is None:  # raised by os.getcwd
        return "the current folder no longer exists; change to another folder"
    if isinstance(error, OSError) and error.filename and error.errno in _OF_THE_SYSTEM:
        return f"{error.filename}: {error.strerror}; check its permissions and the disk"
    if isinstance(error, OSError) and error.filename and error.errno in _IN_THE_WAY:
        return f"{error.filename2 or error.filename}: {error.strerror}; something else is there; give another path"
    if isinstance(error, OSError) and disk_refuses(error):
        where = error.filename or " and ".join(full_places()) or "the output, /tmp or /dev/shm"
        return f"{where}: {error.strerror}; finished results are kept; make space, then run the command again"
    if isinstance(error, MemoryError):
        return f"there is not enough memory ({error}); lower the batch size, the image size or the workers"
    if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
        return (f"the device does not have enough memory ({str(error).splitlines()[0][:200]}); lower the batch size or "
                "set model.remat, model.dtype=bfloat16 or training.accumulation (docs/training.md, Memory)")
    if isinstance(error, RuntimeError | AssertionError):
        last = traceback.extract_tb(error.__traceback__)[-1]
        return _no_device(error) if last.filename.endswith("xla_bridge.py") else None
    return None


def _nobody_reads() -> bool:
    """Whether the reader of standard output has ended, as `| head` does. If so, further output is discarded."""
    output, poll = sys.stdout.fileno(), select.poll()
    poll.register(output, 0)
    ended = any(event & select.POLLERR for _, event in poll.poll(0))
    if ended:
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)  # Python flushes once more at its end
    return ended


def checked_table(path: str) -> str:
    """The path of a table of cases, checked.

    Raises:
      UserError: its name does not end in .csv.
    """
    if not path.lower().endswith(".csv"):
        raise UserError(f"--cases {path}: must be a CSV file with the ending .csv")
    return path


def check_fields(overrides: Sequence[str]) -> None:
    """Checks overrides such as `--config.seed=1` against the fields that every configuration has.

    Raises:
      UserError: an override has an unknown field (the message names similar fields), or a value of a wrong type.
    """
    config = read_config(DEFAULTS, [])
    known = fields(config)
    for argument in overrides:
        field = argument.removeprefix(_PREFIX).partition("=")[0]
        # `read_config` refuses unknown arguments. The default config does not have the fields of data.phantom.
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
    """A hint that lists fields with a similar name, in any section."""
    own_names = {name: name.rpartition(".")[2] for name in known}
    close = difflib.get_close_matches(field.rpartition(".")[2], own_names.values(), cutoff=0.7)
    meant = [name for name, own in own_names.items() if own in close]
    question = f"did you mean {' or '.join(meant)}? " if meant else ""
    return f"{question}configs/default.py lists all fields"


def _no_device(error: BaseException) -> str:
    asked = os.environ.get("JAX_PLATFORMS", "")
    what = f"JAX_PLATFORMS is {asked!r}: unset it, or install a JAX with this platform" if asked else (
        "check the driver, or set JAX_PLATFORMS=cpu")
    return f"JAX finds no device{f' ({error})' if str(error) else ''}; {what}"


def _fail(message: str, status: int) -> int:
    print(" ".join(message.split()), file=sys.stderr)
    return status
