"""Sparse patterns and sparse attention.

Every sparse attention takes its pattern from this module. "blocks" is our pattern. The tokens are split into blocks.
Each block of queries sees a tenth of the blocks of keys: itself, its neighbours, and distant ones. The other blocks are
not computed. With blocks, the remaining work is dense products of 8 x 8 to 64 x 64 tokens, which are fast on matrix and
vector units, and blocks are gathered as contiguous rows. A window would skip as much, but no distant tokens would be
seen. If single pairs were skipped, the products would not be dense.
The published patterns skip random single pairs. They are masks on dense attention and exist for weights that were
trained with them.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from hae_jax.model.layers import HeadDropout
from hae_jax.ops import cudnn_attention
from hae_jax.ops.block_attention import block_attention

Drop = Callable[[jax.Array], jax.Array]  # attention weights [B, ...] -> the same with dropout

KEPT_SHARE = 0.1
_BLOCK_SIZES = (64, 32, 16, 8)
_FEWEST_BLOCKS = 30  # with fewer, a tenth of the blocks is a too coarse choice


def block_size(tokens: int) -> int:
    """Tokens per block: the largest size, for speed, that still gives enough blocks to choose a tenth of them."""
    return next((size for size in _BLOCK_SIZES if tokens >= size * _FEWEST_BLOCKS), _BLOCK_SIZES[-1])


def block_links(tokens: int, key: jax.Array) -> jax.Array:  # [blocks, seen] int32, each row without repeats
    """The blocks of keys that each block of queries sees: itself, up to two neighbours, and random ones."""
    blocks = -(-tokens // block_size(tokens))
    seen = min(blocks, max(2, round(KEPT_SHARE * blocks)))
    offset = np.arange(blocks) - np.arange(blocks)[:, None]
    near = np.isin(offset, (0, -1, 1)[:max(1, min(3, seen - 1))])  # at least one link is random
    score = jax.random.uniform(key, near.shape) + near
    return jnp.sort(jax.lax.top_k(score, seen)[1], axis=-1)


def attend(
    q: jax.Array,  # [B, N, h, d]
    k: jax.Array,  # [B, N, h, d]
    v: jax.Array,  # [B, N, h, d]
    blocked: jax.Array | None = None,  # [N, N] bool, True where query (row) must not see key (column)
    drop: Drop | None = None,
) -> jax.Array:  # [B, N, h, d]
    """Dense attention with an optional mask: softmax(q.k / sqrt(d)) v, accumulated in float32."""
    scores = q.shape[-1] ** -0.5 * jnp.einsum("bihd,bjhd->bhij", q, k, preferred_element_type=jnp.float32)
    if blocked is not None:
        scores = jnp.where(blocked, -jnp.inf, scores)
    return _average("bhij,bjhd->bihd", scores, v, drop, lambda total: jnp.moveaxis(total, 1, 2))


def attend_blocks(
    q: jax.Array,  # [B, N, h, d]
    k: jax.Array,  # [B, N, h, d]
    v: jax.Array,  # [B, N, h, d]
    links: jax.Array,  # [blocks, seen] int32
    drop: HeadDropout | None = None,
    *,
    form: str,
) -> jax.Array:  # [B, N, h, d]
    """Attention of each block of queries over its linked blocks of keys. The others are not computed.

    Args:
      form: of `hae_jax.ops.forms.attention_form`; where weights are dropped, "cudnn" is computed as "xla".
    """
    batch, tokens, heads, depth = q.shape
    if form == "materialised":
        return attend(q, k, v, ~_seen_pairs(links, tokens), drop)
    if form == "cudnn" and drop is None and tokens % block_size(tokens) == 0 and cudnn_attention.fits(q):
        return _attend_rows(q, k, v, links)

    if form == "rows":
        def one_head(q, k, v, head):
            return _attend_blocks(q, k, v, links, (lambda p, drop=drop: drop(p, head)) if drop else None)

        return _head_by_head(one_head, q, k, v)

    filling = (0, 0), (0, -tokens % block_size(tokens)), (0, 0), (0, 0)
    q, k, v = (jnp.moveaxis(jnp.pad(a, filling), 2, 1).reshape(batch, heads, len(links), -1, depth) for a in (q, k, v))
    keys, rate = (drop.keys, drop.rate) if drop else (None, 0.0)
    out: jax.Array = block_attention(q, k, v, links, keys, rate, tokens)  # pyright: ignore[reportAssignmentType]  custom_vjp hides the type
    return jnp.moveaxis(out.reshape(batch, heads, -1, depth), 1, 2)[:, :tokens]


def _seen_pairs(links: jax.Array, tokens: int) -> jax.Array:  # [blocks, seen] -> [N, N] bool
    """The pattern of single pairs: True where query (row) sees key (column)."""
    blocks, size = len(links), block_size(tokens)
    seen = jnp.zeros((blocks, blocks), bool).at[jnp.arange(blocks)[:, None], links].set(True)
    return jnp.repeat(jnp.repeat(seen, size, axis=0), size, axis=1)[:tokens, :tokens]


def _attend_rows(q: jax.Array, k: jax.Array, v: jax.Array, links: jax.Array) -> jax.Array:
    """`attend_blocks` for complete blocks with cuDNN's dense kernel, in which each block of queries is a row."""
    batch, tokens, heads, depth = q.shape
    q, k, v = (a.reshape(batch, len(links), -1, heads, depth) for a in (q, k, v))
    k, v = (a[:, links].reshape(batch, len(links), -1, heads, depth) for a in (k, v))
    return cudnn_attention.attend_rows(q, k, v).reshape(batch, tokens, heads, depth)


