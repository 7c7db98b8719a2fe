"""Sparse patterns have the documented structure. Skipping blocks changes the work but not the result."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from network_helpers import SMALL, assert_close, shapes_in

from hae_jax.model import UNetConfig, sparse
from hae_jax.model.hybrid import MultiHeadAttention
from hae_jax.model.layers import HeadDropout, Randomness

KEY, OTHER = jax.random.key(0), jax.random.key(1)
TOKENS = 70  # tokens in the influence tests


@pytest.mark.parametrize("tokens", [256, 1024, 4416])
def test_block_links(tokens: int):
    links = np.asarray(sparse.block_links(tokens, KEY))
    blocks, seen = links.shape
    assert blocks == -(-tokens // sparse.block_size(tokens))
    assert (np.diff(links) > 0).all()  # no block twice
    assert links.min() >= 0
    assert links.max() < blocks
    assert (links == np.arange(blocks)[:, None]).any(1).all()  # itself
    assert ((links[1:] == np.arange(blocks - 1)[:, None]).any(1)).all()  # the one before
    assert abs(1 - seen / blocks - 0.9) <= 0.5 / blocks  # 90 % skipped, to the nearest block
    far = np.abs(links - np.arange(blocks)[:, None]) > 1
    assert far.any(1).mean() > 0.8
    assert len(np.unique(links[far])) > blocks / 2  # far links are spread
    np.testing.assert_array_equal(links, sparse.block_links(tokens, KEY))
    assert (links != sparse.block_links(tokens, OTHER)).any()


@pytest.mark.parametrize("tokens", [1, 7, 9, 17, 65])
def test_few_tokens_still_have_links(tokens: int):
    links = np.asarray(sparse.block_links(tokens, KEY))
    assert links.shape[1] == min(links.shape[0], 2)
    assert (links == np.arange(len(links))[:, None]).any(1).all()


@pytest.mark.parametrize("form", ["rows", "xla", "materialised"])
@pytest.mark.parametrize("tokens", [100, 256, 276])  # the last block of 100 and 276 is incomplete
def test_blocks_equal_dense_attention_with_the_same_pattern(tokens: int, form: str):
    links, size = np.asarray(sparse.block_links(tokens, KEY)), sparse.block_size(tokens)
    block = np.arange(tokens) // size
    blocked = ~(links[block][:, :, None] == block).any(1)  # [N, N]
    rng = np.random.default_rng(0)
    qkv = tuple(jnp.asarray(rng.standard_normal((2, tokens, 2, 4), np.float32)) for _ in range(3))
    direction = rng.standard_normal((2, tokens, 2, 4)).astype(np.float32)

    def with_gradients(attention, pattern):
        def scalar(q, k, v):
            out = attention(q, k, v, pattern)
            return jnp.sum(out * direction), out
        return jax.jit(jax.value_and_grad(scalar, argnums=(0, 1, 2), has_aux=True))(*qkv)

    (_, out), gradients = with_gradients(functools.partial(sparse.attend_blocks, form=form), links)
    (_, expected), expected_gradients = with_gradients(sparse.attend, blocked)
    assert_close(out, expected, 1e-5)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        assert_close(gradient, wanted, 1e-5)


@pytest.mark.parametrize("form", ["rows", "xla"])
@pytest.mark.parametrize("tokens", [1024, 4416])
def test_blocks_never_build_all_pairs(form: str, tokens: int):
    heads = 2
    q = jnp.zeros((1, tokens, heads, 4))
    forward = lambda q: sparse.attend_blocks(q, q, q, sparse.block_links(tokens, KEY), form=form)
    limit = (heads if form == "xla" else 1) * 0.11 * tokens**2
    for f in (forward, jax.grad(lambda q: forward(q).sum())):
        shapes = list(shapes_in(f, q))
        assert max(np.prod(shape, dtype=int) for shape in shapes) <= limit
        assert not [shape for shape in shapes if sum(length >= tokens for length in shape) > 1]
    dense = shapes_in(lambda q: sparse.attend(q, q, q), q)
    assert max(np.prod(shape, dtype=int) for shape in dense) == heads * tokens**2  # checks the measure itself


@pytest.mark.parametrize("form", ["rows", "xla"])
def test_a_ragged_last_block_sees_and_gives_nothing_of_its_filling(form):
    """All logits are far below zero. The padding's logits are zero and would dominate every softmax."""
    tokens = 100
    links = sparse.block_links(tokens, KEY)
    q, k = jnp.full((1, tokens, 1, 4), 30.0), jnp.full((1, tokens, 1, 4), -30.0)
    out = sparse.attend_blocks(q, k, jnp.ones_like(q), links, form=form)
    np.testing.assert_allclose(out, 1, rtol=1e-5)


