"""Log-sum-exp and mean of rank-one logits against float64 values and derivatives, for all slopes, in both forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hae_jax.ops.log_sum_exp import log_sum_exp

ROWS, HEADS, T, E = 3, 2, 12, 40
EPS = np.finfo(np.float32).eps
TOLERANCE = 1e-5


def exact(a, c, dl, dm):
    """L, L', and the gradients of sum(dl L + dm L') with respect to a and c, in float64 and by their definitions."""
    a, c, dl, dm = (np.asarray(x, np.float64) for x in (a, c, dl, dm))
    c = c[:, None, None, :]
    logits = a[..., None] * c
    peak = logits.max(-1, keepdims=True)
    log_sum = np.log(np.exp(logits - peak).sum(-1)) + peak[..., 0]
    p = np.exp(logits - log_sum[..., None])
    mean = (p * c).sum(-1)
    d = c - mean[..., None]
    da = dl * mean + dm * (p * d**2).sum(-1)
    dc = p * (dl * a)[..., None] + p * dm[..., None] * (1 + a[..., None] * d)
    return log_sum, mean, da, dc.sum((1, 2))


@pytest.fixture
def drawn():
    """c, with a null row and a row with ties, and the cotangents of L and L'."""
    rng = np.random.default_rng(0)
    c = rng.standard_normal((ROWS, E)).astype(np.float32) + np.array([[0], [0], [5]], np.float32)
    c[1] = 0
    c[2, :20] = c[2, 20:]
    return c, *(rng.standard_normal((ROWS, HEADS, T)).astype(np.float32) for _ in range(2))


@pytest.mark.parametrize("by_rows", [True, False])
@pytest.mark.parametrize("largest", [0.0, 1e-3, 1.0, 30.0, 1e3])
def test_values_and_gradients_to_float32_rounding(drawn, largest, by_rows):
    c, dl, dm = drawn
    a = largest * np.linspace(-1, 1, ROWS * HEADS * T, dtype=np.float32).reshape(ROWS, HEADS, T)
    (log_sum, mean), pull = jax.vjp(lambda a, c: log_sum_exp(a, c, by_rows), a, c)
    da, dc = pull((jnp.asarray(dl), jnp.asarray(dm)))
    expected = exact(a, c, dl, dm)
    width = np.abs(c).max()
    np.testing.assert_allclose(log_sum, expected[0], rtol=8 * EPS, atol=TOLERANCE)  # a logit is no sum: small error
    np.testing.assert_allclose(mean, expected[1], atol=TOLERANCE * width)
    np.testing.assert_allclose(da, expected[2], atol=TOLERANCE * width**2)
    np.testing.assert_allclose(dc, expected[3], atol=TOLERANCE * max(1, largest) * width)


def test_the_backward_pass_keeps_nothing_of_both_sizes(drawn):
    c, a, _ = drawn
    _, pull = jax.vjp(lambda a, c: log_sum_exp(a, c, True), a, c)
    assert max(leaf.size for leaf in jax.tree.leaves(pull)) == max(a.size, c.size)


@pytest.mark.parametrize(("tokens", "width"), [(1, 1), (7, 5)])
def test_any_size(tokens, width):
    rng = np.random.default_rng(2)
    a, dl, dm = (rng.standard_normal((1, 1, tokens)).astype(np.float32) for _ in range(3))
    c = rng.standard_normal((1, width)).astype(np.float32)
    values, pull = jax.vjp(lambda a, c: log_sum_exp(a, c, True), a, c)
    for ours, expected in zip((*values, *pull((jnp.asarray(dl), jnp.asarray(dm)))), exact(a, c, dl, dm), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-5)
