"""The forms for a kernel that takes only queries, keys and values, here with XLA's in the place of cuDNN's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hae_jax.errors import UserError
from hae_jax.model import attention, sparse
from hae_jax.model.conditioning import Context
from hae_jax.ops import fused_attention
from hae_jax.ops.platform import attention_kernels

T, E, HEADS, DEPTH = 40, 24, 2, 16


@pytest.fixture
def xla_as_cudnn(monkeypatch):
    """Lets attention go the way of cuDNN's kernel, in any dtype, and XLA compute it."""
    monkeypatch.setattr(fused_attention, "is_chosen", lambda *_: True)
    kernel = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention",
                        lambda *a, implementation, **options: kernel(*a, **options, implementation="xla"))


def arguments(dtype="float32", largest=1.0):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(largest * rng.normal(size=(3, T, HEADS, DEPTH)), dtype) for _ in range(3))
    c, kernel, bias = (jnp.asarray(rng.normal(size=shape), "float32")
                       for shape in ((3, E), (E, 2 * HEADS * DEPTH), (2 * HEADS * DEPTH,)))
    return q, k, v, c, kernel / E**0.5, bias


def attend(q, k, v, c, kernel, bias):
    context = Context(c, jnp.array([True, False, True]))  # the second row sees none
    return attention.attend_with_context(q, k, v, context, kernel, bias)


def value_and_gradients(f, *inputs):
    out, pull = jax.vjp(f, *inputs)
    return out, *pull(jnp.asarray(np.random.default_rng(1).normal(size=out.shape), out.dtype))


def test_context_and_its_gradients(xla_as_cudnn, monkeypatch):
    inputs = arguments()
    fused = jax.jit(lambda: value_and_gradients(attend, *inputs))()
    monkeypatch.undo()
    plain = jax.jit(lambda: value_and_gradients(attend, *inputs))()
    for a, b in zip(fused, plain, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max())


def test_bfloat16_does_not_coarsen_the_context_logit(xla_as_cudnn, monkeypatch):
    q, k, v, c, kernel, bias = arguments("bfloat16", largest=4.0)
    inputs = q, k, v, 6 * c, kernel, 6 * bias  # logits of tens, as the pixels have, which bfloat16 rounds by a tenth
    fused = jax.jit(lambda: attend(*inputs))()
    monkeypatch.undo()
    exact = jax.jit(lambda: attend(*(a.astype("float32") for a in inputs)))()
    assert fused.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(fused, "float32"), exact, atol=0.005 * np.abs(exact).max())


def test_no_context(xla_as_cudnn, monkeypatch):
    q, k, v, _, kernel, bias = arguments()
    fused = attention.attend_with_context(q, k, v, None, kernel, bias)
    monkeypatch.undo()
    np.testing.assert_allclose(fused, attention.attend_with_context(q, k, v, None, kernel, bias), atol=1e-5)


def test_whole_blocks(xla_as_cudnn, monkeypatch):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 256, 2, 8)), "float32") for _ in range(3))
    links = sparse.block_links(256, jax.random.key(0))
    fused = sparse.attend_blocks(q, k, v, links)
    monkeypatch.undo()
    np.testing.assert_allclose(fused, sparse.attend_blocks(q, k, v, links), atol=1e-5)


def test_ragged_blocks_and_dropout_stay_with_xla(xla_as_cudnn, monkeypatch):
    monkeypatch.setattr(fused_attention, "attend", None)  # calling it would raise
    q = k = v = jnp.ones((1, 250, 1, 8))
    assert sparse.attend_blocks(q, k, v, sparse.block_links(250, jax.random.key(0))).shape == q.shape
    q = k = v = jnp.ones((1, 256, 1, 8))
    links = sparse.block_links(256, jax.random.key(0))
    assert sparse.attend_blocks(q, k, v, links, lambda p, head: p).shape == q.shape


@pytest.mark.parametrize(("dtype", "depth", "chosen"), [
    ("bfloat16", 64, True), ("float32", 64, False), ("bfloat16", 60, False), ("bfloat16", 128, False)])
def test_who_goes_to_cudnn(monkeypatch, dtype, depth, chosen):
    monkeypatch.setenv("HAE_JAX_ATTENTION", "cudnn")
    q = jnp.zeros((1, 2, 1, depth), dtype)
    assert not fused_attention.is_chosen(q), "not on a CPU"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert fused_attention.is_chosen(q) == chosen
    assert not fused_attention.is_chosen(q, "cudnn_sparse"), "that is chosen for itself"
    monkeypatch.setenv("HAE_JAX_ATTENTION", "cudnn_sparse+pallas")
    assert not fused_attention.is_chosen(q)
    assert fused_attention.is_chosen(q, "cudnn_sparse") == chosen


def test_unknown_kernel(monkeypatch):
    monkeypatch.setenv("HAE_JAX_ATTENTION", "flash")
    with pytest.raises(UserError, match="is 'flash': set it to xla or to some of cudnn, cudnn_sparse, pallas"):
        attention_kernels()
