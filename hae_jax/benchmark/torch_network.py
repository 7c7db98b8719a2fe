"""The five networks in usual PyTorch code: the baseline `--baseline torch`.

It computes the same numbers as `hae_jax.model.UNet` from the same state dict (`tests/benchmark/test_torch_network.py`).
It does not have our savings. The class context is built as an E x E matrix. Sparse patterns are masks on dense
attention. Attention is PyTorch's own fused function. Images are NCHW here.
"""

import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hae_jax.model.conditioning import context_rule
from hae_jax.model.config import HYBRID_HEADS, NORM_GROUPS, UNetConfig

_SCALES = (1, 4, 8)  # patch sizes of the per-scale transformer
_REGIONS = (4, 8)  # patch sizes of the regional tokens in the joint transformer
_MASKED_ABOVE = 64  # in the per-scale transformer, scales with more tokens have a mask


class Condition(NamedTuple):
    """The inputs of each block besides the features."""

    emb: Tensor  # [B, E], time plus class
    context: Tensor | None  # [B, E, E] products of the class embedding with itself; None: no context tokens
    seen: Tensor | None  # [B] bool: rows that see their context; None: all rows
    masks: Iterator[Tensor] | None  # [N, N] bool each, True is blocked; None: the config's pattern


class TorchNetwork(nn.Module):
    """The U-Net. The names in its state dict are those that `hae_jax.model.torch_state` gives."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        self.time_embed = _embedding_mlp(config)
        if config.num_classes is not None:
            self.label_emb = nn.Embedding(config.num_classes, config.model_channels)
            self.class_emb = _embedding_mlp(config)
        self.input_blocks, skips = _encoder(config)
        width = config.widths[-1]
        self.middle_block = nn.ModuleList([
            ResBlock(width, width, config),
            AttentionBlock(width, config.heads(width, decoder=False), config),
            ResBlock(width, width, config),
        ])
        self.output_blocks = _decoder(config, skips)
        self.out = nn.Sequential(nn.GroupNorm(NORM_GROUPS, config.widths[0]), _unfused_silu(config),
                                 _zero(nn.Conv2d(config.widths[0], config.output_width, 3, padding=1)))

    def forward(
        self,
        x: Tensor,  # [B, C, H, W]
        t: Tensor,  # [B]
        y: Tensor | None = None,  # [B] labels; None: a null pass
        drop: Tensor | None = None,  # [B] bool, rows whose class embedding is dropped
        masks: Sequence[Tensor] | None = None,  # [N, N] bool, one for each masked attention, in forward order
    ) -> Tensor:  # [B, out_channels, H, W]
        cond = self._condition(t, y, drop, masks)
        h, skips = x, []
        for block in self.input_blocks:
            h = _run(block, h, cond)
            skips.append(h)
        h = _run(self.middle_block, h, cond)
        for block in self.output_blocks:
            h = _run(block, torch.cat([h, skips.pop()], dim=1), cond)
        return self.out(h).float()

    def _condition(self, t, y, drop, masks) -> Condition:
        emb = self.time_embed(timestep_embedding(t, self.config.model_channels))
        masks = None if masks is None else iter(masks)
        if self.config.num_classes is None:
            return Condition(emb, None, None, masks)
        c = torch.zeros_like(emb) if y is None else self.class_emb(self.label_emb(y))
        if drop is not None:
            c = c.masked_fill(drop[:, None], 0)
        emb, rule = emb + c, context_rule(self.config)
        zero = (c.abs() <= self.config.zero_threshold).all(dim=1)  # [B]
        # The published rule depends on values: there is no context if all rows of the batch are zero.
        if rule == "batch" and zero.all():
            return Condition(emb, None, None, masks)
        return Condition(emb, c[:, :, None] * c[:, None, :], ~zero if rule == "sample" else None, masks)


def timestep_embedding(t: Tensor, width: int) -> Tensor:  # [B] -> [B, width]
    """Cosines, then sines, of t * exp(-ln(10000) i / half)."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
    angles = t.float()[:, None] * frequencies
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, width % 2))


