"""The dry run: correct values, a message about missing data, no files written."""

import jax
import ml_collections
import pytest

from hae_jax.errors import UserError
from hae_jax.model.sizes import count_parameters
from hae_jax.training.dry_run import activation_bytes, describe
from hae_jax.training.state import network_config


def line(lines, start):
    return next(line for line in lines if line.strip().startswith(start))


def test_it_describes_the_training(tiny_config, tiny_store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tiny_store.rglob("*"))
    tiny_config.training.steps = 60
    lines = describe(tiny_config)
    count = count_parameters(network_config(tiny_config.to_dict())).total
    assert f"{count:,} ({4 * count / 1e6:.1f} MB" in line(lines, "parameters")
    assert "4 x cpu on 1 host" in line(lines, "devices")
    assert "8 = 4 devices x 1 accumulated parts x 2 images" in line(lines, "batch")
    assert f"parameters {4 * count / 2**20:.1f} MiB, EMA weights {4 * count / 2**20:.1f} MiB" in line(lines, "memory")
    assert "FLOP per step" in line(lines, "operations")
    assert "1 cases, 24 slices, 50.0% of them with a lesion" in line(lines, "train")
    assert "60 steps of 8 images are 20.0 epochs" in lines[-1]
    assert not list(tmp_path.iterdir())
    assert sorted(tiny_store.rglob("*")) == before


def test_sharding_and_accumulation_show_in_the_memory(tiny_config, monkeypatch):
    monkeypatch.setattr("hae_jax.training.dry_run.activation_bytes", lambda network, rows: rows * 2**20)
    whole = line(describe(tiny_config), "memory")
    tiny_config.training.mesh = (1, 4)
    tiny_config.training.accumulation = 2
    parts = line(describe(tiny_config), "memory")

    def mebibytes(text, name):
        return float(text.split(f"{name} ")[1].split(" MiB")[0])

    assert mebibytes(parts, "optimiser") < 0.9 * mebibytes(whole, "optimiser")  # small parameters are replicated
    assert mebibytes(parts, "optimiser") == pytest.approx(2 * mebibytes(parts, "EMA weights"), rel=0.1)
    assert mebibytes(parts, "gradients") == pytest.approx(2 * mebibytes(parts, "parameters"), rel=0.1)
    assert (mebibytes(whole, "activations"), mebibytes(parts, "activations")) == (2, 1)


def test_activations_grow_with_the_batch_and_shrink_by_recomputing(one_level_config):
    networks = {}
    for remat in ("none", "block", "full"):
        one_level_config.model.remat = remat
        networks[remat] = network_config(one_level_config.to_dict())
    two, four = (activation_bytes(networks["none"], rows) for rows in (2, 4))
    assert four == pytest.approx(2 * two, rel=0.02)
    assert four > 4 * 16 * 16 * 32 * 4 * 10  # at least ten of the widest feature maps
    assert activation_bytes(networks["full"], 4) < activation_bytes(networks["block"], 4) < 0.7 * four


@pytest.mark.parametrize(("section", "field", "value", "said"), [
    ("data", "root", "/nowhere/data", "/nowhere/data: no prepared dataset here"),
    ("data", "modalities", ("t1", "flair", "t1ce", "t2"), "its channels are flair, t1, t1ce, t2, but data.modalities"),
    ("model", "image_size", 8, "its slices are [16, 16, 4], but the network needs [8, 8, 4]"),
])
def test_data_that_are_missing_or_do_not_fit_are_named(tiny_config, monkeypatch, section, field, value, said):
    monkeypatch.setattr("hae_jax.training.dry_run.activation_bytes", lambda network, rows: 1)
    tiny_config[section][field] = value
    assert any(said in line for line in describe(tiny_config, jax.devices()[:1]))


def test_a_damaged_phantom_is_not_called_absent(tiny_config, monkeypatch, tmp_path):
    monkeypatch.setattr("hae_jax.training.dry_run.activation_bytes", lambda network, rows: 1)
    with tiny_config.unlocked():
        tiny_config.data.phantom = ml_collections.ConfigDict({"subjects": 3})
    tiny_config.data.root = str(tmp_path)
    assert any("no prepared dataset here" in line for line in describe(tiny_config, jax.devices()[:1]))


def test_settings_that_do_not_fit_are_refused(tiny_config):
    tiny_config.training.batch_size = 6
    with pytest.raises(UserError, match=r"training\.batch_size is 6"):
        describe(tiny_config)
