"""Running of functions in separate processes, with the settings of these tests and any number of CPU devices.

The processes are forked from a server that has imported the modules, since importing takes longer than most functions.
"""

import atexit
import contextlib
import functools
import gc
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import forkserver
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).resolve().parents[2]


@contextlib.contextmanager
def spawned(
    function: Callable, *args, devices: int, output: Path, environment: Mapping[str, str] | None = None
) -> Iterator[multiprocessing.Process]:
    """Runs `function(*args)` in another process. It is killed at the end if it still runs.

    Args:
      function: a function of a test's module.
      devices: number of CPU devices.
      output: a file for its output.
      environment: variables to set.
    """
    settings = {
        "jax_num_cpu_devices": devices,
        "jax_default_matmul_precision": jax.config.jax_default_matmul_precision,
        "jax_compilation_cache_dir": jax.config.jax_compilation_cache_dir,
        "jax_persistent_cache_min_compile_time_secs": 0,
    }
    process = _context().Process(target=_run, args=(output, settings, dict(environment or {}), function, *args))
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


@functools.cache
def _context() -> multiprocessing.context.BaseContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hae_jax.configs.default", "hae_jax.training.hosts", "hae_jax.training.loop"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))))
        patch.setenv("PYTHONWARNINGS", "ignore::RuntimeWarning")  # JAX warns of forks; no thread has been started yet
        patch.setenv("JAX_PLATFORMS", "cpu")
        forkserver.ensure_running()
    return context


def _run(output: Path, settings: Mapping, environment: Mapping[str, str], function: Callable, *args) -> None:
    with output.open("wb", buffering=0) as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    gc.freeze()  # as in conftest.py
    gc.set_threshold(100_000, 50, 100)
    os.environ.update(environment)
    for name, value in settings.items():
        jax.config.update(name, value)
    try:
        function(*args)
    finally:
        atexit._run_exitfuncs()  # JAX disconnects with one; forked processes skip them
