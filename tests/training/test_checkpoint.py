"""Damaged, older and interrupted checkpoints, failing saves, and settings that may change when a run is resumed."""

import json
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hae_jax.errors import UserError
from hae_jax.training import checkpoint
from hae_jax.training.checkpoint import Checkpoints, check_same_run, load_network
from hae_jax.training.integrity import CHECKSUMS, damage
from hae_jax.training.mesh import make_mesh, replicated
from hae_jax.training.state import (
    TrainState,
    empty_window,
    make_optimizer,
    network_config,
    sharded_initial_state,
)
from hae_jax.training.weights import export_weights, load_trained

CONFIG = {"training": {"steps": 9, "ema_rates": [0.9]}}
SIZE = 200_000  # elements of the one parameter


def state_of(step):
    """A state in which all arrays contain the step."""
    fields = dict.fromkeys(TrainState._fields, jnp.asarray(step, jnp.int32)) | {"window": empty_window()}
    numbers = np.random.default_rng(step).random(SIZE, np.float32)
    return TrainState(**fields | {"params": {"w": jnp.asarray(numbers)}, "ema": ({"w": jnp.full(3, step, "f4")},),
                                  "opt_state": {"mu": {"w": jnp.full(3, step, "f4")}}})


def saved(workdir, steps):
    """Saves these steps as one run."""
    checkpoints = Checkpoints(workdir)
    for step in steps:
        checkpoints.save(state_of(step), CONFIG)
    checkpoints.close()
    return workdir / "checkpoints"


def restored(checkpoints, step):
    shardings = jax.tree.map(lambda _: replicated(make_mesh()), state_of(0))
    return checkpoints.restore(step, state_of(0), shardings)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def largest_file(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1000])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def remove(path):
    path.unlink()


@pytest.mark.parametrize("harm", [truncate, flip, remove])
def test_a_damaged_newest_checkpoint_is_moved_aside_and_the_one_before_is_used(tmp_path, capsys, harm):
    folder = saved(tmp_path, (3, 6, 9))
    victim = largest_file(folder / "9")
    harm(victim)
    left = sorted(path.relative_to(folder / "9") for path in (folder / "9").rglob("*"))
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.recover() == 6
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert f"checkpoint 9 is damaged ({victim.relative_to(folder / '9')} " in said
    assert "using checkpoint 6" in said
    assert_same(restored(checkpoints, 6), state_of(6))
    aside = folder / "9.damaged"
    assert sorted(path.relative_to(aside) for path in aside.rglob("*")) == left
    checkpoints.save(state_of(9), CONFIG)
    checkpoints.close()
    again = Checkpoints(tmp_path)
    assert again.recover() == 9
    assert_same(restored(again, 9), state_of(9))
    again.close()


def test_one_flipped_bit_in_any_file_of_a_checkpoint_is_found(tmp_path):
    folder = saved(tmp_path, (3,)) / "3"
    assert damage(folder) is None
    names = json.loads((folder / CHECKSUMS).read_text())["files"]
    unsealed = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - names.keys()
    assert unsealed == {CHECKSUMS, *checkpoint._COMMIT_FILES}
    for name in names:
        before = (folder / name).read_bytes()
        flip(folder / name)
        assert damage(folder).startswith(f"{name} has another checksum")
        (folder / name).write_bytes(before)
    assert damage(folder) is None
    truncate(folder / CHECKSUMS)
    assert damage(folder) == f"{CHECKSUMS} is not readable"


def test_when_all_are_damaged_the_run_does_not_begin_anew(tmp_path):
    folder = saved(tmp_path, (3, 6))
    for step in ("3", "6"):
        flip(largest_file(folder / step))
    for _ in range(2):  # the second try has the same result
        checkpoints = Checkpoints(tmp_path)
        with pytest.raises(UserError, match=r"no intact checkpoint \(6: params/.* has another checksum; 3: .*restore"):
            checkpoints.recover()
        checkpoints.close()
    assert sorted(path.name for path in folder.iterdir()) == ["3", "6"]


def test_a_checkpoint_without_checksums_is_not_trusted(tmp_path, capsys):
    folder = saved(tmp_path, (3, 6))
    (folder / "6" / CHECKSUMS).unlink()
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.recover() == 3
    assert "checkpoint 6 is damaged" in capsys.readouterr().out
    checkpoints.close()


def test_what_an_interrupted_save_left_is_removed(tmp_path):
    folder = saved(tmp_path, (3,))
    shutil.copytree(folder / "3", folder / "6.orbax-checkpoint-tmp")
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.recover() == 3
    checkpoints.save(state_of(6), CONFIG)
    checkpoints.close()
    assert sorted(path.name for path in folder.iterdir()) == ["3", "6"]


