"""The forms for a kernel that takes only queries, keys and values. XLA replaces cuDNN's kernel here."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hae_jax.model import attention, sparse
from hae_jax.model.conditioning import Context
from hae_jax.model.layers import HeadDropout

T, E, HEADS, DEPTH = 40, 24, 2, 16


@pytest.fixture
def xla_as_cudnn(monkeypatch):
    """Replaces cuDNN's kernel by XLA."""
    kernel = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention",
                        lambda *a, implementation, **options: kernel(*a, **options, implementation="xla"))


def arguments(dtype="float32", largest=1.0):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(largest * rng.normal(size=(3, T, HEADS, DEPTH)), dtype) for _ in range(3))
    c, kernel, bias = (jnp.asarray(rng.normal(size=shape), "float32")
                       for shape in ((3, E), (E, 2 * HEADS * DEPTH), (2 * HEADS * DEPTH,)))
    return q, k, v, c, kernel / E**0.5, bias


def attend(form, q, k, v, c, kernel, bias):
    context = Context(c, jnp.array([True, False, True]))  # the second row sees no context
    return attention.attend_with_context(q, k, v, context, kernel, bias, form)


def value_and_gradients(f, *inputs):
    out, pull = jax.vjp(f, *inputs)
    return out, *pull(jnp.asarray(np.random.default_rng(1).normal(size=out.shape), out.dtype))


def test_context_and_its_gradients(xla_as_cudnn):
    inputs = arguments()
    fused, plain = (jax.jit(lambda form=form: value_and_gradients(functools.partial(attend, form), *inputs))()
                    for form in ("cudnn", "xla"))
    for a, b in zip(fused, plain, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max())


def test_bfloat16_does_not_coarsen_the_context_logit(xla_as_cudnn):
    q, k, v, c, kernel, bias = arguments("bfloat16", largest=4.0)
    inputs = q, k, v, 6 * c, kernel, 6 * bias  # logits of some tens, as for pixels, which bfloat16 rounds by 0.1
    fused = jax.jit(lambda: attend("cudnn", *inputs))()
    exact = jax.jit(lambda: attend("xla", *(a.astype("float32") for a in inputs)))()
    assert fused.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(fused, "float32"), exact, atol=0.005 * np.abs(exact).max())


def test_no_context(xla_as_cudnn):
    q, k, v, _, kernel, bias = arguments()
    fused, plain = (jax.jit(lambda form=form: attention.attend_with_context(q, k, v, None, kernel, bias, form))()
                    for form in ("cudnn", "xla"))
    np.testing.assert_allclose(fused, plain, atol=1e-5)


def test_whole_blocks(xla_as_cudnn):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 256, 2, 8)), "float32") for _ in range(3))
    links = sparse.block_links(256, jax.random.key(0))
    fused, plain = (jax.jit(functools.partial(sparse.attend_blocks, form=form))(q, k, v, links)
                    for form in ("cudnn", "xla"))
    np.testing.assert_allclose(fused, plain, atol=1e-5)


def test_what_the_kernel_does_not_take_is_computed_by_xla(monkeypatch):
    monkeypatch.setattr(jax.nn, "dot_product_attention", None)  # calling it would raise
    for tokens, depth, drop in ((250, 8, None), (256, 8, HeadDropout(jax.random.split(jax.random.key(1), (1, 1)), 0.1)),
                                (256, 12, None)):
        q = k = v = jnp.ones((1, tokens, 1, depth))
        links = sparse.block_links(tokens, jax.random.key(0))
        attend_blocks = functools.partial(sparse.attend_blocks, drop=drop, form="cudnn")
        assert jax.eval_shape(attend_blocks, q, k, v, links).shape == q.shape
    attend_with_context = functools.partial(attention.attend_with_context, context=None, kernel=None, bias=None,
                                            form="cudnn")
    for shape in ((1, 4, 1, 128), (1, 225, 1, 64)):  # too many channels, an odd number of tokens
        q = jnp.ones(shape)
        assert jax.eval_shape(attend_with_context, q, q, q).shape == shape