@pytest.mark.parametrize("tokens", [100, 256])
def test_gradients_with_dropout_are_the_same_in_both_forms(tokens):
    rng = np.random.default_rng(0)
    q, k, v, direction = (jnp.asarray(rng.standard_normal((2, tokens, 2, 4), np.float32)) for _ in range(4))
    links = sparse.block_links(tokens, KEY)
    drop = HeadDropout(jax.random.split(OTHER, (2, 2)), 0.3)

    def run(form, drop):
        scalar = lambda q, k, v: jnp.sum(direction * sparse.attend_blocks(q, k, v, links, drop, form=form))
        return jax.jit(jax.value_and_grad(scalar, argnums=(0, 1, 2)))(q, k, v)

    (_, found), (_, wanted), (_, without) = run("xla", drop), run("rows", drop), run("xla", None)
    for gradient, expected, other in zip(found, wanted, without, strict=True):
        assert_close(gradient, expected, 1e-5)
        assert np.abs(gradient - other).max() > 0.1


def test_bfloat16_rounds_no_sums():
    """Errors of single values are those of the inputs and of the weights, 2^-9 each."""
    rng = np.random.default_rng(0)
    q, k, v, direction = (jnp.asarray(rng.standard_normal((1, 256, 2, 8)), "bfloat16") for _ in range(4))
    links, drop = sparse.block_links(256, KEY), HeadDropout(jax.random.split(OTHER, (1, 2)), 0.1)

    def run(*inputs):
        attend = functools.partial(sparse.attend_blocks, links=links, drop=drop, form="xla")
        scalar = lambda q, k, v: jnp.sum((direction * attend(q, k, v)).astype("f4"))
        return jax.jit(jax.grad(scalar, argnums=(0, 1, 2)))(*inputs)

    for gradient, exact in zip(run(q, k, v), run(*(a.astype("f4") for a in (q, k, v))), strict=True):
        assert gradient.dtype == jnp.bfloat16
        error = np.asarray(gradient, np.float64) - np.asarray(exact, np.float64)
        assert np.linalg.norm(error) < 0.01 * np.linalg.norm(np.asarray(exact, np.float64))


def test_dropout_of_weights_differs_by_head_and_is_the_same_in_both_forms():
    attention = MultiHeadAttention(8, UNetConfig(**SMALL, dropout=0.5), nnx.Rngs(0))
    keys = Randomness(jax.random.split(KEY, 2), KEY).of_layers(1)
    ones = jnp.ones((2, 3, 8, 16))
    drop = attention._drop(keys)
    masks = [np.asarray(drop(ones, jnp.asarray(head))) for head in range(3)]
    assert set(np.unique(masks)) == {0, 2}
    assert 0.4 < (masks[0] != masks[1]).mean() < 0.6
    assert 0.4 < (masks[0][0] != masks[0][1]).mean() < 0.6  # each sample has its own mask
    tokens = jax.random.normal(KEY, (2, TOKENS, 8))
    outs = []
    for form in ("rows", "xla"):
        attention.config = dataclasses.replace(attention.config, attention=form)
        outs.append(attention(tokens, keys, None, is_sparse=True))
    assert_close(outs[0], outs[1], 1e-5)
    assert np.abs(outs[0] - attention(tokens, None, None, is_sparse=True)).max() > 1e-3


@pytest.mark.parametrize("pattern", ["blocks", "trained"])
def test_inference_repeats_itself_to_the_bit(pattern: str):
    attention = MultiHeadAttention(8, UNetConfig(**SMALL, sparse_pattern=pattern, sparse_redraw=True), nnx.Rngs(0))
    tokens = jax.random.normal(KEY, (1, TOKENS, 8))
    run = lambda: jax.jit(lambda tokens: attention(tokens, None, None, is_sparse=True))(tokens)
    np.testing.assert_array_equal(run(), run())


def test_dense_attention_is_softmax_of_scaled_products():
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 5, 4))
    scores = np.exp(q @ k.T / 2)
    single = lambda a: jnp.asarray(a, jnp.float32)[None, :, None]
    out = sparse.attend(single(q), single(k), single(v))[0, :, 0]
    assert_close(out, scores / scores.sum(1, keepdims=True) @ v, 1e-5)


