"""The U-Net in five variants: a network eps = f(x, t, y), which `hae_jax.diffusion` uses as a function."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from hae_jax.model.attention import AttentionBlock
from hae_jax.model.conditioning import Context, EmbeddingMLP, class_context, context_rule, timestep_embedding
from hae_jax.model.config import UNetConfig
from hae_jax.model.hybrid import JointHybrid, PerScaleHybrid
from hae_jax.model.layers import (
    Conditioning,
    Downsample,
    Dropout,
    ParameterKeys,
    Randomness,
    ResBlock,
    Upsample,
    conv,
    group_norm,
    standard_normal,
    walk,
)

_HYBRIDS = {"joint": JointHybrid, "per_scale": PerScaleHybrid}
_HYBRID_LAYERS = tuple(_HYBRIDS.values())


class UNet(nnx.Module):
    """Class-conditional diffusion U-Net with hybrid CNN+transformer blocks in its decoder.

    Args:
      config: sizes, variant and rules.
      rngs: random stream of the initial parameters (PyTorch's default distributions).
    """

    def __init__(self, config: UNetConfig, rngs: nnx.Rngs):
        self.config = config
        rngs = ParameterKeys.of(rngs)
        self.time_embed = EmbeddingMLP(config, rngs)
        if config.num_classes is not None:
            self.label_emb = nnx.Embed(config.num_classes, config.model_channels, rngs=rngs,
                                       embedding_init=standard_normal())
            self.class_emb = EmbeddingMLP(config, rngs)
        self.input_blocks, skips = encoder(config, rngs)
        width, heads = config.widths[-1], config.heads(config.widths[-1], decoder=False)
        self.middle_block = nnx.List([
            ResBlock(width, width, config, rngs),
            AttentionBlock(width, heads, config, rngs),
            ResBlock(width, width, config, rngs),
        ])
        self.output_blocks = _decoder(config, skips, rngs)
        # The head is always float32. Its cost is negligible, and its rounding would directly affect the output.
        self.head_norm = group_norm(config.widths[0], rngs, dtype=jnp.float32)
        self.head_conv = conv(config.widths[0], config.output_width, 3, config, rngs, dtype="float32", zero=True)
        dropouts = [module for _, module in nnx.iter_modules(self) if isinstance(module, Dropout)]
        for i, dropout in enumerate(dropouts):
            dropout.layer = i
        self._dropouts = len(dropouts)
        self.parameter_paths = tuple(path for path, _ in walk(self))

    def __call__(
        self,
        x: jax.Array,  # [B, H, W, C]
        t: jax.Array,  # [B] or [1]
        y: jax.Array | None = None,  # [B] int
        null: bool | jax.Array = False,  # or [B] bool
        drop: jax.Array | None = None,  # [B] bool
        sparse_masks: Sequence[jax.Array] | None = None,  # [N, N] bool each
        rngs: nnx.Rngs | Randomness | None = None,
        context_seen: jax.Array | None = None,  # [B] bool
    ) -> jax.Array:  # [B, H, W, out_channels] float32
        """Predicts the noise in `x`.

        Args:
          x: noised images; H and W must be divisible by 2 ** (number of levels - 1).
          t: original timesteps (not respaced ones), one per row, or a single one for all rows, which is embedded once.
          y: class labels in 0..num_classes-1; required if the network has classes, unless every row is null.
          null: the null condition (class embedding exactly zero) for all rows or for some. For `config.null_context`,
            these rows count as a separate batch.
          drop: rows whose class embedding is set to zero, as in training. For `config.null_context`, these rows count
            with the rest of the batch.
          sparse_masks: explicit patterns, True where attention is blocked, in forward order, one for each masked
            attention (`masked_tokens()` gives their sizes); None: the config's pattern.
          rngs: randomness of a training step: a Flax stream, or one key per sample; None: inference, no dropout.
          context_seen: rows that see their class context, given by a caller that has split a larger batch; None:
            `config.null_context` decides.

        Returns:
          The predicted noise, followed by the channels of the variance if it is learned.

        Raises:
          ValueError: if the shape of `x` or of a mask does not fit, or `y` is missing.
        """
        self._check_input(x)
        cond = self._condition(x, t, y, null, drop, rngs, context_seen)
        masks = self._checked_masks(x, sparse_masks)
        h = self._features(x.astype(self.config.dtype), cond._replace(sparse_masks=masks))
        return self.head_conv(self.head_norm(h, silu=self.config.rules.unfused_silu))

    def masked_tokens(self, height: int, width: int) -> list[int]:
        """Token counts N of the masked attentions, in forward order, for an input of this size."""
        counts, rate = [], 2 ** (len(self.config.widths) - 1)
        for block in self.output_blocks:
            for layer in block:
                if isinstance(layer, _HYBRID_LAYERS):
                    counts += layer.masked_tokens(height // rate, width // rate)
                    rate //= 2  # there is a hybrid block before each upsampling
        return counts

    def _condition(self, x, t, y, null, drop, rngs, context_seen) -> Conditioning:
        emb = self.time_embed(timestep_embedding(t, self.config.model_channels))
        if isinstance(rngs, nnx.Rngs):
            rngs = Randomness.from_rngs(rngs, x.shape[0])
        keys = None if rngs is None else rngs.of_layers(self._dropouts)
        if self.config.num_classes is None or (null is True and context_rule(self.config) != "keep"):
            return Conditioning(emb, None, keys)
        if y is None:
            if null is not True:
                raise ValueError("the network has classes: give the labels y, or null=True")
            y = jnp.zeros(x.shape[0], jnp.int32)
        null_rows = jnp.broadcast_to(jnp.asarray(null, bool), x.shape[:1])
        zero = null_rows if drop is None else null_rows | drop
        c = jnp.where(zero[:, None], 0, self.class_emb(self.label_emb(y)))
        # In a null pass, c is constant. Without a barrier, XLA would spend minutes on constant folding.
        c = jax.lax.optimization_barrier(c)
        context = class_context(c, null_rows, self.config) if context_seen is None else Context(c, context_seen)
        return Conditioning(emb + c, context, keys)

    def _check_input(self, x: jax.Array) -> None:
        channels, rate = self.config.in_channels, 2 ** (len(self.config.widths) - 1)
        if x.ndim != 4 or x.shape[3] != channels or x.shape[1] % rate or x.shape[2] % rate:
            raise ValueError(f"x has shape {x.shape}: the network needs [B, H, W, {channels}], "
                             f"H and W divisible by {rate}")

    def _checked_masks(self, x: jax.Array, masks: Sequence[jax.Array] | None) -> tuple[jax.Array, ...] | None:
        if masks is None:
            return None
        expected = [(n, n) for n in self.masked_tokens(*x.shape[1:3])]
        if [tuple(m.shape) for m in masks] != expected:
            raise ValueError(f"sparse_masks have shapes {[m.shape for m in masks]}, the network needs {expected}")
        return tuple(jnp.asarray(m, bool) for m in masks)

    def _features(self, x: jax.Array, cond: Conditioning) -> jax.Array:  # [B, H, W, C] -> [B, H, W, widths[0]]
        skips, masks = [], list(cond.sparse_masks or ())
        cond = cond._replace(sparse_masks=None)
        # With "full", blocks are recomputed, and each layer again within its block. Only blocks' outputs are stored.
        run = nnx.remat(run_block, static_argnums=(4,)) if self.config.remat == "full" else run_block
        remat, h = self.config.remat != "none", x
        for block in self.input_blocks:
            h = run(block, (h,), cond, (), remat)
            skips.append(h)
        h = run(self.middle_block, (h,), cond, (), remat)
        for block in self.output_blocks:
            joined = h, skips.pop()
            count = _masked(block, *h.shape[1:3]) if masks else 0
            own, masks = tuple(masks[:count]), masks[count:]
            h = run(block, joined, cond, own, remat)
        return h


def run_block(
    block: nnx.List, inputs: tuple[jax.Array, ...], cond: Conditioning, masks: tuple[jax.Array, ...], remat: bool
) -> jax.Array:
    """Runs a block of the U-Net on its inputs, concatenated along channels. `masks` are for its hybrid layer."""
    h = inputs[0] if len(inputs) == 1 else jnp.concatenate(inputs, axis=-1)
    for layer in block:
        if isinstance(layer, nnx.Conv):
            h = layer(h)
            continue
        own = cond._replace(sparse_masks=masks or None) if isinstance(layer, _HYBRID_LAYERS) else cond
        call = nnx.remat(type(layer).__call__) if remat else type(layer).__call__
        h = call(layer, h, own)
    return h


def _masked(block: nnx.List, height: int, width: int) -> int:
    """The number of masked attentions in a block."""
    return sum(len(layer.masked_tokens(height, width)) for layer in block if isinstance(layer, _HYBRID_LAYERS))


def encoder(config: UNetConfig, rngs: nnx.Rngs) -> tuple[nnx.List, list[int]]:
    """The encoder's blocks, and the channels of each block's skip connection."""
    width = config.widths[0]
    blocks: list[nnx.List] = [nnx.List([conv(config.in_channels, width, 3, config, rngs)])]
    skips = [width]
    for level, out in enumerate(config.widths):
        for _ in range(config.num_res_blocks):
            layers: list[nnx.Module] = [ResBlock(width, out, config, rngs)]
            if 2**level in config.attention_resolutions:
                layers.append(AttentionBlock(out, config.heads(out, decoder=False), config, rngs))
            blocks.append(nnx.List(layers))
            skips.append(width := out)
        if level != len(config.widths) - 1:
            down = (ResBlock(width, width, config, rngs, resample="down") if config.resblock_updown
                    else Downsample(width, config, rngs))
            blocks.append(nnx.List([down]))
            skips.append(width)
    return nnx.List(blocks), skips


def _decoder(config: UNetConfig, skips: list[int], rngs: nnx.Rngs) -> nnx.List:
    """The decoder's blocks. Each uses one skip connection."""
    blocks, skips, width = [], list(skips), config.widths[-1]
    for level in reversed(range(len(config.widths))):
        out = config.widths[level]
        for i in range(config.num_res_blocks + 1):
            layers: list[nnx.Module] = [ResBlock(width + skips.pop(), out, config, rngs)]
            if 2**level in config.attention_resolutions:
                layers.append(AttentionBlock(out, config.heads(out, decoder=True), config, rngs))
            if level and i == config.num_res_blocks:
                if config.use_hae and config.rules.hybrid:
                    layers.append(_HYBRIDS[config.rules.hybrid](out, config, rngs))
                layers.append(ResBlock(out, out, config, rngs, resample="up") if config.resblock_updown
                              else Upsample(out, config, rngs))
            blocks.append(nnx.List(layers))
            width = out
    return nnx.List(blocks)