def _head_by_head(one_head: Callable, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Calls `one_head` (three arrays [B, N, d] and the head's number) for each head of [B, N, h, d].

    The attention weights are recomputed for the gradient, so that only q, k and v are stored. A head's arrays stay in a
    CPU's caches.
    """
    one_head = jax.checkpoint(one_head, prevent_cse=False)  # a loop has no common subexpressions with its gradient
    heads = jnp.arange(q.shape[2])
    q, k, v = (jnp.moveaxis(a, 2, 0) for a in (q, k, v))
    return jnp.moveaxis(jax.lax.map(lambda head: one_head(*head), (q, k, v, heads)), 0, 2)


def _attend_blocks(
    q: jax.Array,  # [B, N, d]
    k: jax.Array,  # [B, N, d]
    v: jax.Array,  # [B, N, d]
    links: jax.Array,  # [blocks, seen] int32
    drop: Drop | None,
) -> jax.Array:  # [B, N, d]
    """One head of `attend_blocks`."""
    batch, tokens, depth = q.shape
    blocks, seen = links.shape
    size = block_size(tokens)

    def cut(a):  # [B, N, d] -> [B, blocks, size, d], the last block padded
        return jnp.pad(a, ((0, 0), (0, blocks * size - tokens), (0, 0))).reshape(batch, blocks, size, depth)

    def gather(a):  # [B, N, d] -> [B, blocks, seen * size, d]
        return cut(a)[:, links].reshape(batch, blocks, seen * size, depth)

    scores = jnp.einsum("bnid,bnjd->bnij", cut(q), gather(k), preferred_element_type=jnp.float32) * depth**-0.5
    if blocks * size != tokens:
        position = (links[:, :, None] * size + jnp.arange(size)).reshape(blocks, 1, seen * size)
        scores = jnp.where(position < tokens, scores, -jnp.inf)
    out = _average("bnij,bnjd->bnid", scores, gather(v), drop, lambda total: total)
    return out.reshape(batch, blocks * size, depth)[:, :tokens]


def _average(contraction: str, scores: jax.Array, v: jax.Array, drop: Drop | None, arrange: Callable) -> jax.Array:
    """softmax(scores) v. The outputs are divided by the sums instead of the weights, which saves a pass over scores."""
    # The maximum cancels in the quotient, so its gradient is exactly zero.
    p = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    total = p.sum(-1)
    p = drop(p) if drop else p
    out = jnp.einsum(contraction, p.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return (out / arrange(total)[..., None]).astype(v.dtype)


def trained_mask_per_scale(tokens: int, key: jax.Array) -> jax.Array:  # [N, N] bool, True is blocked
    """The pattern that `hae_v2c` was trained with: pairs with u > 0.8 and the diagonal are blocked.

    A mask meant as "keep" was read as "block", so four fifths of the pairs are seen, never oneself.
    """
    return (jax.random.uniform(key, (tokens, tokens)) > 0.8) | jnp.eye(tokens, dtype=bool)


def trained_mask_joint(tokens: int, key: jax.Array) -> jax.Array:  # [N, N] bool, True is blocked
    """The pattern of `hae`, `hae_lite`, `hae_v2`: a diagonal band and some random columns for each row are seen."""
    keep = max(1, int(tokens * KEPT_SHARE))
    i = jnp.arange(tokens)
    seen = jnp.abs(i[:, None] - i) <= keep // 2
    if keep > 4:
        score = jax.random.uniform(key, (tokens, tokens))
        threshold = jax.lax.top_k(score, max(1, keep // 4))[0][:, -1:]
        seen |= score >= threshold
    return ~seen
