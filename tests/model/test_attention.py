"""The rank-one context equals the product form exactly, and no array of that form's size is built or stored."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from network_helpers import assert_close, shapes_in

from hae_jax.model.attention import attend_with_context
from hae_jax.model.conditioning import Context
from hae_jax.ops.cpu.rows import ROWS

T, E, HEADS, DEPTH = 300, 40, 2, 8
CASES = ("class", "null", "class unseen", "null unseen")
SEEN = np.array([True, True, False, False])
NAMES = ("q", "k", "v", "c", "kernel", "bias")
COLLECTIVES = "all-reduce", "all-gather", "all-to-all", "collective-permute"


def drawn(tokens: int = T, width: int = E) -> dict[str, np.ndarray]:
    """The arguments: a class row and a null row (c = 0) that see their context, and two rows that do not."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape, np.float32)
    q, k, v = (draw(len(CASES), tokens, HEADS, DEPTH) for _ in range(3))
    c = draw(len(CASES), width) * np.array([1, 0, 1, 0], np.float32)[:, None]
    kernel = draw(width, HEADS * 2 * DEPTH) / np.float32(width**0.5)
    return dict(zip(NAMES, (q, k, v, c, kernel, draw(HEADS * 2 * DEPTH)), strict=True))


def rank_one(q, k, v, c, kernel, bias, form="rows"):
    return attend_with_context(q, k, v, Context(c, jnp.asarray(SEEN)), kernel, bias, form)


def product_form(q, k, v, c, kernel, bias):
    """E context tokens from the E x E product through `encoder_kv`, before the T tokens in one softmax."""
    rows = []
    for i, seen in enumerate(SEEN):
        keys, values = k[i], v[i]  # [T, h, d]
        if seen:
            tokens = jnp.outer(c[i], c[i]) @ kernel + bias  # [E, h * 2 * d]
            tokens = tokens.reshape(-1, HEADS, 2, DEPTH)
            keys = jnp.concatenate([tokens[:, :, 0], keys])
            values = jnp.concatenate([tokens[:, :, 1], values])
        scores = jnp.einsum("thd,shd->hts", q[i] * DEPTH**-0.25, keys * DEPTH**-0.25)
        rows.append(jnp.einsum("hts,shd->thd", jax.nn.softmax(scores, axis=-1), values))
    return jnp.stack(rows)


def value_and_gradients(form):
    """A function of the arguments: the output, and the gradients of one scalar with respect to each of them."""
    def scalar(arguments):
        out = form(**arguments)
        return jnp.sum(out * np.random.default_rng(1).standard_normal(out.shape).astype(np.float32)), out

    def both(arguments):
        (_, out), gradients = jax.value_and_grad(scalar, has_aux=True)(arguments)
        return out, gradients

    return jax.jit(both)


OURS, PRODUCT = map(value_and_gradients, (rank_one, product_form))


def exact(arguments: dict[str, np.ndarray]):
    """The product form and its gradients in float64."""
    with jax.enable_x64(True):
        wide = {name: np.asarray(a, np.float64) for name, a in arguments.items()}
        return jax.tree.map(np.asarray, PRODUCT(wide))


@pytest.fixture(scope="module")
def arguments() -> dict[str, np.ndarray]:
    return drawn()


@pytest.mark.parametrize("scale", [1, 4], ids=["moderate", "concentrated"])
def test_equals_the_product_form_in_float64(arguments, scale):
    """They agree up to float32 rounding, which grows with the logits."""
    arguments = arguments | {"c": scale * arguments["c"]}
    out, gradients = OURS(arguments)
    expected, expected_gradients = exact(arguments)
    for row in range(len(CASES)):
        assert_close(out[row], expected[row], 1e-5 * scale)
    for name, gradient in gradients.items():
        assert_close(gradient, expected_gradients[name], 1e-5 * scale)


@pytest.mark.parametrize("tokens", [1, ROWS, ROWS + 1])  # a prime number has one query per step
def test_any_number_of_pixels(tokens):
    arguments = drawn(tokens)
    assert_close(jax.jit(rank_one)(**arguments), product_form(**arguments), 1e-5)


def test_without_context_it_is_plain_attention(arguments):
    out = attend_with_context(*(arguments[name] for name in "qkv"), None, None, None, "rows")
    assert_close(out[2:], product_form(**arguments)[2:], 1e-5)


