"""The command as users run it: the network it finds, the files it writes, and errors of one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch

from hae_jax.commands.config import read_config
from hae_jax.commands.convert_torch_weights import main
from hae_jax.torch_interop.files import read_state_dict
from hae_jax.torch_interop.weights import torch_state
from hae_jax.training.checkpoint import check_same_run, load_network
from hae_jax.training.weights import SHIPPED, WEIGHTS

ROOT = Path(__file__).resolve().parents[2]


def weights_of(golden, name: str) -> dict[str, np.ndarray]:
    """Small numbers under the names and shapes of a reference network."""
    rng = np.random.default_rng(0)
    lines = (golden / f"{name}.keys.tsv").read_text().splitlines()
    shapes = {key: tuple(map(int, shape.split("x"))) for key, shape in (line.split("\t") for line in lines)}
    return {key: 0.1 * rng.standard_normal(shape, np.float32) for key, shape in shapes.items()}


def tensors(state, dtype=torch.float32):
    return {name: torch.from_numpy(value).to(dtype) for name, value in state.items()}


def refused(arguments, capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_help_opens_from_any_folder(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "tools" / "convert_torch_weights.py"), "--help"], cwd=tmp_path,
                          capture_output=True, text=True, check=True)
    assert "--to-torch RUN FILE" in done.stdout
    assert done.stderr == ""


def test_without_a_config_the_network_is_found_and_comes_back(golden, tmp_path, monkeypatch, capsys):
    """Reads a wrapped bfloat16 EMA, resumes with the printed command's config, and writes a file for PyTorch."""
    monkeypatch.chdir(tmp_path)
    state = weights_of(golden, "hae_v2c_options")
    torch.save({"ema": {f"module.{name}": value for name, value in tensors(state, torch.bfloat16).items()}},
               "ema_0.99_000007.pt")
    main(["--checkpoint", "ema_0.99_000007.pt", "--output", "runs/imported", "--verify"])
    out = capsys.readouterr().out
    for said in ("variant hae_v2c", "in_channels 1", "out_channels 2", "num_classes 3", "resblock_updown True",
                 "bottleneck_ratio 0.5", "attention_resolutions (1, 2)", "use_scale_shift_norm False",
                 "not in the weights, taken from the config: image_size 128, num_heads 4", "sparse_pattern is 'blocks'",
                 "data.modalities names 4 channels (flair, t1, t1ce, t2), but the network has 1; give",
                 "step 7, 1042562 parameters", "EMA weights 0.99: ema_0.99_000007.pt", "verified: "):
        assert said in out
    rounded = {name: value.float().numpy() for name, value in tensors(state, torch.bfloat16).items()}
    network = load_network("runs/imported")
    assert (network.identity["step"], network.identity["parameters"]) == (7, "ema 0.99")
    assert network.config == json.loads(Path("runs/imported/config.json").read_text())
    assert network.config["diffusion"]["variance"] == "learned_range"
    check_same_run("runs/imported", network.config, read_config("runs/imported/config.py", []).to_dict())
    for arguments, load in ((["out.pt", "--ema"], torch.load), (["out.safetensors"], safetensors.numpy.load_file)):
        main(["--to-torch", "runs/imported", *arguments])
        written = load(arguments[0])
        assert written.keys() == rounded.keys()
        assert all(np.array_equal(written[name], rounded[name]) for name in rounded)
        assert arguments[0] in capsys.readouterr().out


def test_an_unconditional_network_is_found(golden, tmp_path):
    state = {name: value for name, value in weights_of(golden, "fpdm_tiny").items()
             if not name.startswith(("label_emb", "class_emb"))}
    safetensors.numpy.save_file(state, tmp_path / "a.safetensors")
    main(["--checkpoint", str(tmp_path / "a.safetensors"), "--output", str(tmp_path / "run")])
    network = load_network(tmp_path / "run")
    assert network.config["model"]["num_classes"] is None
    assert all(np.array_equal(value, state[name]) for name, value in torch_state(network.model).items())
    again = read_config(str(tmp_path / "run" / "config.py"), [])
    check_same_run(tmp_path / "run", network.config, again.to_dict())


