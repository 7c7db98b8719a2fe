"""The U-Net's own attention: over the pixels of a feature map, and over the class context in its rank-one form."""

import jax
import jax.numpy as jnp
from flax import nnx

from hae_jax.model.conditioning import Context
from hae_jax.model.config import UNetConfig
from hae_jax.model.layers import Conditioning, group_norm, linear


class AttentionBlock(nnx.Module):
    """Self-attention over H*W tokens joined with E context tokens in one softmax, plus the input."""

    def __init__(self, channels: int, heads: int, config: UNetConfig, rngs: nnx.Rngs):
        self.heads = heads
        self.norm = group_norm(channels, rngs, dtype=config.dtype)
        self.qkv = linear(channels, 3 * channels, rngs, dtype=config.dtype)
        # Present in every trained state dict, also where no class ever feeds it.
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
        h = attend_with_context(q, k, v, cond.context, self.encoder_kv.kernel[...], self.encoder_kv.bias[...])
        return x + self.proj_out(h.reshape(batch, height * width, channels)).reshape(x.shape)


def attend_with_context(
    q: jax.Array,  # [B, T, h, d]
    k: jax.Array,  # [B, T, h, d]
    v: jax.Array,  # [B, T, h, d]
    context: Context | None,
    kernel: jax.Array,  # [E, h * 2 * d] float32, head-major: each head's k, then its v
    bias: jax.Array,  # [h * 2 * d] float32
) -> jax.Array:  # [B, T, h, d]
    """softmax over [context tokens, pixels] of q.k / sqrt(d), times v, without the context's keys and values.

    With u = W_k c and w = W_v c per head, the logit of query q at context token s is
    d^(-1/2) ((q.u) c_s + q.b_k), and the context adds w sum_s p_s c_s + b_v sum_s p_s to the output. The two softmaxes
    are joined by their maxima and sums; logits, sums and outputs are accumulated in float32.
    """
    scale = q.shape[-1] ** -0.5
    scores = scale * jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=jnp.float32)
    peak = scores.max(-1)  # [B, h, T]
    if context is not None:
        u, w, b_k, b_v = _project(context.c, kernel, bias, heads=q.shape[2])
        logits = _context_logits(scale * q.astype(jnp.float32), u, b_k, context)  # [B, h, T, E]
        peak = jnp.maximum(peak, logits.max(-1))
    # The shift cancels in the quotient, so its gradient is exactly zero.
    peak = jax.lax.stop_gradient(peak)[..., None]
    p = jnp.exp(scores - peak)
    total = p.sum(-1)
    out = jnp.einsum("bhts,bshd->bthd", p.astype(v.dtype), v, preferred_element_type=jnp.float32)
    if context is not None:
        p_context = jnp.exp(logits - peak)
        mass = p_context.sum(-1)  # [B, h, T]
        moment = jnp.einsum("bhts,bs->bht", p_context, context.c)
        out += jnp.einsum("bht,bhd->bthd", moment, w) + jnp.einsum("bht,hd->bthd", mass, b_v)
        total += mass
    return (out / jnp.moveaxis(total, 1, 2)[..., None]).astype(q.dtype)


def _project(c: jax.Array, kernel: jax.Array, bias: jax.Array, heads: int) -> tuple[jax.Array, ...]:
    """W_k c and W_v c per head [B, h, d], and the biases b_k and b_v [h, d]."""
    projected = (c @ kernel).reshape(c.shape[0], heads, 2, -1)
    bias = bias.reshape(heads, 2, -1)
    return projected[:, :, 0], projected[:, :, 1], bias[:, 0], bias[:, 1]


def _context_logits(q: jax.Array, u: jax.Array, b_k: jax.Array, context: Context) -> jax.Array:
    """(q.u) c_s + q.b_k for each context token s [B, h, T, E]; minus infinity in rows that do not see theirs."""
    slope = jnp.einsum("bthd,bhd->bht", q, u)
    offset = jnp.einsum("bthd,hd->bht", q, b_k)
    logits = slope[..., None] * context.c[:, None, None, :] + offset[..., None]
    return jnp.where(context.seen[:, None, None, None], logits, -jnp.inf)
