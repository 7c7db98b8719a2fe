"""The attention of the U-Net, over the pixels of a feature map and over the class context in its rank-one form."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from hae_jax.model.conditioning import Context
from hae_jax.model.config import UNetConfig
from hae_jax.model.layers import Conditioning, group_norm, linear
from hae_jax.ops import cudnn_attention, materialised
from hae_jax.ops.attention import attention
from hae_jax.ops.forms import attention_form
from hae_jax.ops.log_sum_exp import log_sum_exp


class AttentionBlock(nnx.Module):
    """Attention over H*W pixel tokens and E context tokens in one softmax; residual connection."""

    def __init__(self, channels: int, heads: int, config: UNetConfig, rngs: nnx.Rngs):
        self.heads, self.config = heads, config
        self.norm = group_norm(channels, rngs, dtype=config.dtype)
        self.qkv = linear(channels, 3 * channels, rngs, dtype=config.dtype)
        # Every published state dict has it, also those of networks without classes.
        self.encoder_kv = linear(config.embedding_width, 2 * channels, rngs, dtype=jnp.float32)
        self.proj_out = linear(channels, channels, rngs, dtype=config.dtype, zero=True)

    def __call__(
        self,
        x: jax.Array,  # [B, H, W, C]
        cond: Conditioning,
    ) -> jax.Array:  # [B, H, W, C]
        batch, height, width, channels = x.shape
        qkv = self.qkv(self.norm(x).reshape(batch, height * width, channels))
        q, k, v = jnp.moveaxis(qkv.reshape(batch, height * width, self.heads, 3, -1), 3, 0)
        assert self.encoder_kv.bias is not None  # `linear` makes one
        with jax.named_scope(f"attention, {height * width} tokens"):
            h = attend_with_context(q, k, v, cond.context, self.encoder_kv.kernel[...], self.encoder_kv.bias[...],
                                    attention_form(self.config.attention, self.config.dtype))
        return x + self.proj_out(h.reshape(batch, height * width, channels)).reshape(x.shape)


def attend_with_context(
    q: jax.Array,  # [B, T, h, d]
    k: jax.Array,  # [B, T, h, d]
    v: jax.Array,  # [B, T, h, d]
    context: Context | None,
    kernel: jax.Array,  # [E, h * 2 * d] float32, head-major: each head's k, then its v
    bias: jax.Array,  # [h * 2 * d] float32
    form: str,
) -> jax.Array:  # [B, T, h, d]
    """softmax over [context tokens, pixels] of q.k / sqrt(d), times v, without the context's keys and values.

    With u = W_k c and w = W_v c per head, the logit of query q at context token s is
    d^(-1/2) ((q.u) c_s + q.b_k), and the context adds w sum_s p_s c_s + b_v sum_s p_s to the output. So the context
    is, to each query, one more token: its logit is L(a) + d^(-1/2) q.b_k, its value L'(a) w + b_v, with
    a = d^(-1/2) q.u and L the log-sum-exp of a c_s. Logits, sums and outputs are accumulated in float32.

    Args:
      form: of `hae_jax.ops.forms.attention_form`.
    """
    if form == "materialised":
        if context is None:
            return materialised.attend(q, k, v)
        return materialised.attend_with_context(q, k, v, *context, kernel, bias)
    by_rows = form == "rows"
    token = None if context is None else _context_token(q, context, kernel, bias, by_rows)
    if form == "cudnn" and cudnn_attention.fits(q):
        return cudnn_attention.attend_with_token(q, k, v, *token) if token else cudnn_attention.attend(q, k, v)
    out, lse = attention(*(jnp.swapaxes(x, 1, 2) for x in (q, k, v)), by_rows)  # pyright: ignore[reportGeneralTypeIssues]  custom_vjp hides the result's type
    out, lse = jnp.swapaxes(out, 1, 2), jnp.swapaxes(lse, 1, 2)
    if token is not None:
        value = token.factor[..., None] * token.direction[:, None] + token.base
        # Both softmaxes are combined by their sums. The context's share is exp(logit) / (exp(logit) + exp(lse)).
        out += jax.nn.sigmoid(token.logit - lse)[..., None] * (value - out)
    return out.astype(q.dtype)


class _Token(NamedTuple):
    """The context as one additional token of each query, with value factor * direction + base. All are float32."""

    logit: jax.Array  # [B, T, h]; minus infinity in rows that see no context
    factor: jax.Array  # [B, T, h]
    direction: jax.Array  # [B, h, d]
    base: jax.Array  # [h, d]


def _context_token(q: jax.Array, context: Context, kernel: jax.Array, bias: jax.Array, by_rows: bool) -> _Token:
    batch, _, heads, depth = q.shape
    u, w = jnp.moveaxis((context.c @ kernel).reshape(batch, heads, 2, depth), 2, 0)  # [B, h, d]
    b_k, b_v = jnp.moveaxis(bias.reshape(heads, 2, depth), 1, 0)  # [h, d]
    q = depth**-0.5 * q.astype(jnp.float32)
    log_sum, mean = log_sum_exp(jnp.einsum("bthd,bhd->bht", q, u), context.c, by_rows)  # pyright: ignore[reportGeneralTypeIssues]  custom_vjp hides the result's type
    offset = jnp.einsum("bthd,hd->bht", q, b_k)
    logit = jnp.where(context.seen[:, None, None], log_sum + offset, -jnp.inf)
    return _Token(jnp.swapaxes(logit, 1, 2), jnp.swapaxes(mean, 1, 2), w, b_v)
