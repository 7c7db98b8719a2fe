"""The CNN+transformer blocks of the decoder, with joint attention over all patch sizes or one attention per scale.

Source: the decoder of the heterogeneous auto-encoder, Lu et al. 2024, "Anomaly Detection for Medical Images Using
Heterogeneous Auto-Encoder", IEEE Transactions on Image Processing 33, doi:10.1109/TIP.2024.3381435.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from hae_jax.model import sparse
from hae_jax.model.config import HYBRID_HEADS, UNetConfig
from hae_jax.model.layers import (
    Conditioning,
    Dropout,
    HeadDropout,
    LayerKeys,
    ResBlock,
    conv,
    group_norm,
    layer_norm,
    linear,
    pool,
    torch_uniform,
    uniform,
)
from hae_jax.ops.forms import attention_form

_SCALES = (1, 4, 8)  # patch sizes of the per-scale transformer
_REGIONS = (4, 8)  # patch sizes of the regional tokens in the joint transformer
_MASKED_ABOVE = 64  # in the per-scale transformer, attention is sparse for scales with more tokens
_FUSION_GROUPS = 8


class MultiHeadAttention(nnx.Module):
    """PyTorch's MultiheadAttention (packed in_proj: q, then k, then v) with a sparse pattern."""

    def __init__(self, channels: int, config: UNetConfig, rngs: nnx.Rngs):
        self.config = config
        self.in_proj = nnx.Linear(channels, 3 * channels, dtype=config.dtype, rngs=rngs,
                                  kernel_init=uniform(math.sqrt(6 / (4 * channels))))
        self.out_proj = nnx.Linear(channels, channels, dtype=config.dtype, rngs=rngs,
                                   kernel_init=torch_uniform(channels))
        self.dropout = Dropout(config.dropout)

    def __call__(
        self,
        tokens: jax.Array,  # [B, N, C]
        randomness: LayerKeys | None,
        blocked: jax.Array | None,  # [N, N] bool
        *,
        is_sparse: bool,
    ) -> jax.Array:  # [B, N, C]
        batch, count, channels = tokens.shape
        qkv = self.in_proj(tokens).reshape(batch, count, 3, HYBRID_HEADS, channels // HYBRID_HEADS)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        with jax.named_scope(f"{'sparse ' if is_sparse else ''}attention, {count} tokens"):
            out = self._attend(q, k, v, randomness, blocked, is_sparse)
        return self.out_proj(out.reshape(tokens.shape))

    def _attend(self, q, k, v, randomness, blocked, is_sparse) -> jax.Array:  # [B, N, h, d]
        count, drop = q.shape[1], self._drop(randomness)
        if blocked is not None or not is_sparse or self.config.sparse_pattern == "dense":
            return sparse.attend(q, k, v, blocked, drop)
        if self.config.sparse_pattern == "blocks":
            links = sparse.block_links(count, self._pattern_key(randomness))
            form = attention_form(self.config.attention, self.config.dtype)
            return sparse.attend_blocks(q, k, v, links, drop, form=form)
        per_scale = self.config.rules.hybrid == "per_scale"
        trained_mask = sparse.trained_mask_per_scale if per_scale else sparse.trained_mask_joint
        return sparse.attend(q, k, v, trained_mask(count, self._pattern_key(randomness)), drop)

    def _drop(self, randomness: LayerKeys | None) -> HeadDropout | None:
        """Dropout of attention weights; None without dropout."""
        if randomness is None or not self.dropout.rate:
            return None
        return HeadDropout(randomness.heads[self.dropout.layer], self.dropout.rate)

    def _pattern_key(self, randomness: LayerKeys | None) -> jax.Array:
        """The key of this attention's pattern: that of the step if patterns are redrawn, else that of the seed."""
        if self.config.sparse_redraw and randomness is not None:
            return randomness.shared[self.dropout.layer]
        return jax.random.fold_in(jax.random.key(self.config.sparse_seed), self.dropout.layer)


class MLP(nnx.Module):
    """Linear, GELU (the exact one), dropout, Linear, dropout."""

    def __init__(self, channels: int, hidden: int, config: UNetConfig, rngs: nnx.Rngs):
        self.fc1 = linear(channels, hidden, rngs, dtype=config.dtype)
        self.fc2 = linear(hidden, channels, rngs, dtype=config.dtype)
        self.dropout1, self.dropout2 = Dropout(config.dropout), Dropout(config.dropout)

    def __call__(self, x: jax.Array, randomness: LayerKeys | None) -> jax.Array:  # [B, N, C] -> [B, N, C]
        h = self.dropout1(jax.nn.gelu(self.fc1(x), approximate=False), randomness)
        return self.dropout2(self.fc2(h), randomness)


class PerScaleTransformer(nnx.Module):
    """One attention per patch size. All scales share the norms and the MLP."""

    def __init__(self, channels: int, config: UNetConfig, rngs: nnx.Rngs):
        self.attentions = nnx.List([MultiHeadAttention(channels, config, rngs) for _ in _SCALES])
        self.norm1 = layer_norm(channels, rngs, dtype=config.dtype)
        self.norm2 = layer_norm(channels, rngs, dtype=config.dtype)
        self.bottleneck = MLP(channels, max(1, int(channels * config.bottleneck_ratio)), config, rngs)
        self.token_dropout = Dropout(config.dropout)
        self.scale_fusion = linear(len(_SCALES) * channels, channels, rngs, dtype=config.dtype)

    def __call__(self, x: jax.Array, cond: Conditioning) -> jax.Array:  # [B, H, W, C] -> [B, H, W, C]
        masks = iter(cond.sparse_masks or ())
        scales = [self._scale(x, size, attention, cond.randomness, masks)
                  for size, attention in zip(_SCALES, self.attentions, strict=True)]
        return self.scale_fusion(jnp.concatenate(scales, axis=-1))

    def _scale(self, x, size, attention, randomness, masks):
        batch, height, width, channels = x.shape
        pooled = pool(x, size)
        tokens = pooled.reshape(batch, -1, channels)
        is_sparse = tokens.shape[1] > _MASKED_ABOVE
        blocked = next(masks, None) if is_sparse else None
        h = attention(self.norm1(tokens), randomness, blocked, is_sparse=is_sparse)
        tokens = tokens + self.token_dropout(h, randomness)
        tokens = tokens + self.bottleneck(self.norm2(tokens), randomness)
        return jax.image.resize(tokens.reshape(pooled.shape), (batch, height, width, channels), "linear")


class PerScaleHybrid(nnx.Module):
    """The block of `hae_v2c`: a ResBlock and the per-scale transformer on its output, fused. No outer residual."""

    def __init__(self, channels: int, config: UNetConfig, rngs: nnx.Rngs):
        self.cnn_block = ResBlock(channels, channels, config, rngs, scale_shift=False)
        self.transformer_block = PerScaleTransformer(channels, config, rngs)
        self.fusion_conv = conv(2 * channels, channels, 1, config, rngs)
        self.fusion_norm = group_norm(channels, rngs, dtype=config.dtype, groups=_FUSION_GROUPS)

    def __call__(self, x: jax.Array, cond: Conditioning) -> jax.Array:  # [B, H, W, C] -> [B, H, W, C]
        h = self.cnn_block(x, cond)
        h = jnp.concatenate([h, self.transformer_block(h, cond)], axis=-1)
        return self.fusion_norm(self.fusion_conv(h), silu=True)

    @staticmethod
    def masked_tokens(height: int, width: int) -> list[int]:
        """Token counts of the masked attentions, in forward order."""
        counts = [-(-height // size) * -(-width // size) for size in _SCALES]
        return [count for count in counts if count > _MASKED_ABOVE]


class JointTransformer(nnx.Module):
    """One attention over local and regional tokens in one sequence. The output is that of the local tokens."""

    def __init__(self, channels: int, config: UNetConfig, rngs: nnx.Rngs):
        dtype, rules = config.dtype, config.rules
        self.local_norm = layer_norm(channels, rngs, dtype=dtype)
        self.regional_norms = nnx.List([layer_norm(channels, rngs, dtype=dtype) for _ in _REGIONS])
        self.shares_projection = rules.projection == "shared"
        if self.shares_projection:
            self.shared_patch_embed = conv(channels, channels, 1, config, rngs)
        else:
            self.patch_projections = nnx.List(
                [linear(size * size * channels, channels, rngs, dtype=dtype) for size in _REGIONS])
        self.multihead_attn = MultiHeadAttention(channels, config, rngs)
        self.norm_out = layer_norm(channels, rngs, dtype=dtype)
        self.has_bottleneck = rules.mlp == "bottleneck"
        if self.has_bottleneck:
            self.bottleneck = MLP(channels, max(1, int(channels * config.bottleneck_ratio)), config, rngs)
        else:
            self.mlp = MLP(channels, 4 * channels, config, rngs)

    def __call__(self, x: jax.Array, cond: Conditioning) -> jax.Array:  # [B, H, W, C] -> [B, H, W, C]
        batch, height, width, channels = x.shape
        projected = self.shared_patch_embed(x) if self.shares_projection else x
        tokens = [self.local_norm(projected.reshape(batch, height * width, channels))]
        for i, size in enumerate(_REGIONS):
            if height % size == 0 and width % size == 0:
                tokens.append(self.regional_norms[i](self._regions(projected, i, size)))
        blocked = cond.sparse_masks[0] if cond.sparse_masks else None
        # There is no residual around the attention, since the published code has none.
        a = self.multihead_attn(jnp.concatenate(tokens, axis=1), cond.randomness, blocked, is_sparse=True)
        a = a[:, :height * width]
        mlp = self.bottleneck if self.has_bottleneck else self.mlp
        return x + (a + mlp(self.norm_out(a), cond.randomness)).reshape(x.shape)

    def _regions(self, x: jax.Array, i: int, size: int) -> jax.Array:  # [B, H, W, C] -> [B, H/size * W/size, C]
        batch, height, width, channels = x.shape
        if self.shares_projection:
            return pool(x, size).reshape(batch, -1, channels)
        patches = x.reshape(batch, height // size, size, width // size, size, channels)
        patches = jnp.transpose(patches, (0, 1, 3, 5, 2, 4))  # each flattened as (C, row, column)
        return self.patch_projections[i](patches.reshape(batch, -1, channels * size * size))


class ConvBranch(nnx.Module):
    """GroupNorm, SiLU, 3x3 convolution, twice."""

    def __init__(self, channels: int, config: UNetConfig, rngs: nnx.Rngs):
        self.norm1 = group_norm(channels, rngs, dtype=config.dtype)
        self.conv1 = conv(channels, channels, 3, config, rngs)
        self.norm2 = group_norm(channels, rngs, dtype=config.dtype)
        self.conv2 = conv(channels, channels, 3, config, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:  # [B, H, W, C] -> [B, H, W, C]
        x = self.conv1(self.norm1(x, silu=True))
        return self.conv2(self.norm2(x, silu=True))


class JointHybrid(nnx.Module):
    """The block of `hae`, `hae_lite`, `hae_v2`: convolutions and a joint transformer, fused; residual connection."""

    def __init__(self, channels: int, config: UNetConfig, rngs: nnx.Rngs):
        self.concatenates = config.rules.projection == "per_patch"
        self.conv_branch = ConvBranch(channels, config, rngs)
        self.transformer_branch = JointTransformer(channels, config, rngs)
        self.emb_proj = linear(config.embedding_width, channels, rngs, dtype=config.dtype)
        self.fusion = conv((2 if self.concatenates else 1) * channels, channels, 1, config, rngs)

    def __call__(self, x: jax.Array, cond: Conditioning) -> jax.Array:  # [B, H, W, C] -> [B, H, W, C]
        h = x + self.emb_proj(nnx.silu(cond.emb))[:, None, None, :]
        branches = self.conv_branch(h), self.transformer_branch(h, cond)
        fused = jnp.concatenate(branches, axis=-1) if self.concatenates else (branches[0] + branches[1]) / 2
        return x + self.fusion(fused)

    @staticmethod
    def masked_tokens(height: int, width: int) -> list[int]:
        """Token counts of the masked attentions, in forward order."""
        regions = [height // size * (width // size) for size in _REGIONS if height % size == 0 and width % size == 0]
        return [height * width + sum(regions)]
