"""The network's config. Names and defaults are those of the PyTorch constructor; values are checked on creation."""

import dataclasses
import math
import numbers
import types
from collections.abc import Mapping
from typing import Any, NamedTuple, get_args, get_origin

from hae_jax.errors import UserError
from hae_jax.ops import forms

DEFAULT_CHANNEL_MULT = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
    32: (1, 2, 2, 2),
}
NORM_GROUPS = 32
HYBRID_HEADS = 8


class Variant(NamedTuple):
    """The differences between the five networks. All else is the same."""

    hybrid: str | None  # the decoder block before each upsampling: None, "joint" or "per_scale"
    projection: str | None  # regional tokens of "joint": by a Linear "per_patch" size, or by one "shared" 1x1 conv
    mlp: str | None  # "wide" (4C) or "bottleneck" (C * bottleneck_ratio)
    unfused_silu: bool  # False: without the three SiLUs that the published code meant to fuse but left out
    skips_zero_context: bool  # whether memory_optimization has an effect


VARIANTS = {
    "fpdm": Variant(None, None, None, unfused_silu=False, skips_zero_context=False),
    "hae": Variant("joint", "per_patch", "wide", unfused_silu=False, skips_zero_context=False),
    "hae_lite": Variant("joint", "shared", "wide", unfused_silu=True, skips_zero_context=False),
    "hae_v2": Variant("joint", "shared", "bottleneck", unfused_silu=True, skips_zero_context=False),
    "hae_v2c": Variant("per_scale", None, "bottleneck", unfused_silu=True, skips_zero_context=True),
}
_CHOICES = {
    "task": ("denoise", "classify"),
    "variant": VARIANTS,
    "null_context": ("batch", "sample", "keep"),
    "sparse_pattern": ("blocks", "trained", "dense"),
    "remat": ("none", "block", "full"),
    "dtype": ("float32", "bfloat16"),
    "attention": forms.ATTENTION,
    "convolution": forms.CONVOLUTION,
}
# Fields that determine how the network is computed. They are not part of its identity: they may differ when a run is
# resumed or its network is used.
FORM_FIELDS = ("attention", "convolution")


