"""All usual kinds of files are read. No file can run code, and damaged files are refused."""

import argparse
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch_modules import tensors

from hae_jax.errors import UserError
from hae_jax.torch_interop.files import read_adamw, read_state_dict, write_state_dict

STATE = {"time_embed.0.weight": np.arange(6, dtype=np.float32).reshape(2, 3) / 8, "out.2.bias": np.float32([0.5, -2])}


class RunsCode:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def same(state):
    assert list(state) == list(STATE)
    for name, value in STATE.items():
        np.testing.assert_array_equal(state[name], value, strict=True)


def message(read, path) -> str:
    with pytest.raises(UserError) as caught:
        read(path)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(str(path))
    return text


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_all_precisions_become_float32(tmp_path, dtype, suffix):
    state = {name: value.to(dtype) for name, value in tensors(STATE).items()}
    path = tmp_path / f"model{suffix}"
    (torch.save if suffix == ".pt" else safetensors.torch.save_file)(state, path)
    read = read_state_dict(path)
    assert read.keys() == STATE.keys()  # .safetensors sorts the names
    same({name: read[name] for name in STATE})


@pytest.mark.parametrize("wrap", [
    lambda state: state,
    lambda state: {"state_dict": state, "epoch": 3, "optimizer": {"state": {}}},
    lambda state: {"model": {"state_dict": state}, "ema": {"a": torch.ones(1)}},
    lambda state: {"ema": state},
    lambda state: {f"module.{name}": value for name, value in state.items()},
    lambda state: {"model": {f"module._orig_mod.{name}": value for name, value in state.items()}},
    lambda state: {"state_dict": {f"model.{name}": value for name, value in state.items()}},  # Lightning
    lambda state: {f"net.module.{name}": value for name, value in state.items()},
    lambda state: {name: torch.nn.Parameter(value) for name, value in state.items()},
])
@pytest.mark.parametrize("new", [True, False])
def test_nested_and_wrapped_state_dicts(tmp_path, wrap, new):
    torch.save(wrap(tensors(STATE)), tmp_path / "model.pt", _use_new_zipfile_serialization=new)
    same(read_state_dict(tmp_path / "model.pt"))


def test_the_preferred_nested_state_dict_is_taken(tmp_path, on_message):
    torch.save({"model": {"a": torch.ones(1)}, "ema": tensors(STATE)}, tmp_path / "both.pt")
    messages = []
    on_message(messages.append)
    same(read_state_dict(tmp_path / "both.pt", ("ema", "model")))
    assert not messages
    read_state_dict(tmp_path / "both.pt")
    assert "reads the weights under model; those under ema are read with --ema" in messages[0]


@pytest.mark.parametrize(("value", "says"), [
    (torch.zeros(2, 2).to_sparse(), "a is sparse; save the weights as dense arrays"),
    (torch.zeros(2, device="meta"), "a is without values; save"),
    (torch.zeros(2, dtype=torch.complex64), "a is of type torch.complex64"),
])
def test_tensors_that_are_no_dense_arrays_are_named(tmp_path, value, says):
    torch.save({"a": value}, tmp_path / "model.pt")
    assert says in message(read_state_dict, tmp_path / "model.pt")


def test_a_dictionary_that_holds_itself_ends(tmp_path):
    endless = {}
    endless["model"] = endless
    torch.save(endless, tmp_path / "model.pt")
    assert "model is of type dict" in message(read_state_dict, tmp_path / "model.pt")


@pytest.mark.parametrize("step", [float("inf"), float("nan")])
def test_an_optimizer_s_step_that_is_no_number_is_named(tmp_path, step):
    moments = {"step": torch.tensor(step), "exp_avg": torch.zeros(1), "exp_avg_sq": torch.zeros(1)}
    torch.save({"state": {0: moments}, "param_groups": [{"params": [0]}]}, tmp_path / "opt.pt")
    assert "not the state of AdamW" in message(read_adamw, tmp_path / "opt.pt")


def test_a_pickle_that_wants_to_run_code_is_refused(tmp_path):
    path, written = tmp_path / "evil.pt", tmp_path / "written"
    evil = {"a": RunsCode(written)}
    for new in (True, False):
        torch.save(evil, path, _use_new_zipfile_serialization=new)
        assert "refused, since loading it would run code (posix.mkdir)" in message(read_state_dict, path)
        assert "refused" in message(read_adamw, path)
    for protocol in (2, 4, 5):
        path.write_bytes(pickle.dumps(evil, protocol))
        assert "refused" in (text := message(read_state_dict, path)) or "nothing in it was run" in text
    assert not written.exists()
    pickle.loads(path.read_bytes())
    assert written.exists()  # without protection, the code runs


def test_a_harmless_object_is_refused_by_its_name(tmp_path):
    torch.save({"model": tensors(STATE), "args": argparse.Namespace(lr=1)}, tmp_path / "a.pt")
    assert "argparse.Namespace" in message(read_state_dict, tmp_path / "a.pt")


