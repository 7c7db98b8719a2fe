"""Derives fields of `UNetConfig` from the names and shapes of a PyTorch state dict."""

import math
import re
from collections.abc import Mapping
from typing import Any

from hae_jax.errors import UserError
from hae_jax.model.config import DEFAULT_CHANNEL_MULT

# Fields that do not affect names and shapes of the weights.
UNKNOWN_FIELDS = ("image_size", "num_heads", "num_head_channels", "num_heads_upsample", "dropout",
                  "memory_optimization", "zero_threshold", "null_context", "sparse_pattern")
_USUAL_RATIO = 0.25

_Shapes = Mapping[str, tuple[int, ...]]
_Blocks = dict[int, dict[int, dict[str, tuple[int, ...]]]]  # block -> layer -> rest of the name -> shape


def guess_network(shapes: _Shapes) -> dict[str, Any]:
    """The variant and the constructor arguments of the network that a state dict belongs to.

    A network without hybrid blocks is given as "fpdm", without `use_hae`. The other variants have the same names then,
    but `hae_lite`, `hae_v2` and `hae_v2c` other activations.

    Args:
      shapes: shape of each entry, in any order.

    Returns:
      Fields of `UNetConfig`, without those of `UNKNOWN_FIELDS`, and without others that this network leaves open
      (resampling with a single level, bottleneck_ratio without a bottleneck).

    Raises:
      UserError: if it is none of the five networks.
    """
    try:
        return _guess(shapes)
    except KeyError as error:
        missing = error.args[0]
        longer = next((name for name in shapes if name.endswith(f".{missing}") or f".{missing}." in name), None)
        there = "" if longer is None else (f", but {longer} is there: save the network alone, without what stands "
                                           "before its names")
        raise UserError(f"not the weights of one of the five networks: {missing} is missing{there}") from error
    except (IndexError, ValueError, TypeError, ZeroDivisionError, OverflowError) as error:
        raise UserError("not the weights of one of the five networks: the shapes do not belong together") from error


def usual_image_size(channel_mult: tuple[float, ...]) -> int:
    """The image size in pixels with this default `channel_mult`; else 128, or more if the levels require it."""
    for size, usual in DEFAULT_CHANNEL_MULT.items():
        if usual == channel_mult:
            return size
    return max(128, 2 ** (len(channel_mult) - 1))


def _guess(shapes: _Shapes) -> dict[str, Any]:
    width, in_channels = shapes["time_embed.0.weight"][1], shapes["input_blocks.0.0.weight"][1]
    encoder, decoder = _blocks(shapes, "input"), _blocks(shapes, "output")
    res_blocks = _res_blocks(encoder, decoder)
    levels, rest = divmod(max(encoder) + 1, res_blocks + 1)
    if rest:
        raise ValueError("the levels have different numbers of blocks")
    first = [level * (res_blocks + 1) + 1 for level in range(levels)]  # block of each level
    out_convs = [_entry(encoder, "input_blocks", i, 0, "out_layers.3.weight") for i in first]
    embedding = _entry(encoder, "input_blocks", 1, 0, "emb_layers.1.weight")
    variant = _variant(shapes)
    labels = shapes.get("label_emb.weight")
    return {
        "variant": variant,
        "use_hae": variant != "fpdm",
        "in_channels": in_channels,
        "out_channels": shapes["out.2.weight"][0],
        "model_channels": width,
        "channel_mult": tuple(_multiple(shape[0], width) for shape in out_convs),
        "num_res_blocks": res_blocks,
        "attention_resolutions": tuple(
            2**level for level, i in enumerate(first) if "qkv.weight" in encoder[i].get(1, {})),
        "num_classes": labels[0] if labels is not None else None,
        "use_scale_shift_norm": embedding[0] == 2 * out_convs[0][0],
    } | _resampling(encoder, res_blocks, levels) | _bottleneck(shapes)


def _blocks(shapes: _Shapes, side: str) -> _Blocks:
    blocks: _Blocks = {}
    for name, shape in shapes.items():
        if found := re.fullmatch(rf"{side}_blocks\.(\d+)\.(\d+)\.(.+)", name):
            blocks.setdefault(int(found[1]), {}).setdefault(int(found[2]), {})[found[3]] = shape
    if not blocks:
        raise KeyError(f"{side}_blocks")
    return blocks


def _entry(blocks: _Blocks, side: str, block: int, layer: int, name: str) -> tuple[int, ...]:
    try:
        return blocks[block][layer][name]
    except KeyError:
        raise KeyError(f"{side}.{block}.{layer}.{name}") from None


def _res_blocks(encoder: _Blocks, decoder: _Blocks) -> int:
    """The number of ResBlocks per level, from the end of the decoder's first level."""
    ends = [block for block, layers in decoder.items()
            if any(_ends_level(layer) for i, layer in layers.items() if i > 0)]
    if ends:
        return min(ends)
    # Resampling has no parameters here. In the encoder, the number of the pooling layer is missing.
    gaps = sorted(set(range(max(encoder))) - encoder.keys())
    return gaps[0] - 1 if gaps else max(encoder)


def _ends_level(layer: Mapping[str, Any]) -> bool:
    """Whether a layer after the first is an upsampling or a hybrid block and not an AttentionBlock."""
    return "conv.weight" in layer or "in_layers.0.weight" in layer or any(n.startswith("transformer_") for n in layer)


def _variant(shapes: _Shapes) -> str:
    marks = {  # the first one that occurs in a name is used
        ".transformer_block.": "hae_v2c",
        ".patch_projections.": "hae",
        ".transformer_branch.mlp.mlp.": "hae_v2",
        ".transformer_branch.": "hae_lite",
    }
    return next((variant for mark, variant in marks.items() if any(mark in name for name in shapes)), "fpdm")


def _multiple(channels: int, width: int) -> float:
    return channels // width if channels % width == 0 else channels / width


def _resampling(encoder: _Blocks, res_blocks: int, levels: int) -> dict[str, bool]:
    if levels == 1:
        return {}
    down = encoder.get(res_blocks + 1, {}).get(0, {})
    if "in_layers.0.weight" in down:
        return {"resblock_updown": True}
    return {"resblock_updown": False, "conv_resample": "op.weight" in down}


def _bottleneck(shapes: _Shapes) -> dict[str, float]:
    """The usual ratio if it gives these widths, else the ratio with the fewest decimals that does."""
    layers = [shape for name, shape in shapes.items() if name.endswith(".mlp.mlp.0.weight")]  # [hidden, C]
    if not layers:
        return {}
    # The width is int(C * ratio), and at least 1.
    low = max(0 if hidden == 1 else hidden / channels for hidden, channels in layers)
    high = min((hidden + 1) / channels for hidden, channels in layers)
    if low <= _USUAL_RATIO < high:
        return {"bottleneck_ratio": _USUAL_RATIO}
    for scale in (10.0**digits for digits in range(1, 16)):
        ratio = max(1, math.ceil(low * scale)) / scale
        if ratio < high and all(max(1, int(channels * ratio)) == hidden for hidden, channels in layers):
            return {"bottleneck_ratio": ratio}
    raise ValueError("no bottleneck_ratio gives these widths")
