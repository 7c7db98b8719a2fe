"""Writes files so that a reader never sees an incomplete file, and reads JSON with errors of one line."""

import contextlib
import errno
import fcntl
import glob
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hae_jax.errors import UserError

_ROOM = 2**20  # bytes; a disk with less free space counts as full
_REPLACED = ".replaced."  # in the name of a folder that is being replaced


@contextlib.contextmanager
def written_whole(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path beside `path` and renames it to `path` when the block ends without an error.

    The temporary name keeps every suffix of `path` (`.nii.gz`), since many writers choose the format by it. A disk
    error names `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    try:
        temporary.touch()
        with _in_use(temporary):
            yield temporary
            os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(temporary)):
            error.filename = str(path)
        raise


def _beside(path: Path) -> Path:
    """A unique temporary name beside `path`. It has random digits, since processes on other hosts can have our id."""
    return path.with_name(f".{os.getpid()}-{secrets.token_hex(4)}.partial.{path.name}")


@contextlib.contextmanager
def _in_use(path: Path) -> Iterator[bool]:
    """Holds a lock on a file or folder. The lock shows other processes that its writer is alive.

    Yields:
      Whether no other process holds the lock; also True if the file system has no locks.
    """
    with contextlib.ExitStack() as stack:
        free = True
        try:
            descriptor = os.open(path, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            free = False
        except OSError:
            pass
        yield free


def remove_leftovers(folder: str | os.PathLike, name: str = "*") -> None:
    """Removes temporary files and folders of killed writers, but not those that are being written.

    Args:
      folder: folder of the temporary files.
      name: pattern of the final names.
    """
    for path in Path(folder).glob(f".*.partial.{name}"):
        with contextlib.suppress(OSError):  # it is being written, or the file system has no locks
            descriptor = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            finally:
                os.close(descriptor)


def disk_refuses(error: BaseException) -> bool:
    """Whether an error comes from a full or read-only disk, so that it will occur for the next file as well."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def full_places() -> list[str]:
    """Lists which of this folder and the usual temporary folders are full, for errors that name no folder."""
    places = dict.fromkeys((os.getcwd(), tempfile.gettempdir(), "/dev/shm"))
    return [place for place in places if os.path.isdir(place) and shutil.disk_usage(place).free < _ROOM]


@contextlib.contextmanager
def folder_written_whole(path: str | os.PathLike, replace: bool = False) -> Iterator[Path]:
    """Like `written_whole`, for a folder. Leftovers of killed writers of the same folder are removed first.

    Args:
      path: the folder.
      replace: replace a folder at `path`, which is removed after the new one is in place.

    Raises:
      FileExistsError: `path` exists, is not an empty folder, and `replace` is False.
      UserError: `path` is a mount point, which cannot be renamed.
    """
    path = Path(os.path.realpath(path)) if replace else Path(path)  # if it is a link, its target is replaced
    if os.path.ismount(path):
        raise UserError(f"{path}: is a mount point, which cannot be replaced; give a folder below it")
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, glob.escape(path.name))
    if not replace and os.path.lexists(path) and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    temporary = _beside(path)
    temporary.mkdir()
    try:
        with _in_use(temporary):
            yield temporary
            if replace and path.exists():
                _replace_folder(path, temporary)
            else:
                os.replace(temporary, path)  # an empty folder at `path` is replaced
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _replace_folder(path: Path, new: Path) -> None:
    removed = _beside(path)
    old = path.with_name(removed.name.replace(".partial.", _REPLACED, 1))
    with _in_use(path):
        os.replace(path, old)
        try:
            os.replace(new, path)
        except OSError:
            os.replace(old, path)
            raise
        os.replace(old, removed)
    shutil.rmtree(removed)


def finish_replacing(path: str | os.PathLike) -> bool:
    """Repairs the state that `folder_written_whole` leaves if it is killed while it replaces a folder.

    Returns:
      Whether the old folder was restored, since the new one was not in place yet.
    """
    path, back = Path(os.path.realpath(path)), False
    for old in path.parent.glob(f".*{_REPLACED}{glob.escape(path.name)}"):
        with _in_use(old) as free:  # not free: it is being replaced now
            if free and not os.path.lexists(path):
                os.replace(old, path)
                back = True
            elif free:
                shutil.rmtree(old)
    return back


@contextlib.contextmanager
def one_at_a_time(path: str | os.PathLike, waiting: Callable[[], None]) -> Iterator[None]:
    """Context that only one process at a time can enter with the same `path`.

    The kernel releases the lock when its owner ends in any way. If the file system has no locks or is read-only,
    processes do not wait. So use it for work that may be done twice without harm.

    Args:
      path: a file only for this lock. It stays as an empty file. If it were removed, waiting processes would hold the
        lock of the removed file, and new ones would lock another file.
      waiting: called if another process is inside.
    """
    path = Path(path)
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            stream = stack.enter_context(path.open("a"))
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waiting()
                fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes `value` as indented JSON, whole or not at all. NaN and infinity raise ValueError."""
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: str | os.PathLike) -> Any:
    """Reads a JSON file in UTF-8 (with or without a byte order mark), UTF-16 or UTF-32, else as Latin-1.

    Raises:
      UserError: it cannot be read, is empty, or is not JSON. The message gives file, line and mistake.
    """
    content = read_content(path)
    if not content.strip():
        raise UserError(f"{path}: is empty")
    try:
        return json.loads(decoded(content), parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: is not JSON (line {error.lineno}, column {error.colno}: {error.msg})") from error
    except ValueError as error:  # such as a number with thousands of digits
        raise UserError(f"{path}: is not JSON ({error})") from error
    except RecursionError as error:
        raise UserError(f"{path}: is nested too deeply") from error


def read_json_lines(path: str | os.PathLike) -> tuple[list[dict[str, Any]], list[int]]:
    """Reads a log with one JSON object per line.

    Returns:
      The objects of the intact lines, and the numbers (from 1) of damaged lines before the last one. The last line may
      be incomplete, since another process is writing it or was stopped while it did.

    Raises:
      UserError: it cannot be read.
    """
    found, damaged, texts = [], [], read_content(path).decode(errors="replace").splitlines()
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
            if not isinstance(line, dict):
                raise ValueError(text)
            found.append(line)
        except (ValueError, RecursionError):
            damaged += [number] if number < len(texts) else []
    return found, damaged


def read_content(path: str | os.PathLike) -> bytes:
    """The bytes of a file.

    Raises:
      UserError: it is a folder, a pipe or a device, or cannot be read.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():  # reading a pipe would wait for its other end
            raise UserError(f"{path}: is {'a folder' if path.is_dir() else 'no file'}; a file is needed")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def decoded(content: bytes) -> str:
    """Decodes UTF-8, UTF-16 or UTF-32 without the byte order mark. Other content is read as Latin-1."""
    try:
        return content.decode(json.detect_encoding(content)).removeprefix("\ufeff")
    except UnicodeDecodeError:
        return content.decode("latin-1")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")