def test_trained_pattern_of_the_joint_transformer():
    tokens, keep = 276, 27
    seen = ~np.asarray(sparse.trained_mask_joint(tokens, KEY))
    distance = np.abs(np.arange(tokens)[:, None] - np.arange(tokens))
    assert seen[distance <= keep // 2].all()
    far = (seen & (distance > keep // 2)).sum(1)
    assert far.max() <= keep // 4  # columns drawn without replacement, except those inside the band
    assert far.mean() == pytest.approx(keep // 4 * (1 - keep / tokens), abs=0.2)
    assert (seen & (distance > keep // 2)).any(0).mean() > 0.95  # each row has its own columns
    assert (seen == ~np.asarray(sparse.trained_mask_joint(tokens, KEY))).all()
    assert (seen != ~np.asarray(sparse.trained_mask_joint(tokens, OTHER))).any()


@pytest.mark.parametrize(("tokens", "width"), [(8, 0), (45, 2)])  # keep <= 4: no random columns
def test_trained_pattern_of_few_joint_tokens_is_a_band(tokens: int, width: int):
    distance = np.abs(np.arange(tokens)[:, None] - np.arange(tokens))
    np.testing.assert_array_equal(sparse.trained_mask_joint(tokens, KEY), distance > width)


def test_trained_pattern_of_the_per_scale_transformer():
    blocked = np.asarray(sparse.trained_mask_per_scale(400, KEY))
    assert blocked.diagonal().all()
    off_diagonal = blocked[~np.eye(400, dtype=bool)]
    assert off_diagonal.mean() == pytest.approx(0.2, abs=5 * (0.2 * 0.8 / off_diagonal.size) ** 0.5)


def influence(*, shared: jax.Array | None = None, blocked: np.ndarray | None = None, is_sparse: bool = True,
              **fields) -> np.ndarray:  # [N, N] bool
    """Whether a token (column) changes the attention of another token (row)."""
    attention = MultiHeadAttention(8, UNetConfig(**SMALL, **fields), nnx.Rngs(0))
    randomness = None if shared is None else Randomness(jax.random.split(KEY, 1), shared).of_layers(1)
    tokens = jax.random.normal(KEY, (TOKENS, 8))
    f = lambda tokens: attention(tokens[None], randomness, blocked, is_sparse=is_sparse)[0].sum(-1)
    return (np.abs(jax.jit(jax.jacrev(f))(tokens)).max(-1) > 0) & ~np.eye(TOKENS, dtype=bool)


def test_each_network_gets_its_own_trained_pattern():
    distance = np.abs(np.arange(TOKENS)[:, None] - np.arange(TOKENS))
    per_scale = influence(variant="hae_v2c", sparse_pattern="trained")
    assert per_scale.sum() / (TOKENS * (TOKENS - 1)) == pytest.approx(0.8, abs=0.03)
    joint = influence(variant="hae_v2", sparse_pattern="trained")
    assert joint[(distance > 0) & (distance <= 3)].all()
    assert (joint & (distance > 3)).sum(1).max() <= 1


def test_blocks_dense_and_small_attentions():
    seen = influence(sparse_pattern="blocks")
    block = np.arange(TOKENS) // 8
    assert seen[(block[:, None] == block) & ~np.eye(TOKENS, dtype=bool)].all()
    assert (seen | np.eye(TOKENS, dtype=bool)).sum(1).max() <= 16
    assert influence(sparse_pattern="dense").sum() == TOKENS * (TOKENS - 1)
    assert influence(sparse_pattern="blocks", is_sparse=False).sum() == TOKENS * (TOKENS - 1)


def test_an_explicit_mask_is_honoured_in_place_of_any_pattern():
    blocked = np.random.default_rng(0).random((TOKENS, TOKENS)) < 0.5
    for pattern in ("blocks", "trained", "dense"):
        seen = influence(sparse_pattern=pattern, blocked=jnp.asarray(blocked))
        np.testing.assert_array_equal(seen, ~blocked & ~np.eye(TOKENS, dtype=bool))


@pytest.mark.parametrize("pattern", ["blocks", "trained"])
def test_patterns_are_redrawn_with_the_key_of_a_step_where_asked(pattern: str):
    redrawn = {"sparse_pattern": pattern, "sparse_redraw": True}
    assert (influence(shared=KEY, **redrawn) != influence(shared=OTHER, **redrawn)).any()
    fixed = influence(**redrawn)  # inference
    np.testing.assert_array_equal(fixed, influence(sparse_pattern=pattern, shared=OTHER))
    assert (fixed != influence(sparse_pattern=pattern, sparse_seed=1)).any()
