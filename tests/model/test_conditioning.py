"""Time embedding, and the rows that see their class context under each rule."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from network_helpers import SMALL, abstract, assert_close, filled, inputs, shapes_in

from hae_jax.model import VARIANTS, UNetConfig
from hae_jax.model.conditioning import class_context, timestep_embedding

CONFIG = UNetConfig(**SMALL)
NO, ALL = np.zeros(4, bool), np.ones(4, bool)
STACKED = np.array([False, False, True, True])  # two conditional rows, then the null pass of the same two


def seen(rule: str, zero: list[int], null: np.ndarray = NO, **fields) -> list[bool]:
    """Whether each row of a batch of 4 sees its context, if some rows are zero."""
    c = np.full((4, 8), 0.5, np.float32)
    c[zero] = 0
    return class_context(jnp.asarray(c), jnp.asarray(null), UNetConfig(null_context=rule, **fields)).seen.tolist()


def test_batch_rule_hides_the_context_only_where_all_rows_are_zero():
    assert seen("batch", [1, 2]) == [True] * 4
    assert seen("batch", [0, 1, 2, 3]) == [False] * 4


def test_batch_rule_judges_stacked_passes_apart():
    assert seen("batch", [2, 3], STACKED) == [True, True, False, False]
    assert seen("batch", [0, 2, 3], STACKED) == [True, True, False, False]
    assert seen("batch", [0, 1, 2, 3], STACKED) == [False] * 4


def test_sample_rule_judges_each_row():
    assert seen("sample", [1, 2]) == [True, False, False, True]
    assert seen("sample", [0, 2, 3], STACKED) == [False, True, False, False]


def test_keep_rule_hides_nothing():
    assert seen("keep", [0, 1, 2, 3], ALL) == [True] * 4


@pytest.mark.parametrize("fields", [{"memory_optimization": False}]
                         + [{"variant": v} for v, rules in VARIANTS.items() if not rules.skips_zero_context])
def test_batch_rule_is_keep_where_nothing_is_skipped(fields: dict):
    assert seen("batch", [0, 1, 2, 3], ALL, **fields) == [True] * 4
    assert seen("sample", [0], **fields) == [False, True, True, True]


def test_zero_threshold_is_inclusive_and_over_all_entries():
    c = jnp.asarray([[1e-3, -1e-3], [0, 2e-3]], jnp.float32)
    for threshold, expected in ((1e-3, [False, True]), (5e-4, [True, True])):
        config = UNetConfig(null_context="sample", zero_threshold=np.float32(threshold).item())
        assert class_context(c, jnp.zeros(2, bool), config).seen.tolist() == expected


def test_batch_means_the_global_batch():
    """One device has only zero rows. Its rows see their context nevertheless, as on a single device."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    c = np.full((8, 4), 0.5, np.float32)
    c[:2] = 0
    judge = jax.jit(lambda c, null: class_context(c, null, CONFIG).seen, in_shardings=(rows, rows), out_shardings=rows)
    assert judge(jax.device_put(c, rows), np.zeros(8, bool)).tolist() == [True] * 8
    assert judge(jax.device_put(0 * c, rows), np.zeros(8, bool)).tolist() == [False] * 8


@pytest.fixture(scope="module")
def network():
    """rule -> the network as a function of (null, drop), on the same two slices twice."""
    x, t, y = (np.concatenate([a, a]) for a in inputs(CONFIG, 2))
    state = filled(CONFIG)[1]

    def build(rule: str):
        graph, _ = abstract(dataclasses.replace(CONFIG, null_context=rule))
        run = jax.jit(lambda state, x, t, y, null, drop: nnx.merge(graph, state)(x, t, y, null=null, drop=drop))
        return lambda null=NO, drop=NO, put=lambda a: a: run(state, *map(put, (x, t, y, null, drop)))

    return {rule: build(rule) for rule in ("batch", "keep")}


def test_stacked_passes_equal_separate_ones(network):
    run = network["batch"]
    stacked, conditional, null = run(STACKED), run(), run(ALL)
    assert_close(stacked[:2], conditional[:2], 1e-5)
    assert_close(stacked[2:], null[2:], 1e-5)
    assert np.abs(conditional - null).max() > 1e-2


def test_dropping_all_rows_is_a_null_pass_and_dropping_some_is_not(network):
    run = network["batch"]
    null = run(ALL)
    assert_close(run(drop=ALL), null, 1e-5)
    # A dropped row among others attends to a context of biases only, so its output differs.
    assert np.abs(run(drop=STACKED)[2:] - null[2:]).max() > 1e-4
    assert_close(run(drop=STACKED)[2:], network["keep"](ALL)[2:], 1e-5)
    assert np.abs(network["keep"](ALL) - null).max() > 1e-4


def test_one_timestep_for_all_rows_is_embedded_once():
    (x, t, y), (graph, state) = inputs(CONFIG, 3), filled(CONFIG)
    run = lambda t, **condition: nnx.merge(graph, state)(x, t, **condition)
    assert_close(jax.jit(run)(t[:1], y=y), jax.jit(run)(np.full(3, t[0]), y=y), 1e-5)
    shapes = set(shapes_in(lambda t: run(t, null=True), t[:1]))
    assert (1, CONFIG.embedding_width) in shapes
    assert (3, CONFIG.embedding_width) not in shapes


def test_the_network_is_the_same_on_four_devices(network):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    drop = np.array([True, False, False, False])  # all rows on its device are dropped
    sharded = network["batch"](drop=drop, put=lambda a: jax.device_put(a, rows))
    assert len(sharded.sharding.device_set) == 4
    assert_close(sharded, network["batch"](drop=drop), 1e-5)


def test_labels_are_asked_for_unless_every_row_is_null():
    x, t, _ = inputs(CONFIG, 2)
    out = jax.eval_shape(lambda: nnx.merge(*filled(CONFIG))(x, t, null=True))
    assert out.shape == x.shape
    for null in (False, np.array([True, False])):
        with pytest.raises(ValueError, match="labels"):
            jax.eval_shape(lambda null=null: nnx.merge(*filled(CONFIG))(x, t, null=null))


def test_inputs_of_a_wrong_shape_are_refused():
    x, t, y = inputs(CONFIG, 2)
    model = nnx.merge(*filled(CONFIG))
    for bad in (x[:, :-1], x[..., :1], x[0]):
        with pytest.raises(ValueError, match="x has shape"):
            model(bad, t, y)
    with pytest.raises(ValueError, match="sparse_masks"):
        model(x, t, y, sparse_masks=[np.eye(9, dtype=bool)])


@pytest.mark.parametrize("width", [32, 33])
def test_timestep_embedding(width: int):
    t = np.array([0, 1, 37, 500, 999])
    half = width // 2
    expected = np.zeros((len(t), width))
    for row, step in enumerate(t):
        for i in range(half):
            angle = step * 10000.0 ** (-i / half)
            expected[row, i], expected[row, half + i] = np.cos(angle), np.sin(angle)
    np.testing.assert_allclose(timestep_embedding(jnp.asarray(t), width), expected, atol=2e-4)
