"""Every configuration file can be built, is locked, and has the settings of the published runs."""

import functools
from pathlib import Path

import pytest

from hae_jax.commands.config import read_config
from hae_jax.errors import UserError
from hae_jax.model.sizes import count_parameters
from hae_jax.training.state import network_config

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.py") if path.stem != "__init__")
BRATS = {  # variant and number of parameters
    "brats_fpdm": ("fpdm", 103082500),
    "brats_hae": ("hae", 158822660),
    "brats_hae_lite": ("hae_lite", 119499780),
    "brats_v2": ("hae_v2", 115808580),
    "brats_v2c": ("hae_v2c", 121222980),
}


def _read(name, *overrides):
    return read_config(str(CONFIGS / f"{name}.py"), overrides)


@functools.cache
def _count(name):
    return count_parameters(network_config(_read(name).to_dict()))


def _differences(name):
    """The fields in which a config differs from the default one."""
    usual, own = (_flat(_read(n).to_dict()) for n in ("default", name))
    return {field: own[field] for field in own if field not in usual or own[field] != usual[field]}


def _flat(tree, prefix=""):
    found = {}
    for name, value in tree.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_config_makes_a_network_and_reads_its_own_channels(name):
    config = _read(name)
    network = network_config(config.to_dict())
    assert network.variant == config.model.variant
    assert max(config.translation.modality) < network.in_channels


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_field_is_an_error(name):
    with pytest.raises(UserError, match="stepz"):
        _read(name, "--config.training.stepz=3")
    with pytest.raises(AttributeError):
        _read(name).model.widht = 3
    with pytest.raises(AttributeError):
        _read(name).colour = "red"


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith(("brats", "atlas"))])
def test_the_training_is_the_published_one(name):
    config = _read(name)
    training = config.training
    assert (training.steps, training.batch_size, training.learning_rate) == (210_000, 28, 1e-4)
    assert (training.weight_decay, training.ema_rates, training.p_uncond) == (0.0, (0.9999,), 0.1)
    assert (config.model.dropout, config.model.use_scale_shift_norm, config.model.num_classes) == (0.1, True, 2)
    assert (config.diffusion.schedule, config.diffusion.steps, config.diffusion.predicts) == ("linear", 1000, "eps")
    assert config.translation.forward_steps == 600


@pytest.mark.parametrize(("name", "variant", "count"), [(name, *row) for name, row in BRATS.items()])
def test_a_brats_config_is_its_variant_and_nothing_else(name, variant, count):
    assert _differences(name).items() <= {"model.variant": variant, "model.dtype": "bfloat16"}.items()
    assert _read(name).model.variant == variant
    assert _count(name).total == count


def test_atlas_is_one_channel_at_its_published_strength():
    assert _differences("atlas_v2c") == {
        "data.root": "data/atlas", "data.modalities": ("t1",), "model.in_channels": 1, "model.dtype": "bfloat16",
        "translation.modality": (0,), "translation.guidance": 20.0}


def test_the_networks_differ_in_their_hybrid_blocks_only():
    plain = _count("brats_fpdm")
    assert plain.hybrid == 0
    for name in BRATS:  # without hybrid blocks, all networks are the same U-Net
        assert _count(name).total - _count(name).hybrid == plain.total
