"""The whole loop on a tiny network: devices, accumulation, resuming, written files, stopping."""

import errno
import itertools
import json

import jax
import numpy as np
import pytest

from hae_jax.diffusion import noise
from hae_jax.errors import UserError
from hae_jax.torch_interop.weights import torch_state
from hae_jax.training import checkpoint, loop, weights
from hae_jax.training.loop import train
from hae_jax.training.weights import export_weights


def losses(workdir):
    return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def saved_state(workdir, step):
    """The arrays of a checkpoint by name."""
    checkpoints = checkpoint.Checkpoints(workdir)
    arrays = {}
    for item in ("params", "ema", "optimizer", "progress"):
        restored = checkpoints._manager.restore(
            step, args=checkpoint.ocp.args.Composite(**{item: checkpoint.ocp.args.StandardRestore()}))
        arrays |= {f"{item}/{name}": np.asarray(value) for name, value in restored[item].items()}
    checkpoints.close()
    return arrays


@pytest.fixture(scope="module")
def finished(one_level_settings, tmp_path_factory):
    """A run of three steps on all four devices, with sample grids. Tests must not change it."""
    workdir = tmp_path_factory.mktemp("finished")
    config = one_level_settings()
    config.training.sample_every = 2
    config.training.sample_steps = 2
    config.training.sample_guidance = (0.0, 2.0)
    train(config, workdir)
    return workdir


def test_sharded_parameters_and_accumulated_parts_give_the_same_losses(one_level_config, tmp_path, finished):
    """The same as with four devices that hold all parameters each and a batch that is computed at once."""
    one_level_config.training.mesh = (1, -1)
    one_level_config.training.accumulation = 4
    train(one_level_config, tmp_path, jax.devices()[:2])
    np.testing.assert_allclose(losses(tmp_path), losses(finished), rtol=1e-5)


def test_a_run_begins_with_exported_weights(one_level_config, tmp_path, finished):
    """Parameters and EMA weights start from them. The run can then be resumed. Other networks' weights are refused."""
    exported = export_weights(finished, tmp_path / "weights")
    config = one_level_config
    config.training.update({"initial_weights": str(tmp_path / "weights"), "learning_rate": 0.0, "steps": 1})
    train(config, tmp_path / "run")
    ours, theirs = (torch_state(checkpoint.load_network(path, ema=ema).model)
                    for path, ema in ((tmp_path / "run", False), (finished, True)))
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value.astype(np.float16), err_msg=name)
    assert exported.identity["step"] == 3
    config.model.num_res_blocks = 2
    with pytest.raises(UserError, match=r"initial_weights .* its network differs in model\.num_res_blocks; give"):
        train(config, tmp_path / "other")


