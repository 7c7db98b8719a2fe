"""The installed wheel in an empty folder: every command starts, and the shipped network finds lesions in a phantom."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = ("train", "translate", "make_phantom", "prepare_data", "ablate", "compare_methods", "convert_torch_weights",
            "benchmark", "report", "bids", "export")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Runs Python with the wheel's files and no other files of this project."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir",
                    str(folder), str(ROOT)], check=True)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    (folder / "empty").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(folder / "site"), "JAX_PLATFORMS": "cpu",
                   "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    del environment["XLA_FLAGS"]  # as for a user; with the flags of the tests, translation would take longer

    def run(code):
        return subprocess.run([sys.executable, "-c", code], cwd=folder / "empty", env=environment, check=True,
                              capture_output=True, text=True).stdout

    return run


def test_every_command_opens_and_presets_have_names(installed):
    said = installed("import sys, importlib, contextlib, io\n"
                     f"for name in {COMMANDS}:\n"
                     "    with contextlib.suppress(SystemExit):\n"
                     "        importlib.import_module(f'hae_jax.commands.{name}').main(['--help'])\n")
    assert said.count("usage:") == len(COMMANDS)
    said = installed("from hae_jax.commands.train import main; main(['--config', 'phantom', '--print-sharding'])")
    assert "input_blocks" in said


def test_the_shipped_network_on_a_phantom(installed):
    """The first steps of a user: a phantom, and its masks with the weights and the calibration in the wheel."""
    installed("from hae_jax.commands.make_phantom import main\n"
              "main(['--output', 'cases', '--subjects', '1', '--size', '0.1', '--workers', '1'])")
    said = installed("from hae_jax.commands.translate import main\n"
                     "main(['--checkpoint', 'phantom', '--input', 'cases', '--output', 'results', "
                     "'--config.translation.batch_size=8'])")
    assert "came with the weights" in said
    assert "PHANTOM metrics from 1 case," in said
    found = json.loads(installed("print(open('results/metrics.json').read())"))
    assert (found["method"], found["labels"]) == ("residual", "image labels")
    written = json.loads(installed("import os, json; print(json.dumps(sorted(os.listdir('results'))))"))
    assert {"Phantom_00000_mask.nii.gz", "Phantom_00000_map.nii.gz", "cases.csv", "report.html"} <= set(written)
    assert said.splitlines()[-1] == "results/report.html"


def test_importing_the_package_is_quick_and_leaves_jax_alone(installed):
    said = installed("import sys, time; start = time.process_time(); import hae_jax\n"
                     "print('jax' in sys.modules, time.process_time() - start < 1)")
    assert said.split() == ["False", "True"]