def test_a_save_that_fails_is_an_error_in_one_line_and_keeps_the_last_good_one(tmp_path):
    saved(tmp_path, (3,))
    checkpoints = Checkpoints(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE, limits[1]))  # as on a full disk, writing fails
    try:
        with pytest.raises(UserError, match=r"checkpoint 6 could not be saved, checkpoint 3 is kept \(File too large"):
            checkpoints.save(state_of(6), CONFIG), checkpoints.check(wait=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.recover() == checkpoints.latest() == 3
    checkpoints.close()


def test_a_folder_that_cannot_be_written_any_more_is_an_error_too(tmp_path):
    folder = saved(tmp_path, (3,))
    checkpoints = Checkpoints(tmp_path)
    folder.rename(tmp_path / "elsewhere")
    folder.touch()  # even root cannot make a folder below a file
    with pytest.raises(UserError, match=r"checkpoint 6 could not be saved, .*directory.*; make space or restore"):
        checkpoints.save(state_of(6), CONFIG), checkpoints.close()
    with pytest.raises(UserError, match=r"cannot hold checkpoints"):
        Checkpoints(tmp_path)
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["3"]


def test_a_checkpoint_of_another_state_is_refused(tmp_path):
    saved(tmp_path, (3,))
    checkpoints = Checkpoints(tmp_path)
    like = state_of(0)._replace(params={"w": jnp.zeros(SIZE), "bias": jnp.zeros(2)})
    with pytest.raises(UserError, match=r"lacks 1 arrays, the first is params/bias; it was written by another"):
        checkpoints.restore(3, like, jax.tree.map(lambda _: replicated(make_mesh()), like))
    checkpoints.close()


def test_loading_a_network_takes_the_newest_sound_one_and_changes_nothing(tiny_config, tmp_path, capsys):
    tiny_config.model.update({"variant": "fpdm", "channel_mult": (1,), "attention_resolutions": (1,)})
    tree, training = tiny_config.to_dict(), tiny_config.training
    state, _ = sharded_initial_state(make_mesh(), network_config(tree), make_optimizer(training), 1, seed=0)
    checkpoints = Checkpoints(tmp_path)
    for step in (3, 6):
        checkpoints.save(state._replace(step=jnp.asarray(step)), tree)
    checkpoints.close()
    folder = tmp_path / "checkpoints"
    (folder / "9.orbax-checkpoint-tmp").mkdir()  # a training run is saving meanwhile
    flip(largest_file(folder / "6" / "optimizer"))
    assert load_network(tmp_path).identity["step"] == 6  # the optimiser is not read
    flip(largest_file(folder / "6" / "ema"))
    before = sorted(tmp_path.rglob("*"))
    network = load_network(tmp_path)
    assert network.identity["step"] == 3
    assert "checkpoint 6 is damaged (ema/" in capsys.readouterr().out
    np.testing.assert_array_equal(network.model.head_conv.bias[...], state.ema[0]["head_conv"]["bias"][...])
    _assert_exported(tmp_path, network)
    flip(largest_file(folder / "3" / "params"))
    with pytest.raises(UserError, match=r"no intact checkpoint \(6: ema/.*; 3: params/"):
        load_network(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def _assert_exported(run, network):
    """Exports the network's EMA weights in half precision and checks that they can be loaded."""
    folder = run.parent / f"{run.name}_exported"
    export_weights(run, folder)
    export_weights(run, folder)  # replaces the first
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    found = load_trained(folder)
    assert found.config == network.config
    assert found.identity["step"] == network.identity["step"]
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a).astype(np.float16), b),
                 nnx.state(network.model, nnx.Param), nnx.state(found.model, nnx.Param))
    with pytest.raises(UserError, match="has only EMA weights"):
        load_trained(folder, ema=False)
    other = json.loads((folder / "config.json").read_text())
    other["config"]["model"]["in_channels"] = 1
    (folder / "config.json").write_text(json.dumps(other))
    with pytest.raises(UserError, match=r"model\.safetensors: is of another network than config\.json beside it"):
        load_trained(folder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"config\.json: cannot be read"):
        load_trained(folder)


def test_what_makes_another_run(tmp_path):
    saved = {"seed": 0, "model": {"num_heads": 4}, "diffusion": {"noise": "gaussian"}, "data": {"scaling": "slice"},
             "training": {"batch_size": 8, "mesh": [-1, 1], "accumulation": 1}}
    same = {"seed": 0, "model": {"num_heads": 4}, "diffusion": {"noise": "gaussian"},
            "data": {"scaling": "slice", "workers": 3},
            "training": {"batch_size": 8, "mesh": (-1, 2), "accumulation": 4, "nonfinite": "skip",
                         "validate_every": 10, "validation_slices": 8, "wandb": "a", "steps": 9}}
    check_same_run(tmp_path, saved, same)
    check_same_run(tmp_path, saved, same | {"model": {"num_heads": 4, "attention": "cudnn", "convolution": "xla"}})
    with pytest.raises(UserError, match=r"\(model\.attention_resolutions was None, is \[2\]\)"):
        check_same_run(tmp_path, saved, same | {"model": {"num_heads": 4, "attention_resolutions": (2,)}})
    with pytest.raises(UserError, match=r"\(data\.scaling was 'slice', is 'volume'\)"):
        check_same_run(tmp_path, saved, same | {"data": {"scaling": "volume"}})
    other = same | {"seed": 1, "diffusion": {"noise": "simplex"}}
    with pytest.raises(UserError, match=r"\(diffusion\.noise was 'gaussian', is 'simplex'; seed was 0, is 1\)"):
        check_same_run(tmp_path, saved, other)
