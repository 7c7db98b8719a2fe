"""What a result folder says about its own making: versions, git revision, host, time."""

import datetime
import importlib.metadata
import platform
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

RESEARCH_USE = "Research use only. Not a medical device; not for diagnosis or treatment."
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorstore", "numpy", "scipy",
             "scikit-learn", "scikit-image", "nibabel", "nilearn")


def git_revision() -> str | None:
    """The commit that this source tree is at (`-dirty` appended when edited), or None outside a git checkout."""
    try:
        out = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return out.stdout.strip() or None


def versions() -> dict[str, str]:
    """Python's version and that of every package which can change a result."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def record() -> dict[str, Any]:
    """The facts that every result folder states, ready for JSON."""
    return {
        "notice": RESEARCH_USE,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "command": sys.argv,
        "git_revision": git_revision(),
        "versions": versions(),
    }
