"""Shared by all tests: four CPU devices, quick compilation and a cache of it, the golden values.

Options in XLA_FLAGS are kept. They and the instruction set of the processor are part of the key under which the cache
has a program, so that none is taken that was compiled for another.
"""

import gc
import logging
import os
from collections.abc import Callable
from pathlib import Path

import jax
import pytest

from hae_jax.console import show_messages

# The networks here run for a fraction of a second: compiling fast is worth more than fast code.
_QUICK = "--xla_backend_optimization_level=0"
if jax.__version_info__ < (0, 11):  # from there on XLA knows this option no more
    _QUICK += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_QUICK}"  # read when the first device is asked for

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).resolve().parents[1] / ".jax_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)

show_messages()

# Tracing makes many objects that stay: Python's search for garbage would take a quarter of its time.
gc.freeze()
gc.set_threshold(100_000, 50, 100)

jax.devices()  # from here on their number is settled, whatever a command under test asks for


# Files with single tests of more than 20 s, the longest first. They begin early, so that no process ends long after the
# others.
_LONG = ("test_gpu_report.py", "test_kill.py", "test_example.py", "test_wheel.py", "test_hosts.py", "test_mesh.py",
         "test_golden.py", "test_imported.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Moves long tests to the front; the order of the others stays."""
    items.sort(key=lambda item: _LONG.index(item.path.name) if item.path.name in _LONG else len(_LONG))


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder with the reference numbers."""
    return Path(__file__).parent / "golden"


@pytest.fixture
def on_message():
    """Has a function called with each message that the package logs."""
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