@pytest.mark.parametrize("kind", ["new", "legacy", "safetensors"])
def test_a_truncated_file_is_one_line(tmp_path, kind):
    path = tmp_path / ("model.safetensors" if kind == "safetensors" else "model.pt")
    state = {"a": torch.zeros(3000), "b": torch.zeros(70)}
    if kind == "safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "new")
    whole = path.read_bytes()
    for length in [0, 1, 7, 30, 150, 300, 500, 1000, 5000, len(whole) - 200, len(whole) - 1]:
        path.write_bytes(whole[:length])
        text = message(read_state_dict, path)
        # If an old file is cut within the name of a class, it names a class that PyTorch does not know.
        assert "damaged or truncated" in text or (kind == "legacy" and length == 300 and "refused" in text)


def test_a_file_is_what_it_holds_not_what_it_is_called(tmp_path):
    for name in ("a.pt", "a.SAFETENSORS", "a.ckpt"):
        safetensors.torch.save_file(tensors(STATE), tmp_path / name)
        read = read_state_dict(tmp_path / name)
        same({name: read[name] for name in STATE})
    torch.save(tensors(STATE), tmp_path / "b.safetensors")
    assert "was written by torch.save, although its name says safetensors" in message(
        read_state_dict, tmp_path / "b.safetensors")


def test_an_optimizer_given_as_weights_is_named(tmp_path):
    torch.save({"state": {}, "param_groups": [{"params": [0]}]}, tmp_path / "opt000006.pt")
    text = message(read_state_dict, tmp_path / "opt000006.pt")
    assert "is the state of an optimizer; give it with --optimizer" in text


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(tmp_path, bad):
    name = next(iter(STATE))
    state = {**tensors(STATE), name: torch.full(STATE[name].shape, bad)}
    torch.save(state, tmp_path / "a.pt")
    text = message(read_state_dict, tmp_path / "a.pt")
    assert f"1 of {len(STATE)} arrays hold NaN or infinite values, first {name} " in text
    assert "had diverged" in text


def test_what_is_no_state_dict_is_named(tmp_path):
    path = tmp_path / "a.pt"
    assert "no such file" in message(read_state_dict, path)
    path.write_text("a text")
    assert "damaged" in message(read_state_dict, path)
    for value, said in ((3, "no state dict"), ({}, "no state dict"), ([torch.ones(2)], "no state dict"),
                        ({"a": torch.ones(2), "epoch": 7}, "epoch is of type int"),
                        ({"a": torch.ones(2, dtype=torch.int64)}, "a is of type torch.int64")):
        torch.save(value, path)
        assert said in message(read_state_dict, path)


def test_safetensors_needs_no_pytorch(tmp_path, monkeypatch):
    safetensors.torch.save_file(tensors(STATE), tmp_path / "a.safetensors")
    torch.save(tensors(STATE), tmp_path / "a.pt")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert read_state_dict(tmp_path / "a.safetensors").keys() == STATE.keys()
    write_state_dict(tmp_path / "b.safetensors", STATE)
    assert "pip install torch" in message(read_state_dict, tmp_path / "a.pt")


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_written_files_are_read_by_pytorch_and_never_replaced(tmp_path, name):
    path = tmp_path / "new" / name
    write_state_dict(path, STATE)
    load = torch.load if path.suffix == ".pt" else safetensors.torch.load_file
    assert {k: v.tolist() for k, v in load(path).items()} == {k: v.tolist() for k, v in STATE.items()}
    with pytest.raises(UserError, match="exists already"):
        write_state_dict(path, STATE)
    assert [p.name for p in path.parent.iterdir()] == [name]
    with pytest.raises(UserError, match=r"must end in \.pt"):
        write_state_dict(tmp_path / "model.npz", STATE)


def optimizer_of(kind: type[torch.optim.Optimizer], **settings) -> torch.optim.Optimizer:
    """An optimiser of three parameters after two steps. The second parameter never had a gradient."""
    params = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(4))]
    optimizer = kind(params, **settings)
    for _ in range(2):
        params[0].grad, params[2].grad = torch.full((2,), 2.0), torch.full((4,), -1.0)
        optimizer.step()
    return optimizer


def test_moments_are_read_in_the_order_of_the_parameters(tmp_path):
    path = tmp_path / "opt.pt"
    torch.save(optimizer_of(torch.optim.AdamW, lr=1e-4, weight_decay=0.0).state_dict(), path)
    adamw = read_adamw(path)
    assert adamw.step == 2
    np.testing.assert_allclose(adamw.exp_avg[0], np.full(2, 2 * (1 - 0.9**2)), rtol=1e-5)
    np.testing.assert_allclose(adamw.exp_avg_sq[2], np.full(4, 1 - 0.999**2), rtol=1e-4)
    assert adamw.exp_avg[1] is None
    assert (adamw.settings["lr"], adamw.settings["betas"]) == (1e-4, (0.9, 0.999))


def test_what_is_no_adamw_is_named(tmp_path):
    path = tmp_path / "opt.pt"
    torch.save(tensors(STATE), path)
    assert "not the state dict of an optimiser" in message(read_adamw, path)
    torch.save(optimizer_of(torch.optim.SGD, lr=1.0, momentum=0.9).state_dict(), path)
    assert "no moments of Adam" in message(read_adamw, path)
    two = torch.optim.AdamW([{"params": [torch.nn.Parameter(torch.ones(2))]}, {"params": []}])
    torch.save(two.state_dict(), path)
    assert "2 parameter groups" in message(read_adamw, path)
    safetensors.torch.save_file(tensors(STATE), tmp_path / "opt.safetensors")
    assert "holds no optimiser" in message(read_adamw, tmp_path / "opt.safetensors")
