"""The networks have the published numbers of parameters, counted without allocating parameters."""

import math

import jax
import pytest
from network_helpers import abstract

from hae_jax.model import UNetConfig

TRAINED = {"channel_mult": (1, 1, 2, 3, 4), "use_scale_shift_norm": True, "num_classes": 2}
UNCONDITIONAL = {"channel_mult": (1, 2, 4, 8), "use_scale_shift_norm": False, "num_classes": None}


@pytest.mark.parametrize(("variant", "fields", "count"), [
    ("fpdm", TRAINED, 103082500),
    ("hae", TRAINED, 158822660),
    ("hae_lite", TRAINED, 119499780),
    ("hae_v2", TRAINED, 115808580),
    ("hae_v2c", TRAINED, 121222980),
    ("fpdm", UNCONDITIONAL, 261375492),
    ("hae", UNCONDITIONAL, 416482052),
    ("hae_lite", UNCONDITIONAL, 306379780),
    ("hae_v2", UNCONDITIONAL, 296051140),
    ("hae_v2c", UNCONDITIONAL, 311200708),
])
def test_parameter_count(variant: str, fields: dict, count: int):
    config = UNetConfig(variant=variant, image_size=128, in_channels=4, model_channels=128, num_res_blocks=2,
                        attention_resolutions=(4, 8, 16), **fields)
    leaves = jax.tree.leaves(abstract(config)[1])
    assert sum(math.prod(leaf.shape) for leaf in leaves) == count
    assert all(leaf.dtype == "float32" for leaf in leaves)


def test_the_defaults_are_those_of_the_pytorch_constructor():
    """The authors' "117M, 447 MB", for which they leave out the other arguments."""
    config = UNetConfig(image_size=128, model_channels=128, channel_mult=(1, 1, 2, 3, 4),
                        attention_resolutions=(4, 8, 16), num_heads=8, num_classes=2)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract(config)[1])) == 117086148
    default = UNetConfig()
    assert (default.channel_mult, default.num_classes, default.num_heads) == ((1, 2, 4, 8), None, 1)