def _is_a(value: Any, kind: Any) -> bool:
    """Whether the value is of the annotated type. A list counts as a tuple, an integer as a float."""
    if isinstance(kind, types.UnionType):
        return any(_is_a(value, k) for k in get_args(kind))
    if get_origin(kind) is tuple:
        return isinstance(value, list | tuple) and all(_is_a(v, get_args(kind)[0]) for v in value)
    if kind in (int, float):
        return isinstance(value, numbers.Integral if kind is int else numbers.Real) and not isinstance(value, bool)
    return isinstance(value, kind)


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """Hyper-parameters of `hae_jax.model.UNet`. The defaults are those of the PyTorch constructor; the settings of
    the published networks are in `configs/default.py`.

    Attributes:
      task: "denoise"; or "classify": the encoder with a classification head instead of the decoder.
      variant: "fpdm", "hae", "hae_lite", "hae_v2" or "hae_v2c".
      image_size: height and width of the input, pixels.
      in_channels: image channels (modalities).
      out_channels: output channels; None: `in_channels` (a learned variance doubles them).
      model_channels: base width; the embeddings are E = 4 * model_channels wide.
      num_res_blocks: ResBlocks per level in the encoder (one more in the decoder).
      attention_resolutions: downsampling rates at which AttentionBlocks follow the ResBlocks.
      dropout: rate in ResBlocks and hybrid blocks, attention weights included.
      channel_mult: width of each level as a multiple of model_channels; None: the standard for image_size.
      conv_resample: learned convolutions in down- and upsampling.
      num_classes: number of labels; None: unconditional.
      num_heads: heads of the AttentionBlocks, unless `num_head_channels` is given.
      num_head_channels: channels per head; -1: `num_heads` decides.
      num_heads_upsample: heads in the decoder; -1: `num_heads`.
      use_scale_shift_norm: the embedding scales and shifts the second norm, instead of being added.
      resblock_updown: ResBlocks do the resampling.
      use_hae: hybrid CNN+transformer blocks; without them every variant is a plain U-Net.
      bottleneck_ratio: hidden width of the bottleneck MLP as a share of its channels.
      memory_optimization: `hae_v2c` skips the class context if it is zero for the whole batch.
      zero_threshold: a class embedding counts as zero if no entry exceeds this.
      null_context: whether a null row sees a context: "batch" (the trained code's rule), "sample" (never), "keep".
      sparse_pattern: "blocks" (this project's; 90 % of the pairs are skipped), "trained" (the published one), "dense".
      sparse_seed: seed of the sparse pattern at inference, and in training unless it is redrawn.
      sparse_redraw: draw a new sparse pattern at each training step.
      remat: parts that the backward pass recomputes: "none"; "block": ResBlocks, attention and hybrid blocks; "full":
        also each group of blocks between two skips, so that little more than the skips is stored.
      dtype: compute type; parameters, norms, softmax and the output head stay float32.
      attention: how attention is computed: "auto", "xla", "cudnn", or another form of `hae_jax.ops.forms`.
      convolution: how convolutions are computed: "auto", "xla" or "winograd".

    Raises:
      UserError: if the fields do not describe a valid network.
    """

    variant: str = "hae_v2c"
    image_size: int = 128
    in_channels: int = 4
    out_channels: int | None = None
    model_channels: int = 128
    num_res_blocks: int = 2
    attention_resolutions: tuple[int, ...] = (4, 8, 16)
    dropout: float = 0.0
    channel_mult: tuple[float, ...] | None = (1, 2, 4, 8)
    conv_resample: bool = True
    num_classes: int | None = None
    num_heads: int = 1
    num_head_channels: int = -1
    num_heads_upsample: int = -1
    use_scale_shift_norm: bool = False
    resblock_updown: bool = False
    use_hae: bool = True
    bottleneck_ratio: float = 0.25
    memory_optimization: bool = True
    zero_threshold: float = 1e-6
    null_context: str = "batch"
    sparse_pattern: str = "blocks"
    sparse_seed: int = 0
    sparse_redraw: bool = False
    remat: str = "none"
    dtype: str = "float32"
    attention: str = "auto"
    convolution: str = "auto"
    task: str = "denoise"

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not _is_a(value, field.type):
                wanted = field.type.__name__ if isinstance(field.type, type) else field.type
                raise UserError(f"model.{field.name} is {value!r}: it must be of type {wanted}")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise UserError(f"model.{name} is {getattr(self, name)!r}: choose one of {', '.join(choices)}")
        channel_mult = self.channel_mult
        if channel_mult is None:
            if self.image_size not in DEFAULT_CHANNEL_MULT:
                sizes = ", ".join(map(str, DEFAULT_CHANNEL_MULT))
                raise UserError(f"model.channel_mult: no default for image_size {self.image_size} "
                                f"(only for {sizes}): give one multiplier per level")
            channel_mult = DEFAULT_CHANNEL_MULT[self.image_size]
        object.__setattr__(self, "channel_mult", tuple(channel_mult))
        object.__setattr__(self, "attention_resolutions", tuple(self.attention_resolutions))
        if self.out_channels is None:
            object.__setattr__(self, "out_channels", self.in_channels)
        self._check_sizes()

    @classmethod
    def from_mapping(cls, fields: Mapping[str, Any]) -> "UNetConfig":
        """Builds the config from a mapping (the config tree's `model`), naming every unknown field.

        Raises:
          UserError: on an unknown field or an impossible value.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(fields) - known):
            raise UserError(f"model.{', model.'.join(unknown)}: no such field; known are {', '.join(sorted(known))}")
        return cls(**fields)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level."""
        assert self.channel_mult is not None  # set by __post_init__
        return tuple(int(m * self.model_channels) for m in self.channel_mult)

    @property
    def output_width(self) -> int:
        """Channels of the output."""
        assert self.out_channels is not None  # since __post_init__
        return self.out_channels

    @property
    def embedding_width(self) -> int:
        """E, the width of the time and class embeddings."""
        return 4 * self.model_channels

    @property
    def rules(self) -> Variant:
        """The properties of this config's variant."""
        return VARIANTS[self.variant]

    def heads(self, channels: int, *, decoder: bool) -> int:
        """Heads of an AttentionBlock with this number of channels."""
        if self.num_head_channels != -1:
            return channels // self.num_head_channels
        return self.num_heads_upsample if decoder and self.num_heads_upsample != -1 else self.num_heads

    def _check_sizes(self) -> None:
        positive = ("image_size", "in_channels", "out_channels", "model_channels", "num_res_blocks", "num_heads")
        for name in positive:
            if getattr(self, name) < 1:
                raise UserError(f"model.{name} is {getattr(self, name)}: it must be at least 1")
        for name in ("num_head_channels", "num_heads_upsample"):
            if getattr(self, name) < 1 and getattr(self, name) != -1:
                raise UserError(f"model.{name} is {getattr(self, name)}: it must be at least 1, or -1")
        if self.num_classes is not None and self.num_classes < 1:
            raise UserError(f"model.num_classes is {self.num_classes}: it must be at least 1, or None")
        if not 0 <= self.dropout < 1:
            raise UserError(f"model.dropout is {self.dropout}: it must be in [0, 1)")
        if not 0 < self.bottleneck_ratio < math.inf:
            raise UserError(f"model.bottleneck_ratio is {self.bottleneck_ratio}: it must be above 0")
        if not self.zero_threshold >= 0:
            raise UserError(f"model.zero_threshold is {self.zero_threshold}: it must be at least 0")
        if not self.channel_mult:
            raise UserError("model.channel_mult is empty: give one multiplier per level")
        rate = 2 ** (len(self.channel_mult) - 1)
        if self.image_size % rate:
            raise UserError(f"model.image_size is {self.image_size}: {len(self.channel_mult)} levels (channel_mult) "
                            f"halve it {len(self.channel_mult) - 1} times, so it must be divisible by {rate}")
        for level, width in enumerate(self.widths):
            self._check_width(level, width)

    def _check_width(self, level: int, width: int) -> None:
        where = f"model: level {level} has {width} channels (channel_mult x model_channels)"
        if width < 1 or width % NORM_GROUPS:
            raise UserError(f"{where}, which must be divisible by {NORM_GROUPS}, the groups of the norms")
        if self.num_head_channels != -1 and width % self.num_head_channels:
            raise UserError(f"{where}, which num_head_channels {self.num_head_channels} does not divide")
        if any(width % self.heads(width, decoder=decoder) for decoder in (False, True)):
            raise UserError(f"{where}, which num_heads or num_heads_upsample does not divide")