def test_what_cannot_be_imported_is_one_line_and_nothing_is_written(golden, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    state = weights_of(golden, "hae_tiny")
    torch.save(tensors(state), "model.pt")
    torch.save(os.system, "code.pt")
    Path("cut.pt").write_bytes(Path("model.pt").read_bytes()[:-1000])
    torch.save(tensors({name: value for name, value in state.items() if name != "out.2.weight"}), "part.pt")
    config = str(ROOT / "configs" / "phantom.py")
    before = sorted(os.listdir())
    for arguments, said in (
        (["nowhere.pt"], "nowhere.pt: no such file"),
        (["code.pt"], "code.pt: refused, since loading it would run code"),
        (["cut.pt"], "cut.pt: damaged or truncated"),
        (["part.pt"], "part.pt: not the weights of one of the five networks: out.2.weight is missing"),
        (["model.pt", "--config", config], f"model.pt does not fit {config}: model.variant is 'hae_v2c'"),
        (["model.pt", "--ema", "model.pt", "--config", config, "--config.training.ema_rates=(0.9,0.99)"], "model.pt"),
        (["model.pt", "--config", "nowhere.py"], "--config nowhere.py: no such file"),
        (["model.pt", "--optimizer", "model.pt"], "not the state dict of an optimiser"),
    ):
        assert said in refused(["--checkpoint", *arguments, "--output", "run"], capsys)
        assert sorted(os.listdir()) == before
    assert "run: there is no such folder" in refused(["--to-torch", "run", "a.pt"], capsys)


def test_shipped_weights_go_to_pytorch(tmp_path, capsys):
    """They hold EMA weights alone, which are written without --ema."""
    main(["--to-torch", "phantom", str(tmp_path / "model.pt")])
    written, shipped = torch.load(tmp_path / "model.pt"), read_state_dict(SHIPPED / "phantom" / WEIGHTS)
    assert written.keys() == shipped.keys()
    assert all(np.array_equal(written[name], shipped[name]) for name in shipped)
    assert "ema 0.999" in capsys.readouterr().out


def test_the_printed_commands_are_those_of_the_installation_and_can_be_pasted(golden, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["/bin/hae-convert-torch-weights"])
    torch.save(tensors(weights_of(golden, "hae_tiny")), "model.pt")
    main(["--checkpoint", "model.pt", "--output", "first"])
    main(["--checkpoint", "model.pt", "--config", "first/config.py", "--config.training.ema_rates=(0.9,)",
          "--output", "my run"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[-2] == "to translate: hae-translate --checkpoint 'my run' --input FOLDER"
    assert printed[-1] == ("to continue: hae-train --config first/config.py '--config.training.ema_rates=(0.9,)' "
                           "--workdir 'my run'")
    torch.save(tensors({"conv.weight": np.ones(3, np.float32), "conv.bias": np.ones(3, np.float32), "a": np.ones(1)}),
               "other.pt")
    said = refused(["--checkpoint", "other.pt", "--config", "first/config.py", "--output", "other"], capsys)
    assert "other.pt: state dict of another architecture: none of its 3 names, such as conv.weight, is" in said
    assert "hae-train" in refused(["--to-torch", "nowhere", "a.pt"], capsys)


@pytest.mark.parametrize("arguments", [
    [], ["--checkpoint", "a.pt"], ["--to-torch", "run", "a.pt", "--output", "b"],
    ["--checkpoint", "a.pt", "--output", "b", "--config.seed=3"], ["--checkpoint", "a.pt", "--output", "b", "--ema"],
    ["--to-torch", "run", "a.pt", "--verify"], ["--to-torch", "run", "a.pt", "--optimizer", "opt.pt"],
])
def test_arguments_that_do_not_belong_together_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage:" in capsys.readouterr().err
