"""The notebook is executed, and it agrees with the script beside it."""

import os
from pathlib import Path

import jax
import jupytext
import nbclient
import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "examples" / "localize.ipynb"


@pytest.fixture(scope="module")
def stored():
    return nbformat.read(NOTEBOOK, as_version=4)


def test_the_script_is_the_same_page(stored):
    script = jupytext.read(NOTEBOOK.with_suffix(".py"))
    assert [(cell.cell_type, cell.source) for cell in script.cells] == [
        (cell.cell_type, cell.source) for cell in stored.cells]


def test_it_is_stored_executed_with_pictures(stored):
    code = [cell for cell in stored.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert sum("image/png" in output.get("data", {}) for cell in code for output in cell.outputs) >= 3


def test_it_runs(stored, monkeypatch, tmp_path):
    """Its output equals the stored output. A failing cell is an error."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.delenv("XLA_FLAGS")  # here, slow code would take longer than compilation
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    page = nbformat.from_dict(stored)
    nbclient.NotebookClient(page, timeout=600, kernel_name="python3").execute()
    said = [output.text for cell in page.cells for output in cell.get("outputs", []) if output.output_type == "stream"
            and output.name == "stdout"]
    assert "the same lesion: True" in "".join(said)
    assert "healthy_fpr" in "".join(said)
    assert "mixture" in "".join(said)
