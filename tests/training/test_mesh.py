"""Meshes, sharding rules and their properties, and allowed batch sizes."""

import json
import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from spawned import spawned

from hae_jax.errors import UserError
from hae_jax.training import checkpoint, loop
from hae_jax.training.mesh import (
    bytes_per_device,
    check_batch_size,
    make_mesh,
    shard_batch,
    sharding_table,
    state_shardings,
)


def shape(*axes):
    return jax.ShapeDtypeStruct(axes, np.float32)


@pytest.mark.parametrize(("asked", "given"), [
    ((-1, 1), (4, 1)), ((1, -1), (1, 4)), ((-1, 2), (2, 2)), ((2, 2), (2, 2)), ([4, 1], (4, 1)),
])
def test_one_number_of_a_mesh_may_be_left_open(asked, given):
    assert make_mesh(asked).devices.shape == given


@pytest.mark.parametrize(("asked", "message"), [
    ((2, 1), r"training\.mesh is \(2, 1\): it does not fit 4 devices; set it to \(-1, 1\)"),
    ((-1, 3), r"set it to \(-1, 1\)"),
    ((-1, 6), r"set it to \(-1, 2\)"),
    ((8, -1), r"set it to \(4, -1\)"),
    ((-1, -1), r"one may be -1"),
    ((0, 1), r"training\.mesh is \(0, 1\)"),
    ((4,), r"training\.mesh is \(4,\)"),
])
def test_a_mesh_that_does_not_fit_is_refused(asked, message):
    with pytest.raises(UserError, match=message):
        make_mesh(asked)


def test_hosts_must_have_equally_many_devices():
    devices = [SimpleNamespace(process_index=process) for process in (0, 0, 0, 1)]
    with pytest.raises(UserError, match=r"training\.mesh.*process 0: 3, process 1: 1"):
        make_mesh(devices=devices)


def test_parameters_are_replicated_unless_asked():
    assert state_shardings(make_mesh(), shape(512, 1024)).is_fully_replicated


def test_the_largest_divisible_axis_is_sharded_and_small_leaves_are_not():
    mesh = make_mesh((1, -1))
    leaves = shape(512, 1024), shape(1024, 3001), shape(64), shape(3001, 333)
    shardings = [state_shardings(mesh, leaf) for leaf in leaves]
    assert [tuple(sharding.spec) for sharding in shardings] == [(None, "model"), ("model",), (), ()]
    assert bytes_per_device(leaves, shardings) == 4 * (512 * 256 + 256 * 3001 + 64 + 3001 * 333)


def test_the_table_says_what_lies_where():
    state = {"params": {"kernel": {"value": shape(512, 1024)}, "bias": {"value": shape(64)}},
             "ema": (shape(512, 1024),), "opt_state": {"mu": shape(512, 1024)}, "step": shape()}
    table = sharding_table(state, state_shardings(make_mesh((2, 2)), state))
    lines = [" ".join(line.split()) for line in table.splitlines()]
    assert lines[0] == "mesh: data 2 x model 2"
    assert {"kernel 512 x 1024 float32 -, model 1,048,576", "bias 64 float32 replicated 256",
            "parameters 2,097,408 1,048,832", "EMA weights 2,097,152 1,048,576",
            "state 6,291,716 3,145,988"} <= set(lines)


@pytest.mark.parametrize("mesh", [(4, 1), (1, 4), (2, 2)])
def test_a_batch_lies_in_rows_over_all_devices(mesh):
    rows = np.arange(8 * 3).reshape(8, 3)
    placed = shard_batch(make_mesh(mesh), {"image": rows})["image"]
    np.testing.assert_array_equal(placed, rows)
    assert {s.data.shape for s in placed.addressable_shards} == {(2, 3)}


def test_a_batch_that_cannot_be_cut_names_the_next_that_can():
    check_batch_size(16, 2, make_mesh(), "training.batch_size")
    with pytest.raises(UserError, match=r"training\.batch_size is 12: 4 devices x 2 .* set it to 16"):
        check_batch_size(12, 2, make_mesh(), "training.batch_size")


def test_every_mesh_of_eight_devices_gives_the_same_losses_and_holds_what_the_rules_promise(tiny_config, tmp_path):
    tiny_config.training.steps = 3
    tiny_config.model.variant = "fpdm"  # as small as possible, since it is compiled four times
    tiny_config.model.channel_mult = (1,)
    tiny_config.model.attention_resolutions = ()
    with spawned(train_on_meshes, tiny_config, tmp_path, devices=8, output=tmp_path / "output.txt") as process:
        process.join(400)
    assert process.exitcode == 0, (tmp_path / "output.txt").read_text()
    runs = {name: json.loads((tmp_path / name / "held.json").read_text()) for name in ("1x1", "8x1", "4x2", "1x8")}
    expected = losses(tmp_path / "1x1")
    assert len(expected) == 3
    for name, run in runs.items():
        np.testing.assert_allclose(losses(tmp_path / name), expected, rtol=1e-5, err_msg=name)
        assert run["held"] == run["promised"], name
    assert runs["8x1"]["held"] == runs["1x1"]["held"]
    assert runs["1x8"]["held"] < runs["4x2"]["held"] < runs["1x1"]["held"]


def losses(workdir):
    return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def train_on_meshes(config, folder):
    """Trains in a process with eight devices. Instead of checkpoints, it saves the state's size on one device."""
    for shape in ((1, 1), (8, 1), (4, 2), (1, 8)):
        devices = jax.devices()[:math.prod(shape)]
        workdir = folder / "x".join(map(str, shape))
        mesh = make_mesh(shape, devices)

        def weigh(checkpoints, state, tree, workdir=workdir, mesh=mesh):
            held = sum(shard.data.nbytes for leaf in jax.tree.leaves(state) for shard in leaf.addressable_shards
                       if shard.device == mesh.devices[0, 0])
            promised = bytes_per_device(state, state_shardings(mesh, state))
            (workdir / "held.json").write_text(json.dumps({"held": held, "promised": promised}))

        checkpoint.Checkpoints.save = weigh
        config.training.mesh = shape
        loop.train(config, workdir, devices)
