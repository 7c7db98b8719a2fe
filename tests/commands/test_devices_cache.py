"""Compiled programs are stored in the user's cache folder."""

from pathlib import Path

import jax
import pytest

from hae_jax.commands.devices import use_compilation_cache


@pytest.fixture
def restored():
    before = jax.config.jax_compilation_cache_dir
    yield before
    jax.config.update("jax_compilation_cache_dir", before)


def test_the_user_s_cache_folder_unless_another_is_named(restored, tmp_path, monkeypatch):
    use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == restored  # the folder of these tests
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    use_compilation_cache()
    assert Path(jax.config.jax_compilation_cache_dir) == tmp_path / "hae-jax" / "compiled"
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.delenv("XDG_CACHE_HOME")
    use_compilation_cache()
    assert Path(jax.config.jax_compilation_cache_dir) == Path.home() / ".cache" / "hae-jax" / "compiled"
