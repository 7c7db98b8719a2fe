"""Sharding rules, and which batch sizes they allow."""

import jax
import numpy as np
import pytest

from hae_jax.errors import UserError
from hae_jax.training.mesh import check_batch_size, make_mesh, shard_batch, state_shardings


def shape(*axes):
    return jax.ShapeDtypeStruct(axes, np.float32)


def test_parameters_are_replicated_unless_asked():
    assert state_shardings(make_mesh(), shape(512, 1024)).is_fully_replicated


def test_the_largest_divisible_axis_is_sharded_and_small_leaves_are_not():
    mesh = make_mesh(fsdp=True)
    leaves = shape(512, 1024), shape(1024, 3001), shape(64), shape(3001, 333)
    specs = [state_shardings(mesh, leaf).spec for leaf in leaves]
    assert [tuple(spec) for spec in specs] == [(None, "model"), ("model",), (), ()]


@pytest.mark.parametrize("fsdp", [False, True])
def test_a_batch_lies_in_rows_over_all_devices(fsdp):
    rows = np.arange(8 * 3).reshape(8, 3)
    placed = shard_batch(make_mesh(fsdp), {"image": rows})["image"]
    np.testing.assert_array_equal(placed, rows)
    assert {s.data.shape for s in placed.addressable_shards} == {(2, 3)}


def test_a_batch_that_cannot_be_cut_names_the_next_that_can():
    check_batch_size(16, 2, make_mesh(), "training.batch_size")
    with pytest.raises(UserError, match=r"training\.batch_size is 12: 4 devices x 2 .* set it to 16"):
        check_batch_size(12, 2, make_mesh(), "training.batch_size")
