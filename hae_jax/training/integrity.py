"""Checksums of a checkpoint's files. They are written before it is committed and compared before it is read."""

import json
import zlib
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hae_jax.files import write_json

CHECKSUMS = "checksums.json"
_BLOCK = 2**20  # bytes per read


def seal(folder: Path, without: Collection[str] = ()) -> None:
    """Writes size and CRC-32 of every file below `folder` to `folder/checksums.json`.

    Args:
      folder: complete, and not changed any more.
      without: names in `folder` itself that are left out.
    """
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    names = [name for name in names if name not in without]
    with ThreadPoolExecutor() as pool:
        sums = pool.map(lambda name: _measured(folder / name), names)
        write_json(folder / CHECKSUMS, {"files": dict(zip(names, sums, strict=True))})


def damage(folder: Path, parts: Collection[str] | None = None) -> str | None:
    """Compares the files of a sealed folder with their checksums.

    Args:
      parts: compare only the files in these subfolders; None: all.

    Returns:
      None if all are as they were written, otherwise the first file that is not, and how it differs.
    """
    try:
        expected = json.loads((folder / CHECKSUMS).read_bytes())["files"]
        expected = {str(name): {"size": int(file["size"]), "crc32": str(file["crc32"])}
                    for name, file in expected.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{CHECKSUMS} is not readable"
    names = [name for name in expected if parts is None or name.split("/")[0] in parts]
    with ThreadPoolExecutor() as pool:
        compared = pool.map(lambda name: _difference(folder / name, expected[name]), names)
        return next((f"{name} {difference}" for name, difference in zip(names, compared, strict=True) if difference),
                    None)


def move_aside(folder: Path) -> Path:
    """Renames a damaged folder to `<name>.damaged`, so that its name is free and its files are kept."""
    taken, target = 1, folder.with_name(f"{folder.name}.damaged")
    while target.exists():
        taken += 1
        target = folder.with_name(f"{folder.name}.damaged-{taken}")
    return folder.rename(target)


def _difference(path: Path, expected: dict) -> str | None:
    try:
        size = path.stat().st_size
        if size != expected["size"]:
            return f"has {size} bytes instead of {expected['size']}"
        return None if _measured(path) == expected else "has another checksum"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _measured(path: Path) -> dict:
    size, crc = 0, 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return {"size": size, "crc32": f"{crc:08x}"}
