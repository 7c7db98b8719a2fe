"""Settings of all tests: four CPU devices, fast compilation with a cache, the golden values.

Options in XLA_FLAGS are kept. They and the processor's instruction set are part of the cache's keys, so that no program
is used that was compiled with other options or for another processor.
"""

import gc
import logging
import os
from collections.abc import Callable
from pathlib import Path

import jax
import pytest

from hae_jax.console import show_messages

# The networks in tests run for a fraction of a second, so fast compilation is more important than fast code. The test
# processes occupy all cores, so one thread for each program takes the least processor time.
_QUICK = ("--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
          " --xla_cpu_multi_thread_eigen=false")
if jax.__version_info__ < (0, 11):  # later versions of XLA do not have this option
    _QUICK += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_QUICK}"  # read when JAX initialises its devices

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).resolve().parents[1] / ".jax_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)

show_messages()

# Tracing makes many permanent objects. Without this line, Python's garbage collection would take a quarter of the time.
gc.freeze()
gc.set_threshold(100_000, 50, 100)

jax.devices()  # fixes the number of devices, so that commands under test cannot change it


# Files with single tests of more than 20 s, the longest first. They start early, so that all processes end at about the
# same time.
_LONG = ("test_gpu_report.py", "test_kill.py", "test_example.py", "test_wheel.py", "test_hosts.py", "test_mesh.py",
         "test_golden.py", "test_imported.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Moves long tests to the front. The order of the others does not change."""
    items.sort(key=lambda item: _LONG.index(item.path.name) if item.path.name in _LONG else len(_LONG))


def pytest_unconfigure() -> None:
    """Skips garbage collection at exit. It would take seconds, and the system frees the memory anyway."""
    gc.freeze()


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder with the reference values."""
    return Path(__file__).parent / "golden"


@pytest.fixture
def on_message():
    """Calls a function with each message that the package logs."""
    logger, handlers = logging.getLogger("hae_jax"), []

    def listen(call: Callable[[str], object]) -> None:
        handler = logging.Handler()
        handler.emit = lambda record: call(record.getMessage())
        logger.addHandler(handler)
        handlers.append(handler)

    yield listen
    for handler in handlers:
        logger.removeHandler(handler)


pytest_plugins = ["translated_cases", "tiny_training"]  # small cases and a toy network; slices and the smallest network
