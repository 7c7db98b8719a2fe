"""The record of how results were made: versions, git revision, host, time."""

import datetime
import functools
import importlib.metadata
import os
import platform
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from hae_jax import __version__

RESEARCH_USE = "Research use only. Not a medical device; not for diagnosis or treatment."
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorstore", "numpy", "scipy",
             "scikit-learn", "scikit-image", "nibabel", "nilearn")


@functools.cache
def git_revision() -> str | None:
    """The commit of this source tree, with `-dirty` if it was edited; None outside a checkout of this project.

    An installed or copied package may be inside the repository of another project. Its commit is not used.
    """
    root = Path(__file__).resolve().parents[1]
    if not (root / "pyproject.toml").is_file() or _git(root, "rev-parse", "--show-toplevel") != str(root):
        return None
    if _git(root, "ls-files", "--error-unmatch", "pyproject.toml", __file__) is None:
        return None
    if 'name = "hae-jax"' not in (root / "pyproject.toml").read_text(encoding="utf-8"):
        return None
    return _git(root, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*") or None


def _git(root: Path, *arguments: str) -> str | None:
    """The output of a git command; None if it fails. GIT_DIR and the like are removed: hooks set them."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(["git", *arguments], cwd=root, env=environment, capture_output=True, text=True,
                              errors="replace", timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def versions() -> dict[str, str]:
    """The versions of this package, of Python, and of every package that can change a result."""
    found = {package: _version(package) for package in _PACKAGES}
    return {"hae-jax": __version__, "python": platform.python_version()} | {
        package: version for package, version in found.items() if version is not None}


@functools.cache  # importlib reads the whole description of a package each time
def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def record() -> dict[str, Any]:
    """The facts that every results folder records, ready for JSON."""
    return {
        "notice": RESEARCH_USE,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "command": sys.argv,
        "git_revision": git_revision(),
        "versions": versions(),
    }


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