def test_extreme_contexts_give_finite_numbers(arguments):
    """With slopes of 1e3 and far more, the output is that of the product form's largest token."""
    large = arguments | {"c": 30 * arguments["c"]}
    slopes = jnp.einsum("thd,hd->ht", large["q"][0], (large["c"][0] @ large["kernel"]).reshape(HEADS, 2, DEPTH)[:, 0])
    assert jnp.abs(slopes).max() * DEPTH**-0.5 > 50
    assert jnp.abs(slopes).max() * DEPTH**-0.5 * jnp.abs(large["c"]).max() > 1e3  # far beyond exp in float32
    assert_close(OURS(large)[0], exact(large)[0], 1e-3)
    for case in (large, arguments | {"c": 1e4 * arguments["c"]}, arguments | {"q": 1e3 * arguments["q"]}):
        assert all(np.isfinite(a).all() for a in jax.tree.leaves(OURS(case)))


def test_an_unseen_context_has_no_influence_and_no_gradient(arguments):
    changed = arguments | {"c": np.array(arguments["c"])}
    changed["c"][2] = 1e6
    out, gradients = OURS(changed)
    np.testing.assert_array_equal(out[2], OURS(arguments)[0][2])
    assert all(np.isfinite(a).all() for a in gradients.values())
    assert not gradients["c"][2:].any()
    assert gradients["c"][0].any()


def test_neither_the_product_nor_context_keys_are_built(arguments):
    forms = rank_one, jax.grad(lambda *a: rank_one(*a).sum(), argnums=tuple(range(6)))
    shapes = [shape for form in forms for shape in shapes_in(form, *arguments.values())]
    assert any(T in shape for shape in shapes)
    assert not any(shape.count(E) > 1 or (E in shape and DEPTH in shape and len(CASES) in shape) for shape in shapes)


def test_no_square_of_tokens_is_kept_for_the_backward_pass(arguments):
    _, pull = jax.vjp(rank_one, *arguments.values())
    kept = [leaf.shape for leaf in jax.tree.leaves(pull)]
    assert (len(CASES), HEADS, T) in kept  # the log-sum-exps
    assert max(np.prod(shape, dtype=int) for shape in kept) == len(CASES) * T * HEADS * DEPTH


def test_on_a_cpu_no_square_of_tokens_exists_at_all():
    arguments = drawn(tokens=2 * ROWS, width=320)
    compiled = value_and_gradients(rank_one).lower(arguments).compile().as_text()
    sizes = [np.prod([int(n) for n in dims.split(",")]) for dims in re.findall(r"f32\[([\d,]+)\]", compiled)]
    pairs = len(CASES) * HEADS * 2 * ROWS
    assert pairs * ROWS in sizes  # the scores of one step
    assert max(sizes) < pairs * 320


def test_under_vmap_and_remat(arguments):
    _, expected = OURS(arguments)
    remat = value_and_gradients(lambda **a: jax.checkpoint(lambda a: rank_one(**a))(a))
    assert_close(remat(arguments)[1]["c"], expected["c"], 1e-5)
    twice = jax.tree.map(lambda a: np.stack([a, 2 * a]), arguments)
    out, gradients = jax.jit(jax.vmap(OURS))(twice)
    single, single_gradients = OURS(jax.tree.map(lambda a: a[1], twice))
    assert_close(out[1], single, 1e-5)
    for name, gradient in gradients.items():
        assert_close(gradient[1], single_gradients[name], 1e-5)


def test_rows_on_different_devices_do_not_meet(arguments):
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    shardings = {name: NamedSharding(mesh, PartitionSpec("data" if name in "qkvc" else None)) for name in NAMES}
    split = jax.device_put(arguments, shardings)
    seen = jax.device_put(jnp.asarray(SEEN), shardings["q"])

    def rows(arguments, seen):  # parameters are constants here, since their gradients are summed over the batch
        run = lambda q, k, v, c: attend_with_context(q, k, v, Context(c, seen), arguments["kernel"], arguments["bias"],
                                                   "rows")
        out, pull = jax.vjp(run, *(arguments[name] for name in "qkvc"))
        return out, pull(out)

    compiled = jax.jit(rows).lower(split, seen).compile()
    assert not any(name in compiled.as_text() for name in COLLECTIVES)
    for ours, alone in zip(jax.tree.leaves(compiled(split, seen)), jax.tree.leaves(jax.jit(rows)(arguments, SEEN)),
                           strict=True):
        assert ours.sharding.spec[0] == "data"
        assert_close(ours, alone, 1e-5)


def test_bfloat16_accumulates_in_float32(arguments):
    low = {name: jnp.asarray(a, jnp.bfloat16 if name in "qkv" else jnp.float32) for name, a in arguments.items()}
    out = jax.jit(rank_one)(**low)
    assert out.dtype == jnp.bfloat16
    wide = rank_one(**{name: a.astype(jnp.float32) for name, a in low.items()})
    assert_close(out, wide, 2**-7)
