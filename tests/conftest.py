"""Shared by all tests: four CPU devices, a persistent compilation cache, the golden values."""

import os
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_default_matmul_precision", "highest")
_CACHE = os.environ.get("HAE_JAX_CACHE", str(Path(tempfile.gettempdir()) / "hae_jax_test_cache"))
jax.config.update("jax_compilation_cache_dir", _CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder with the reference numbers."""
    return Path(__file__).parent / "golden"
