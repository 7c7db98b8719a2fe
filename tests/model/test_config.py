"""Wrong fields are refused before anything is built, with one line that names the field."""

import pytest

from hae_jax.errors import UserError
from hae_jax.model import UNetConfig


@pytest.mark.parametrize(("fields", "named"), [
    ({"variant": "hae_v3"}, "variant"),
    ({"null_context": "never"}, "null_context"),
    ({"sparse_pattern": "random"}, "sparse_pattern"),
    ({"remat": "blocks"}, "remat"),
    ({"dtype": "float16"}, "dtype"),
    ({"image_size": 0}, "image_size"),
    ({"image_size": 120, "channel_mult": None}, "channel_mult"),  # no default
    ({"image_size": 120, "channel_mult": (1, 1, 2, 3, 4)}, "image_size"),  # not divisible
    ({"image_size": 128.0}, "image_size"),
    ({"in_channels": 0}, "in_channels"),
    ({"out_channels": 0}, "out_channels"),
    ({"model_channels": -32}, "model_channels"),
    ({"model_channels": 48}, "channel_mult x model_channels"),
    ({"num_res_blocks": 0}, "num_res_blocks"),
    ({"attention_resolutions": "32,16,8"}, "attention_resolutions"),
    ({"dropout": 1.0}, "dropout"),
    ({"dropout": -0.1}, "dropout"),
    ({"dropout": "0.1"}, "dropout"),
    ({"dropout": float("nan")}, "dropout"),
    ({"channel_mult": "1,2"}, "channel_mult"),
    ({"channel_mult": ()}, "channel_mult"),
    ({"channel_mult": (0.01,)}, "channel_mult"),
    ({"conv_resample": None}, "conv_resample"),
    ({"num_classes": 0}, "num_classes"),
    ({"num_heads": 0}, "num_heads"),
    ({"num_heads": 7}, "num_heads"),
    ({"num_head_channels": 0}, "num_head_channels"),
    ({"num_head_channels": 48}, "num_head_channels"),
    ({"num_heads_upsample": 0}, "num_heads_upsample"),
    ({"num_heads_upsample": 5}, "num_heads_upsample"),
    ({"use_scale_shift_norm": 1}, "use_scale_shift_norm"),
    ({"resblock_updown": "yes"}, "resblock_updown"),
    ({"use_hae": None}, "use_hae"),
    ({"bottleneck_ratio": 0.0}, "bottleneck_ratio"),
    ({"memory_optimization": 0}, "memory_optimization"),
    ({"zero_threshold": -1e-6}, "zero_threshold"),
    ({"sparse_seed": 0.5}, "sparse_seed"),
    ({"sparse_redraw": "step"}, "sparse_redraw"),
    ({"attention": "flash"}, "attention is 'flash': choose one of auto, xla, cudnn"),
    ({"convolution": "fft"}, "convolution is 'fft': choose one of auto, xla, winograd"),
])
def test_a_bad_field_is_named_in_one_line(fields: dict, named: str):
    with pytest.raises(UserError, match=named) as caught:
        UNetConfig(**fields)
    assert "\n" not in str(caught.value)


def test_unknown_fields_are_named_together():
    with pytest.raises(UserError, match=r"model\.chanel_mult, model\.depth"):
        UNetConfig.from_mapping({"depth": 3, "chanel_mult": (1, 2), "dropout": 0.1})


@pytest.mark.parametrize(("image_size", "channel_mult"), [
    (512, (0.5, 1, 1, 2, 2, 4, 4)), (256, (1, 1, 2, 2, 4, 4)), (128, (1, 1, 2, 3, 4)), (64, (1, 2, 3, 4)),
    (32, (1, 2, 2, 2)),
])
def test_usual_channel_mult(image_size: int, channel_mult: tuple):
    config = UNetConfig(image_size=image_size, model_channels=64, channel_mult=None)
    assert config.channel_mult == channel_mult
    assert config.widths == tuple(int(64 * m) for m in channel_mult)


def test_a_mapping_with_lists_and_nones_is_as_good_as_tuples():
    mapping = {"channel_mult": [1, 2], "attention_resolutions": [2], "image_size": 36, "num_classes": None}
    config = UNetConfig.from_mapping(mapping)
    assert config == UNetConfig(channel_mult=(1, 2), attention_resolutions=(2,), image_size=36)
    assert hash(config) is not None
    assert config.out_channels == config.in_channels


def test_heads():
    config = UNetConfig(num_heads=4, num_heads_upsample=2)
    assert (config.heads(128, decoder=False), config.heads(128, decoder=True)) == (4, 2)
    assert UNetConfig(num_heads=4).heads(128, decoder=True) == 4
    assert UNetConfig(num_head_channels=32).heads(128, decoder=True) == 4
    assert UNetConfig(num_head_channels=32).heads(512, decoder=False) == 16
