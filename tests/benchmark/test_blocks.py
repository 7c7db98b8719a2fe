"""Single blocks: equivalent forms give the same outputs, and rows are compared with the first form."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hae_jax.benchmark import blocks
from hae_jax.benchmark.blocks import Block, measure_blocks, with_gradients
from hae_jax.benchmark.results import Result
from hae_jax.training.mesh import make_mesh


@pytest.fixture(scope="module", autouse=True)
def _little():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hae_jax.benchmark.measure._SHORTEST_TURN", 1e-9)
        patch.setattr(blocks, "_SIZES", {"attention": (12, 32), "sparse": (150, 8), "patches": (160, 8),
                                         "convolutions": ((3, 16, 128, 128), (1, 8, 4, 8)),
                                         "norm": (16, 64), "noise": (16, 2)})
        yield


@pytest.fixture(scope="module")
def outputs():
    """The outputs of each form of each block."""
    return {(block.name, form): np.asarray(jax.jit(f)(block.params, *block.inputs))
            for block in blocks.blocks(2, "float32") for form, f in block.forms.items()}


def test_forms_are_the_same_but_for_what_is_left_out(outputs):
    sames = {  # other forms leave out the context, or see all tokens
        "attention at 12 px": ("ours", "naive"),
        "sparse attention, 150 tokens": ("dense", "dense by jax.nn"),
        "sparse layer, 144 tokens": (),
        "3x3 convolution, 128 to 128 channels, 16 px": ("ours", "xla"),
        "1x1 convolution, 4 to 8 channels, 8 px": ("ours", "xla"),
        "norm with SiLU, 64 channels, 16 px": ("ours", "naive"),
        "dropout, 64 channels, 16 px": (),
        "simplex noise, 16 px, 2 channels": (),
    }
    assert {name for name, _ in outputs} == set(sames)
    for (name, one), (other, two) in itertools.combinations(outputs, 2):
        if name != other:
            continue
        a, b = outputs[name, one], outputs[other, two]
        is_same = np.abs(a - b).max() < 1e-5 * np.abs(a).max()
        assert is_same == ({one, two} <= set(sames[name])), (name, one, two)


def test_rows_compare_with_the_first_form(monkeypatch):
    n = 64
    forms = {"none": lambda w, x: jnp.sin(x), "ours": lambda w, x: x @ w, "naive": lambda w, x: x @ w @ w}
    block = Block("products", forms, jnp.ones((n, n)), (jnp.ones((4, n)),))
    monkeypatch.setattr(blocks, "blocks", lambda batch, dtype: [block])
    rows = measure_blocks(4, "float32", 3, make_mesh(devices=jax.devices()[:2]), str)
    assert [(row.variant, row.form) for row in rows] == [
        (f"products, {way}", form) for way in ("forward", "with gradients") for form in ("none", "ours", "naive")]
    for i, row in enumerate(rows):
        first = rows[i // 3 * 3]
        assert row.time_ratio == pytest.approx(np.median(np.divide(row.seconds, first.seconds)))
        assert row.memory_ratio == row.memory / first.memory
        assert len(row.seconds) == 3
    flops = 2 * 4 * n**2
    assert [row.flops for row in rows] == [0, flops, 2 * flops, 0, 3 * flops, 6 * flops]
    assert [row.model_flops for row in rows] == 3 * [flops] + 3 * [3 * flops]
    assert "| products, with gradients | naive" in Result(rows, 1e9, 1e9, "a machine", {}).text()


def test_noise_has_no_gradients(monkeypatch):
    block = Block("noise", {"ours": lambda _, x: jnp.sin(x)}, None, (jnp.ones((4, 8)),), has_gradients=False)
    monkeypatch.setattr(blocks, "blocks", lambda batch, dtype: [block])
    rows = measure_blocks(4, "float32", 1, make_mesh(devices=jax.devices()[:2]), str)
    assert [row.variant for row in rows] == ["noise, forward"]


def test_gradients_are_those_of_half_the_square():
    x = jnp.arange(3.0)
    out, (gradient,) = with_gradients(lambda x: 2 * x)(x)
    np.testing.assert_array_equal(out, 2 * x)
    np.testing.assert_array_equal(gradient, 4 * x)
