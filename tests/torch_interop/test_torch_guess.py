"""The network of a state dict is derived from names and shapes."""

import json

import jax
import numpy as np
import pytest
from flax import nnx
from network_helpers import SMALL, abstract

from hae_jax.errors import UserError
from hae_jax.model import UNetConfig
from hae_jax.torch_interop.guess import UNKNOWN_FIELDS, guess_network, usual_image_size
from hae_jax.torch_interop.weights import torch_state

CASES = ("fpdm_tiny", "hae_tiny", "hae_lite_tiny", "hae_v2_tiny", "hae_v2c_tiny", "fpdm_options", "hae_v2c_options",
         "hae_v2c_brats")


def golden_shapes(golden, name: str) -> dict[str, tuple[int, ...]]:
    lines = (golden / f"{name}.keys.tsv").read_text().splitlines()
    return {key: tuple(map(int, shape.split("x"))) for key, shape in (line.split("\t") for line in lines)}


def shapes_of(config: UNetConfig) -> dict[str, tuple[int, ...]]:
    graph, state = abstract(config)
    empty = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), state)
    return {name: value.shape for name, value in torch_state(nnx.merge(graph, empty)).items()}


@pytest.mark.parametrize("name", CASES)
def test_the_reference_networks_are_found(golden, name):
    described = json.loads((golden / f"{name}.json").read_text())
    fields = guess_network(golden_shapes(golden, name))
    assert fields["variant"] == described["variant"]
    expected = UNetConfig(variant=described["variant"], **described["config"])
    for field, value in fields.items():
        if field != "use_hae" or described["variant"] != "fpdm":
            assert getattr(expected, field) == value, field
    wanted = set(described["config"]) - set(UNKNOWN_FIELDS)
    assert wanted <= set(fields) | ({"conv_resample"} if described["config"].get("resblock_updown") else set())


@pytest.mark.parametrize(("variant", "options"), [
    ("hae_lite", {"use_scale_shift_norm": False, "num_classes": None, "in_channels": 1, "out_channels": 2}),
    ("fpdm", {"resblock_updown": True, "num_classes": 7, "num_res_blocks": 2, "attention_resolutions": ()}),
    ("hae_v2", {"resblock_updown": True, "num_res_blocks": 2, "attention_resolutions": (1,)}),
    ("hae", {"conv_resample": False, "channel_mult": (2, 1, 1.5), "model_channels": 64}),
    ("hae_v2c", {"channel_mult": (2, 1, 3), "attention_resolutions": (1, 4), "bottleneck_ratio": 0.3}),
    ("hae_v2c", {"channel_mult": (2,), "num_res_blocks": 3, "attention_resolutions": (1,)}),
    ("hae_v2", {"use_hae": False, "conv_resample": False}),
    ("hae_v2", {"bottleneck_ratio": 0.01, "channel_mult": (1, 2)}),
])
def test_a_network_made_of_the_guess_has_the_same_names_and_shapes(variant, options):
    shapes = shapes_of(UNetConfig(**SMALL | {"variant": variant} | options))
    fields = guess_network(shapes)
    for name, value in options.items():
        if name in fields and name not in ("use_hae", "bottleneck_ratio"):
            assert fields[name] == value, name
    if any("transformer" in name for name in shapes):
        assert fields["variant"] == variant
    assert shapes_of(UNetConfig(**fields, image_size=24)) == shapes


def test_what_is_none_of_the_networks_is_refused_with_its_reason(golden):
    shapes = golden_shapes(golden, "hae_tiny")
    for name in ("time_embed.0.weight", "out.2.weight", "input_blocks.1.0.out_layers.3.weight"):
        with pytest.raises(UserError, match=rf"five networks: {name} is missing"):
            guess_network({key: shape for key, shape in shapes.items() if key != name})
    with pytest.raises(UserError, match="do not belong together"):
        guess_network(shapes | {"input_blocks.4.0.op.weight": (64, 64, 3, 3)})
    with pytest.raises(UserError, match="time_embed"):
        guess_network({"conv1.weight": (3, 3)})


def test_the_image_size_is_the_one_whose_usual_widths_these_are():
    assert usual_image_size((1, 1, 2, 3, 4)) == 128
    assert usual_image_size((0.5, 1, 1, 2, 2, 4, 4)) == 512
    assert usual_image_size((1, 2, 2)) == 128