class ResBlock(nn.Module):
    """Norm, activation, convolution; embedding; norm, activation, dropout, convolution; residual connection."""

    def __init__(self, channels: int, out_channels: int, config: UNetConfig, *, scale_shift: bool | None = None,
                 resample: nn.Module | None = None):
        super().__init__()
        self.scale_shift = config.use_scale_shift_norm if scale_shift is None else scale_shift
        self.in_layers = nn.Sequential(nn.GroupNorm(NORM_GROUPS, channels), _unfused_silu(config),
                                       nn.Conv2d(channels, out_channels, 3, padding=1))
        self.emb_layers = nn.Sequential(
            nn.SiLU(), nn.Linear(config.embedding_width, (2 if self.scale_shift else 1) * out_channels))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(NORM_GROUPS, out_channels), nn.SiLU() if self.scale_shift else _unfused_silu(config),
            nn.Dropout(config.dropout), _zero(nn.Conv2d(out_channels, out_channels, 3, padding=1)))
        self.skip_connection = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)
        self.resample = nn.Identity() if resample is None else resample

    def forward(self, x: Tensor, cond: Condition) -> Tensor:  # [B, C, H, W] -> [B, D, H', W']
        h = self.in_layers[2](self.resample(self.in_layers[:2](x)))
        emb = self.emb_layers(cond.emb)[:, :, None, None]
        if self.scale_shift:
            scale, shift = emb.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + emb)
        return self.skip_connection(self.resample(x)) + h