def test_earlier_weights_stay_if_new_ones_cannot_be_written(tmp_path, finished, monkeypatch):
    export_weights(finished, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(weights, "write_state_dict", full)
    with pytest.raises(OSError, match="No space"):
        export_weights(finished, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_run_without_a_checkpoint_starts_anew(one_level_config, tmp_path, capsys):
    """The best network of an interrupted run may have had another config. Annealing to another step is announced."""
    stale = [tmp_path / name for name in ("best/config.json", "best/model.safetensors", "samples/step_0000001.png",
                                          "wandb_id")]
    for path in stale:
        path.parent.mkdir(exist_ok=True)
        path.write_text("stale")
    one_level_config.training.update({"steps": 1, "anneal": "linear"})
    train(one_level_config, tmp_path)
    assert not any(path.exists() for path in stale)
    one_level_config.training.steps = 2
    train(one_level_config, tmp_path)
    assert "training.steps was 1: the learning rate is now annealed towards step 2" in capsys.readouterr().out


def test_bfloat16_computes_nearly_the_same_with_float32_parameters(one_level_config, tmp_path, finished):
    one_level_config.model.dtype = "bfloat16"
    train(one_level_config, tmp_path)
    np.testing.assert_allclose(losses(tmp_path), losses(finished), rtol=0.02)
    assert losses(tmp_path) != losses(finished)
    assert {str(a.dtype) for name, a in saved_state(tmp_path, 3).items() if name.startswith("params")} == {"float32"}


def test_six_steps_at_once_equal_three_and_three(one_level_config, tmp_path):
    """Exactly equal: parameters, EMA weights, optimiser, step, and all logged values except speed."""
    config = one_level_config
    config.training.log_every = 2  # the restart falls between two lines
    config.training.steps = 6
    train(config, tmp_path / "whole")
    config.training.save_every = 3
    train_until(config, tmp_path / "parts", 3)
    train(config, tmp_path / "parts")
    whole, parts = saved_state(tmp_path / "whole", 6), saved_state(tmp_path / "parts", 6)
    assert whole.keys() == parts.keys()
    for name in whole:
        np.testing.assert_array_equal(whole[name], parts[name], err_msg=name)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")


def train_until(config, workdir, step):
    """Trains and ends, as if killed, directly after saving of the checkpoint of `step` has started."""
    save = checkpoint.Checkpoints.save

    def save_and_die(self, state, tree):
        save(self, state, tree)
        if int(state.step) == step:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint.Checkpoints, "save", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            train(config, workdir)


def test_a_finished_run_is_left_alone(one_level_config, finished, capsys):
    before = (finished / "metrics.jsonl").read_bytes()
    train(one_level_config, finished)
    assert (finished / "metrics.jsonl").read_bytes() == before
    assert "already trained" in capsys.readouterr().out


def test_what_a_run_writes(finished):
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert {"loss", "gradient_norm", "learning_rate", "parameter_norm", "ema_distance"} <= line.keys()
        assert ("images_per_second" in line) == (line["step"] > 1)  # the first step is compiled
        assert any(name.startswith("loss_t") for name in line)
    assert sorted(p.name for p in (finished / "samples").iterdir()) == ["step_0000002.png", "step_0000003.png"]
    assert (finished / "loss.png").stat().st_size > 1000
    assert list((finished / "tensorboard").iterdir())
    assert json.loads((finished / "config.json").read_text())["model"]["image_size"] == 16
    assert "Research use only" in json.loads((finished / "run.json").read_text())["notice"]


def test_the_network_of_a_run_can_be_loaded_alone(finished):
    averaged, last = checkpoint.load_network(finished), checkpoint.load_network(finished, ema=False)
    assert averaged.identity["step"] == 3
    assert averaged.identity["parameters"] == "ema 0.9"
    arrays = saved_state(finished, 3)
    for network, prefix in ((averaged, "ema/0"), (last, "params")):
        np.testing.assert_array_equal(network.model.head_conv.bias[...], arrays[f"{prefix}/head_conv/bias"])


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(one_level_config, tmp_path):
    one_level_config.training.save_every = 1
    one_level_config.training.steps = 2
    train(one_level_config, tmp_path)
    one_level_config.training.steps = 6
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(noise, "gaussian", lambda keys, shape: np.full((len(keys), *shape), np.nan, np.float32))
        with pytest.raises(UserError, match=r"step 3 gave loss nan.*checkpoint 2 is kept"):
            train(one_level_config, tmp_path)
    assert checkpoint.load_network(tmp_path).identity["step"] == 2
    assert len(losses(tmp_path)) == 2


@pytest.mark.parametrize(("field", "value", "message"), [
    ("training.batch_size", 6, r"training\.batch_size is 6: 4 devices x 1 .* set it to 8"),
    ("training.batch_size", 10**9, r"need 4.1e\+03 GB, and this machine has .* GB of memory; set it lower"),
    ("training.accumulation", 3, r"set it to 12"),
    ("training.steps", 0, r"training\.steps is 0"),
    ("training.p_uncond", 1.5, r"training\.p_uncond"),
    ("training.learning_rate", -1e-4, r"training\.learning_rate is -0\.0001: it must not be negative"),
    ("training.clip_norm", 0.0, r"training\.clip_norm is 0\.0: .* None turns clipping off"),
    ("training.ema_rates", (), r"training\.ema_rates"),
    ("training.anneal", "exp", r"training\.anneal"),
    ("model.image_size", 32, r"has slices of \(16, 16, 4\)"),
    ("model.variant", "hae_v3", r"model\.variant"),
    ("data.root", "/nowhere", r"/nowhere"),
    ("data.modalities", ("t1", "b", "c", "d"), r"channels are flair, t1, t1ce, t2, but data\.modalities is t1, b"),
    ("data.modalities", ("t1",), r"data\.modalities names 1 channels \(t1\), but model\.in_channels is 4; change"),
])
def test_bad_settings_are_named_before_anything_is_written(tiny_config, tmp_path, field, value, message):
    section, name = field.split(".")
    tiny_config[section][name] = value
    with pytest.raises(UserError, match=message):
        train(tiny_config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_does_not_go_on_with_another_config(one_level_config, finished):
    one_level_config.training.learning_rate = 5e-4
    one_level_config.model.num_heads = 2
    with pytest.raises(UserError, match=r"num_heads was 4, is 2; training\.learning_rate was 0\.001, is 0\.0005"):
        train(one_level_config, finished)


def test_what_was_trained_is_saved_before_a_worker_s_death(one_level_config, tmp_path, finished, monkeypatch):
    batches = loop.train_batches

    def dying(*arguments, **options):
        yield from itertools.islice(batches(*arguments, **options), 2)
        raise UserError("one of 2 data workers was killed")

    monkeypatch.setattr(loop, "train_batches", dying)
    with pytest.raises(UserError, match="was killed; step 2 is saved: the same command resumes from there"):
        train(one_level_config, tmp_path)
    monkeypatch.undo()
    train(one_level_config, tmp_path)
    np.testing.assert_array_equal(losses(tmp_path), losses(finished))
