"""Files that exist but cannot be read: dead links, folders without permission, placeholders of clouds and of Git.

The search for cases counts such files as present, and the error is reported later. If it skipped them, a case could be
used with other files, and a case without its segmentation would count as a case without a lesion.
"""

import errno
import os
import stat
from pathlib import Path

_CLOUDS = (".icloud", ".nextcloud", ".owncloud", ".cloud")  # extensions of files that are not downloaded yet
_POINTERS = {  # beginnings of the small text files that replace the content
    b"version https://git-lfs.github.com/spec/": "a pointer of Git LFS; fetch the content with git lfs pull",
    b"/annex/objects/": "a pointer of git-annex; fetch the content with git annex get or datalad get",
}
_FETCH = "its content is not here; fetch it with datalad get or git annex get"


def real_name(name: str) -> str:
    """The name of the file that a cloud's placeholder stands for (`.a.nii.gz.icloud`: a.nii.gz); others unchanged."""
    ending = next((ending for ending in _CLOUDS if name.endswith(ending)), None)
    if ending is None:
        return name
    plain = name.removesuffix(ending)
    return plain.removeprefix(".") if ending == ".icloud" else plain


def is_there(path: Path) -> bool:
    """Whether there is a file, a link to somewhere, or a placeholder.

    Raises:
      OSError: the folder is closed.
    """
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return _placeholder(path) is not None
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return False  # below a link to itself
    return True


def absence(path: Path) -> str | None:
    """Describes why `path` is not a readable file or folder; None if it is one."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        return _why(path, error)
    if stat.S_ISDIR(mode):
        return None if os.access(path, os.R_OK | os.X_OK) else "cannot be looked into; change its permissions"
    if not stat.S_ISREG(mode):
        return "is no file; remove it"
    return None if os.access(path, os.R_OK) else "no permission to read it; change its permissions"


def pointer(beginning: bytes) -> str | None:
    """Describes a file that is empty or only a pointer to its content, by its first bytes; None for other files."""
    if not beginning:
        return "is empty (0 bytes); fetch, copy or export it again"
    return next((f"is {what}" for start, what in _POINTERS.items() if beginning.startswith(start)), None)


def _why(path: Path, error: OSError) -> str:
    if os.path.islink(path):
        target = os.readlink(path)
        if "annex/objects" in target:
            return f"links to {target}, but {_FETCH}"
        return (f"links to {target}, which cannot be reached ({error.strerror}); mount the disk that it is on, or "
                "repair the link")
    if (placeholder := _placeholder(path)) is not None:
        return f"only its placeholder {placeholder.name} is here; let the cloud's program fetch the file"
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return "missing"
    return f"cannot be looked into ({error.strerror}); change its permissions, or check the disk"


def _placeholder(path: Path) -> Path | None:
    names = [f"{'.' if ending == '.icloud' else ''}{path.name}{ending}" for ending in _CLOUDS]
    return next((file for name in names if os.path.lexists(file := path.with_name(name))), None)
