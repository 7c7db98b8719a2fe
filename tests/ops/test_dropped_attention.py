"""The kernel for attention with dropout, run as an ordinary program, against attention as it is written."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hae_jax.model import sparse
from hae_jax.model.layers import HeadDropout
from hae_jax.ops import dropped_attention
from hae_jax.ops.platform import attention_by
from hae_jax.training.mesh import batch_sharding, make_mesh

BATCH, TOKENS, HEADS, DEPTH = 2, 640, 2, 16
LINKS = sparse.block_links(TOKENS, jax.random.key(0))
DROP = HeadDropout(jax.random.split(jax.random.key(1), (BATCH, HEADS)), 0.3)


@pytest.fixture
def kernel(monkeypatch):
    """Programs are traced as on a GPU that has the kernel."""
    monkeypatch.setattr(dropped_attention, "INTERPRET", True)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with attention_by("pallas"):
        yield


def arrays(dtype: str, count: int = 4, shape: tuple[int, ...] = (BATCH, TOKENS, HEADS, DEPTH)) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for _ in range(count)]


def both(drop, q, k, v, dout, links=LINKS):
    """The output and the gradients."""
    out, pull = jax.vjp(lambda q, k, v: sparse.attend_blocks(q, k, v, links, drop), q, k, v)
    return out, *pull(dout)


def test_output_and_gradients(kernel, monkeypatch):
    inputs = arrays("bfloat16")
    assert dropped_attention.is_chosen(inputs[0], 16, LINKS.shape[1] * 16)
    found = both(DROP, *inputs)
    with attention_by("xla"):
        expected = both(DROP, *[a.astype("float32") for a in inputs])
        rounded = both(DROP, *inputs)
    for own, exact, other in zip(found, expected, rounded, strict=True):
        own, exact, other = (np.asarray(a, "float32") for a in (own, exact, other))
        # Where one drops what the other keeps, errors would be as large as the values; both round to bfloat16.
        assert np.abs(own - exact).max() <= 1.5 * np.abs(other - exact).max() + 2**-9 * np.abs(exact).max()


@pytest.mark.parametrize(("batch", "tokens", "heads"), [(BATCH, TOKENS, HEADS), (1, 1024, 1), (1, 4096, 1)])
def test_float32(monkeypatch, batch, tokens, heads):
    """The sums themselves, and the draws: nothing is rounded on the way. One turn of the kernel's loop, and three."""
    monkeypatch.setattr(dropped_attention, "INTERPRET", True)
    monkeypatch.setattr(dropped_attention, "is_chosen", lambda *_: True)
    inputs = arrays("float32", shape=(batch, tokens, heads, DEPTH))
    links = sparse.block_links(tokens, jax.random.key(0))
    drop = HeadDropout(DROP.keys[:batch, :heads], 0.3)
    found = both(drop, *inputs, links)
    monkeypatch.setattr(dropped_attention, "is_chosen", lambda *_: False)
    for own, expected in zip(found, both(drop, *inputs, links), strict=True):
        np.testing.assert_allclose(own, expected, atol=1e-5 * np.abs(expected).max())


def test_each_device_works_on_its_own_samples(kernel):
    mesh = make_mesh(devices=jax.devices()[:2])
    inputs = arrays("bfloat16")
    f = jax.jit(lambda keys, *inputs: both(HeadDropout(jax.random.wrap_key_data(keys), 0.3), *inputs))
    keys = jax.random.key_data(DROP.keys)
    alone = f(keys, *inputs)
    f = jax.jit(lambda keys, *inputs: both(HeadDropout(jax.random.wrap_key_data(keys), 0.3), *inputs),
                in_shardings=batch_sharding(mesh))
    cut = jax.device_put((keys, *inputs), batch_sharding(mesh))
    program = f.lower(*cut).compile()
    assert not any(f"all-{what}" in program.as_text() for what in ("gather", "reduce", "to-all"))
    for own, expected in zip(program(*cut), alone, strict=True):
        assert len(own.sharding.device_set) == 2
        np.testing.assert_allclose(own.astype("float32"), expected.astype("float32"), rtol=2**-6, atol=2**-10)


@pytest.mark.parametrize(("dtype", "depth", "queries", "keys", "chosen"), [
    ("bfloat16", 16, 64, 384, True), ("float16", 32, 32, 128, True), ("float32", 16, 64, 384, False),
    ("bfloat16", 48, 64, 384, False), ("bfloat16", 8, 64, 384, False), ("bfloat16", 16, 8, 384, False),
    ("bfloat16", 32, 32, 96, True),
    ("bfloat16", 16, 64, 8 * 7, False), ("bfloat16", 16, 64, 33, False)])
def test_what_goes_to_the_kernel(kernel, dtype, depth, queries, keys, chosen):
    q = jnp.zeros((1, depth), dtype)
    assert dropped_attention.is_chosen(q, queries, keys) == chosen
    with attention_by("cudnn"):
        assert not dropped_attention.is_chosen(q, queries, keys)
