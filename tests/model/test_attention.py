"""The rank-one context is the product form, exactly, at a fraction of its size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from network_helpers import assert_close, shapes_in

from hae_jax.model.attention import attend_with_context
from hae_jax.model.conditioning import Context

T, E, HEADS, DEPTH = 10, 40, 2, 8
ROWS = ("class", "null", "class unseen", "null unseen")
SEEN = np.array([True, True, False, False])


@pytest.fixture(scope="module")
def arguments() -> dict[str, jax.Array]:
    """q, k, v, c, kernel, bias; a class row and a null row (c = 0) that see their context, and two that do not."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32))
    q, k, v = (draw(len(ROWS), T, HEADS, DEPTH) for _ in range(3))
    c = draw(len(ROWS), E) * jnp.asarray([1, 0, 1, 0])[:, None]
    return {"q": q, "k": k, "v": v, "c": c, "kernel": draw(E, HEADS * 2 * DEPTH) / E**0.5,
            "bias": draw(HEADS * 2 * DEPTH)}


def rank_one(q, k, v, c, kernel, bias):
    return attend_with_context(q, k, v, Context(c, jnp.asarray(SEEN)), kernel, bias)


def product_form(q, k, v, c, kernel, bias):
    """E context tokens from the E x E product through `encoder_kv`, before the T tokens in one softmax."""
    rows = []
    for i, seen in enumerate(SEEN):
        keys, values = k[i], v[i]  # [T, h, d]
        if seen:
            tokens = jnp.outer(c[i], c[i]) @ kernel + bias  # [E, h * 2 * d]
            tokens = tokens.reshape(E, HEADS, 2, DEPTH)
            keys = jnp.concatenate([tokens[:, :, 0], keys])
            values = jnp.concatenate([tokens[:, :, 1], values])
        scores = jnp.einsum("thd,shd->hts", q[i] * DEPTH**-0.25, keys * DEPTH**-0.25)
        rows.append(jnp.einsum("hts,shd->thd", jax.nn.softmax(scores, axis=-1), values))
    return jnp.stack(rows)


@pytest.fixture(scope="module")
def forms():
    """Both forms, each with the gradients of one scalar with respect to every argument."""
    direction = np.random.default_rng(1).standard_normal((len(ROWS), T, HEADS, DEPTH)).astype(np.float32)

    def with_gradients(form):
        def scalar(arguments):
            out = form(**arguments)
            return jnp.sum(out * direction), out
        return jax.jit(jax.value_and_grad(scalar, has_aux=True))

    return with_gradients(rank_one), with_gradients(product_form)


def test_equals_the_product_form(arguments, forms):
    (_, out), gradients = forms[0](arguments)
    (_, expected), expected_gradients = forms[1](arguments)
    for row, name in enumerate(ROWS):
        np.testing.assert_allclose(out[row], expected[row], atol=1e-5, err_msg=name)
    for name, gradient in gradients.items():
        assert_close(gradient, expected_gradients[name], 1e-5)


def test_without_context_it_is_plain_attention(arguments):
    out = attend_with_context(arguments["q"], arguments["k"], arguments["v"], None, arguments["kernel"],
                              arguments["bias"])
    seen_by_none = product_form(**arguments)[2:]
    np.testing.assert_allclose(out[2:], seen_by_none, atol=1e-6)


def test_large_logits_do_not_overflow(arguments, forms):
    large = arguments | {"c": 5 * arguments["c"]}
    logits = jnp.einsum("thd,hd->ht", large["q"][0], (large["c"][0] @ large["kernel"]).reshape(HEADS, 2, DEPTH)[:, 0])
    assert (logits[..., None] * large["c"][0]).max() > 100  # far beyond what exp can take in float32
    (_, out), gradients = forms[0](large)
    (_, expected), expected_gradients = forms[1](large)
    assert_close(out, expected, 1e-3)
    for name, gradient in gradients.items():
        assert_close(gradient, expected_gradients[name], 1e-3)
    (_, out), gradients = forms[0](arguments | {"c": 1e4 * arguments["c"]})
    assert all(np.isfinite(a).all() for a in jax.tree.leaves((out, gradients)))


def test_an_unseen_context_has_no_influence_and_no_gradient(arguments, forms):
    changed = arguments | {"c": arguments["c"].at[2].set(1e6)}
    (_, out), gradients = forms[0](changed)
    np.testing.assert_array_equal(out[2], forms[0](arguments)[0][1][2])
    assert all(np.isfinite(a).all() for a in gradients.values())
    assert not gradients["c"][2:].any()
    assert gradients["c"][0].any()


def test_neither_the_product_nor_context_keys_are_built(arguments):
    biggest = len(ROWS) * HEADS * T * max(E, T)  # the exponentials
    forms = rank_one, jax.grad(lambda *a: rank_one(*a).sum(), argnums=tuple(range(6)))
    shapes = [shape for form in forms for shape in shapes_in(form, *arguments.values())]
    assert max(np.prod(shape, dtype=int) for shape in shapes) == biggest
    assert not any(shape.count(E) > 1 or (E in shape and DEPTH in shape and len(ROWS) in shape) for shape in shapes)


def test_bfloat16_accumulates_in_float32(arguments):
    low = {name: a.astype(jnp.bfloat16) if name in "qkv" else a for name, a in arguments.items()}
    out = rank_one(**low)
    assert out.dtype == jnp.bfloat16
    exact = rank_one(**{name: a.astype(jnp.float32) for name, a in low.items()})
    assert_close(out, exact, 2**-7)