class AttentionBlock(nn.Module):
    """Attention over context tokens and pixels, in this order, with one softmax; residual connection."""

    def __init__(self, channels: int, heads: int, config: UNetConfig):
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(NORM_GROUPS, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.encoder_kv = nn.Conv1d(config.embedding_width, 2 * channels, 1)
        self.proj_out = _zero(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor, cond: Condition) -> Tensor:  # [B, C, H, W] -> [B, C, H, W]
        q, k, v = self._by_head(self.qkv(self.norm(x).flatten(2)), 3)  # [B, h, T, d] each
        mask = None
        if cond.context is not None:
            context_k, context_v = self._by_head(self.encoder_kv(cond.context), 2)  # [B, h, E, d] each
            k, v = torch.cat([context_k, k], dim=2), torch.cat([context_v, v], dim=2)  # [B, h, E + T, d]
            if cond.seen is not None:
                is_pixel = torch.arange(k.shape[2], device=x.device) >= context_k.shape[2]
                mask = (cond.seen[:, None] | is_pixel)[:, None, None]  # [B, 1, 1, E + T], True is seen
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return x + self.proj_out(h.transpose(2, 3).reshape(x.shape[0], x.shape[1], -1)).reshape(x.shape)

    def _by_head(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:  # [B, parts * C, N] -> parts of [B, h, N, d]
        # The channels are head-major: all parts of head 0, then all parts of head 1.
        return x.reshape(x.shape[0], self.heads, -1, x.shape[2]).transpose(2, 3).chunk(parts, dim=3)


class PerScaleHybrid(nn.Module):
    """The block of `hae_v2c`: a ResBlock and a transformer on its output; the outputs of both are fused."""

    def __init__(self, channels: int, config: UNetConfig):
        super().__init__()
        self.cnn_block = ResBlock(channels, channels, config, scale_shift=False)
        self.transformer_block = PerScaleTransformer(channels, config)
        self.fusion = nn.Sequential(nn.Conv2d(2 * channels, channels, 1), nn.GroupNorm(8, channels), nn.SiLU())

    def forward(self, x: Tensor, cond: Condition) -> Tensor:  # [B, C, H, W] -> [B, C, H, W]
        h = self.cnn_block(x, cond)
        return self.fusion(torch.cat([h, self.transformer_block(h, cond)], dim=1))


class PerScaleTransformer(nn.Module):
    """One attention for each patch size. The norms and the MLP are shared by the scales."""

    def __init__(self, channels: int, config: UNetConfig):
        super().__init__()
        self.config = config
        self.attentions = nn.ModuleList([_multi_head_attention(channels, config) for _ in _SCALES])
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.mlp = _bottleneck_mlp(channels, config)
        self.dropout = nn.Dropout(config.dropout)
        self.scale_fusion = nn.Linear(len(_SCALES) * channels, channels)

    def forward(self, x: Tensor, cond: Condition) -> Tensor:  # [B, C, H, W] -> [B, C, H, W]
        scales = [self._scale(x, size, attention, cond)
                  for size, attention in zip(_SCALES, self.attentions, strict=True)]
        return self.scale_fusion(torch.cat(scales, dim=1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def _scale(self, x: Tensor, size: int, attention: nn.Module, cond: Condition) -> Tensor:
        height, width = x.shape[2:]
        # The right and the bottom are padded with zeros, which count in the mean.
        pooled = F.avg_pool2d(F.pad(x, (0, -width % size, 0, -height % size)), size)  # [B, C, H/size, W/size]
        tokens = _tokens(pooled)  # [B, N, C]
        mask = _mask(tokens, self.config, cond) if tokens.shape[1] > _MASKED_ABOVE else None
        tokens = tokens + self.dropout(_attend(attention, self.norm1(tokens), mask))
        tokens = tokens + self.mlp(self.norm2(tokens))
        h = tokens.transpose(1, 2).reshape(pooled.shape)
        return h if size == 1 else F.interpolate(h, size=(height, width), mode="bilinear", align_corners=False)


class JointHybrid(nn.Module):
    """The block of `hae`, `hae_lite` and `hae_v2`: convolutions and a transformer, fused; residual connection."""

    def __init__(self, channels: int, config: UNetConfig):
        super().__init__()
        self.concatenates = config.rules.projection == "per_patch"
        self.conv_branch = nn.Sequential(
            nn.GroupNorm(NORM_GROUPS, channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1),
            nn.GroupNorm(NORM_GROUPS, channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1))
        self.transformer_branch = JointTransformer(channels, config)
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(config.embedding_width, channels))
        self.fusion_conv = nn.Conv2d((2 if self.concatenates else 1) * channels, channels, 1)

    def forward(self, x: Tensor, cond: Condition) -> Tensor:  # [B, C, H, W] -> [B, C, H, W]
        h = x + self.emb_layers(cond.emb)[:, :, None, None]
        branches = self.conv_branch(h), self.transformer_branch(h, cond)
        return x + self.fusion_conv(torch.cat(branches, dim=1) if self.concatenates else sum(branches) / 2)


class JointTransformer(nn.Module):
    """Local and regional tokens in one sequence and one attention. The local tokens are kept."""

    def __init__(self, channels: int, config: UNetConfig):
        super().__init__()
        self.config = config
        self.local_norm = nn.LayerNorm(channels)
        self.regional_norms = nn.ModuleList([nn.LayerNorm(channels) for _ in _REGIONS])
        self.shared = config.rules.projection == "shared"
        if self.shared:
            self.shared_patch_embed = nn.Conv2d(channels, channels, 1)
        else:
            self.patch_projections = nn.ModuleList([nn.Linear(size**2 * channels, channels) for size in _REGIONS])
        self.multihead_attn = _multi_head_attention(channels, config)
        self.norm_out = nn.LayerNorm(channels)
        wide = config.rules.mlp == "wide"
        self.mlp = _mlp(channels, 4 * channels, config) if wide else _bottleneck_mlp(channels, config)

    def forward(self, x: Tensor, cond: Condition) -> Tensor:  # [B, C, H, W] -> [B, C, H, W]
        height, width = x.shape[2:]
        projected = self.shared_patch_embed(x) if self.shared else x
        tokens = [self.local_norm(_tokens(projected))]  # [B, H * W, C]
        for i, size in enumerate(_REGIONS):
            if height % size == 0 and width % size == 0:
                tokens.append(self.regional_norms[i](self._regions(projected, i, size)))
        tokens = torch.cat(tokens, dim=1)  # [B, N, C]
        # There is no residual around the attention, since the published code has none.
        a = _attend(self.multihead_attn, tokens, _mask(tokens, self.config, cond))[:, :height * width]
        return x + (a + self.mlp(self.norm_out(a))).transpose(1, 2).reshape(x.shape)

    def _regions(self, x: Tensor, i: int, size: int) -> Tensor:  # [B, C, H, W] -> [B, H/size * W/size, C]
        if self.shared:
            return _tokens(F.avg_pool2d(x, size))
        patches = F.unfold(x, size, stride=size)  # [B, C * size * size, N], each patch as (C, row, column)
        return self.patch_projections[i](patches.transpose(1, 2))


def published_mask(tokens: int, per_scale: bool, device: torch.device) -> Tensor:  # [N, N] bool, True is blocked
    """A random draw of the pattern with which the networks were published."""
    u, i = torch.rand(tokens, tokens, device=device), torch.arange(tokens, device=device)
    if per_scale:
        return (u > 0.8) | (i[:, None] == i)
    keep = max(1, int(tokens * 0.1))
    blocked = (i[:, None] - i).abs() > keep // 2
    if keep > 4:
        columns = u.topk(max(1, keep // 4), dim=1).indices  # [N, keep // 4], drawn without replacement
        blocked = blocked.scatter(1, columns, False)
    return blocked


def _mask(tokens: Tensor, config: UNetConfig, cond: Condition) -> Tensor | None:  # [B, N, C] -> [N, N] bool
    if cond.masks is not None:
        return next(cond.masks)
    if config.sparse_pattern == "dense":
        return None
    return published_mask(tokens.shape[1], config.rules.hybrid == "per_scale", tokens.device)


def _attend(attention: nn.Module, tokens: Tensor, mask: Tensor | None) -> Tensor:  # [B, N, C] -> [B, N, C]
    # Without the weights, PyTorch may use its fused attention.
    return attention(tokens, tokens, tokens, attn_mask=mask, need_weights=False)[0]


def _tokens(x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, H * W, C]
    return x.flatten(2).transpose(1, 2)


def _run(block: nn.Module, h: Tensor, cond: Condition) -> Tensor:
    for layer in block.children():
        h = layer(h) if isinstance(layer, nn.Conv2d | nn.Sequential) else layer(h, cond)
    return h


def _multi_head_attention(channels: int, config: UNetConfig) -> nn.MultiheadAttention:
    return nn.MultiheadAttention(channels, HYBRID_HEADS, dropout=config.dropout, batch_first=True)


def _mlp(channels: int, hidden: int, config: UNetConfig) -> nn.Sequential:
    return nn.Sequential(nn.Linear(channels, hidden), nn.GELU(), nn.Dropout(config.dropout),
                         nn.Linear(hidden, channels), nn.Dropout(config.dropout))


def _bottleneck_mlp(channels: int, config: UNetConfig) -> nn.Module:
    # The published names have two levels here.
    return nn.Sequential(OrderedDict(mlp=_mlp(channels, max(1, int(channels * config.bottleneck_ratio)), config)))


def _embedding_mlp(config: UNetConfig) -> nn.Sequential:
    width = config.embedding_width
    return nn.Sequential(nn.Linear(config.model_channels, width), nn.SiLU(), nn.Linear(width, width))


def _unfused_silu(config: UNetConfig) -> nn.Module:
    """`fpdm` and `hae` have no activation in these places."""
    return nn.SiLU() if config.rules.unfused_silu else nn.Identity()


def _zero(layer: nn.Module) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def _downsample(channels: int, config: UNetConfig) -> nn.Module:
    conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
    return nn.Sequential(OrderedDict(op=conv if config.conv_resample else nn.AvgPool2d(2)))


def _upsample(channels: int, config: UNetConfig) -> nn.Module:
    conv = nn.Conv2d(channels, channels, 3, padding=1) if config.conv_resample else nn.Identity()
    return nn.Sequential(OrderedDict(nearest=nn.Upsample(scale_factor=2), conv=conv))


def _layers(width: int, out: int, config: UNetConfig, level: int, *, decoder: bool) -> list[nn.Module]:
    attends = 2**level in config.attention_resolutions
    attention = [AttentionBlock(out, config.heads(out, decoder=decoder), config)] if attends else []
    return [ResBlock(width, out, config), *attention]


def _encoder(config: UNetConfig) -> tuple[nn.ModuleList, list[int]]:
    """The encoder's blocks, and the channels of each block's skip connection."""
    width = config.widths[0]
    blocks, skips = [nn.ModuleList([nn.Conv2d(config.in_channels, width, 3, padding=1)])], [width]
    for level, out in enumerate(config.widths):
        for _ in range(config.num_res_blocks):
            blocks.append(nn.ModuleList(_layers(width, out, config, level, decoder=False)))
            skips.append(width := out)
        if level != len(config.widths) - 1:
            down = (ResBlock(width, width, config, resample=nn.AvgPool2d(2)) if config.resblock_updown
                    else _downsample(width, config))
            blocks.append(nn.ModuleList([down]))
            skips.append(width)
    return nn.ModuleList(blocks), skips


def _decoder(config: UNetConfig, skips: list[int]) -> nn.ModuleList:
    """The decoder's blocks. Each takes one skip."""
    hybrids = {None: None, "joint": JointHybrid, "per_scale": PerScaleHybrid}
    hybrid = hybrids[config.rules.hybrid if config.use_hae else None]
    blocks, skips, width = [], list(skips), config.widths[-1]
    for level, out in reversed(list(enumerate(config.widths))):
        for i in range(config.num_res_blocks + 1):
            layers = _layers(width + skips.pop(), out, config, level, decoder=True)
            if level and i == config.num_res_blocks:
                layers += [hybrid(out, config)] if hybrid else []
                layers.append(ResBlock(out, out, config, resample=nn.Upsample(scale_factor=2))
                              if config.resblock_updown else _upsample(out, config))
            blocks.append(nn.ModuleList(layers))
            width = out
    return nn.ModuleList(blocks)
