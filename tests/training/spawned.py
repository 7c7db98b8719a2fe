"""Functions run in processes of their own, with the settings of these tests and any number of CPU devices."""

import contextlib
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import pytest


@contextlib.contextmanager
def spawned(
    function: Callable, *args, devices: int, output: Path, environment: Mapping[str, str] | None = None
) -> Iterator[multiprocessing.Process]:
    """Runs `function(*args)` in another process; killed, if need be, at the end.

    Args:
      function: of a test's module.
      devices: number of CPU devices.
      output: a file for what it prints.
      environment: variables to set.
    """
    settings = {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_DEFAULT_MATMUL_PRECISION": jax.config.jax_default_matmul_precision,
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
    }
    process = multiprocessing.get_context("spawn").Process(target=_run, args=(output, function, *args))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (settings | dict(environment or {})).items():
            patch.setenv(name, value)
        process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def _run(output: Path, function: Callable, *args) -> None:
    with output.open("wb", buffering=0) as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    function(*args)
