"""Commands as users run them: help without importing JAX, errors of one line, the exit status."""

import subprocess
import sys
from pathlib import Path

import pytest

from hae_jax.commands.common import entry_point
from hae_jax.commands.config import read_config
from hae_jax.commands.train import main
from hae_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
PHANTOM = str(ROOT / "configs" / "phantom.py")


@pytest.mark.parametrize("script", ["train.py", "translate.py", "tools/make_phantom.py", "tools/prepare_data.py",
                                    "tools/convert_torch_weights.py", "tools/compare_methods.py", "tools/benchmark.py"])
def test_every_front_door_has_help_and_opens_from_any_folder(script, tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / script), "--help"], cwd=tmp_path, capture_output=True, text=True,
                          check=True)
    assert "usage:" in done.stdout
    assert done.stderr == ""


def test_help_names_the_commands_as_they_are_installed(monkeypatch, capsys):
    """The help of hae-train names hae-train, since `pip install` installs no scripts. In a clone it names train.py."""
    for program, own, other in (("train.py", "python train.py", "hae-"), ("hae-train", "\n  hae-train", "train.py")):
        monkeypatch.setattr(sys, "argv", [f"/somewhere/{program}"])
        with pytest.raises(SystemExit):
            main(["--help"])
        said = capsys.readouterr().out
        assert said.startswith(f"usage: {program}")
        assert own in said
        assert other not in said
        assert "configs/phantom.py" in said  # presets keep their names


def test_a_mistake_is_one_line_and_status_2(capsys):
    @entry_point
    def command(argv):
        raise UserError("data.root: no such\nfolder; make it")

    with pytest.raises(SystemExit) as stop:
        command([])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: data.root: no such folder; make it\n"


@pytest.mark.parametrize("bug", [KeyError("bug"), FileNotFoundError(2, "No such file or directory", "bug")])
def test_a_bug_keeps_its_traceback(bug):
    @entry_point
    def command(argv):
        raise bug

    with pytest.raises(type(bug)):
        command([])


def test_a_full_disk_is_one_line(capsys):
    @entry_point
    def command(argv):
        raise OSError(28, "No space left on device", "out/cases.csv")

    with pytest.raises(SystemExit) as stop:
        command([])
    assert stop.value.code == 2
    assert capsys.readouterr().err == ("error: out/cases.csv: No space left on device; finished results are kept; "
                                       "make space, then run the command again\n")


@pytest.mark.parametrize(("arguments", "said"), [
    (["--config", "nowhere.py"], "--config nowhere.py: no such file"),
    (["--config", PHANTOM, "--config.training.stepz=3"], "did you mean diffusion.steps or training.steps?"),
    (["--config", PHANTOM, "--config.training.steps=many"], "training.steps takes a whole number"),
    (["--config", PHANTOM, "--steps", "3"], "--steps: unknown argument"),
    (["--config", PHANTOM, "--profile", "3"], "--profile 3: give the first and the last step"),
    (["--config", PHANTOM, "--process-id", "1"], "belong together"),
])
def test_bad_arguments_of_training_are_named(arguments, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--workdir", "run"])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_overrides_reach_the_config():
    config = read_config(PHANTOM, ["--config.model.channel_mult=(1,2)", "--config.translation.respacing=20",
                                   "--config.training.clip_norm=1", "--config.data.root=/with a space"])
    assert config.model.channel_mult == (1, 2)
    assert config.translation.respacing == "20"
    assert config.training.clip_norm == 1.0
    assert config.data.root == "/with a space"


def test_a_dry_run_and_the_sharding_are_said_and_nothing_is_written(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["--config", PHANTOM, "--dry-run", "--print-sharding", "--config.training.mesh=(1,-1)"])
    said = capsys.readouterr().out
    assert "parameters: 4,029,372" in said
    assert "model" in said
    assert list(tmp_path.iterdir()) == []


def test_a_workdir_is_needed_to_train(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--config", PHANTOM])
    assert stop.value.code == 2
    assert "--workdir is missing" in capsys.readouterr().err
