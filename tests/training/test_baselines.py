"""The networks of two baselines with the same training loop: a classifier of noised slices, a denoising autoencoder."""

import json

import numpy as np
import pytest
from flax import nnx

from hae_jax.commands import runs
from hae_jax.data.batches import train_batches
from hae_jax.data.store import open_store
from hae_jax.errors import UserError
from hae_jax.model import UNet
from hae_jax.model.classifier import Classifier, GuidedNetwork
from hae_jax.runs import TrainedRun
from hae_jax.training.loop import train
from hae_jax.training.settings import check_settings
from hae_jax.training.weights import load_trained


def lines_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def classifier_config(one_level_config):
    config = one_level_config
    config.model.task = "classify"
    config.diffusion.steps = 50
    config.training.update({"steps": 60, "log_every": 30, "validate_every": 60, "p_uncond": 0.0,
                            "learning_rate": 5e-3})
    config.data.balance = True
    return config


def test_a_classifier_learns_and_guides(classifier_config, tmp_path):
    train(classifier_config, tmp_path / "run")
    first, last = lines_of(tmp_path / "run")
    assert last["loss"] < min(first["loss"], 0.95 * np.log(2))
    assert last["validation_loss"] < np.log(2)
    assert "validation_loss_null" not in last
    found = load_trained(tmp_path / "run")
    assert isinstance(found.model, Classifier)
    logits = np.asarray(nnx.jit(found.model)(np.zeros((3, 16, 16, 4), np.float32), np.zeros(3, np.int32)))
    assert logits.shape == (3, 2)

    config = runs.trained_config(found.config, [])
    denoiser = object.__new__(UNet)
    loaded = TrainedRun(denoiser, config, {"path": "a"}, tmp_path)
    guided = runs.with_classifier(loaded, str(tmp_path / "run"))
    assert isinstance(guided.model, GuidedNetwork)
    assert guided.identity["classifier"]["step"] == 60
    config.diffusion.steps = 100
    with pytest.raises(UserError, match=r"was trained with diffusion\.steps 50, but the network with 100"):
        runs.with_classifier(loaded, str(tmp_path / "run"))
    with pytest.raises(UserError, match="needs no network"):
        runs.with_classifier(loaded._replace(model=None), str(tmp_path / "run"))
    with pytest.raises(UserError, match="is a classifier, which cannot find lesions alone"):
        runs.chosen_network(None, str(tmp_path / "run"), [])


def test_a_denoising_autoencoder_trains_on_healthy_slices(one_level_config, tmp_path):
    config = one_level_config
    config.model.num_classes = None
    config.diffusion.update({"schedule": "single", "steps": 1, "predicts": "x0", "noise": "coarse"})
    config.data.healthy_only = True
    config.training.update({"steps": 16, "log_every": 8})
    train(config, tmp_path / "run")
    first, last = lines_of(tmp_path / "run")
    assert last["loss"] < first["loss"]
    assert last["loss_t1of4"] == pytest.approx(last["loss"])  # there is only one timestep
    with pytest.raises(UserError, match="is not a classifier"):
        runs.with_classifier(TrainedRun("model", config, {}, tmp_path), str(tmp_path / "run"))


def test_healthy_slices_alone(tiny_store):
    reader = open_store(tiny_store).split("train")
    batches = train_batches(reader, batch_size=8, seed=0, healthy_only=True)
    seen = [next(batches) for _ in range(6)]
    assert not np.concatenate([batch["label"] for batch in seen]).any()
    assert len(set(np.concatenate([batch["slice"] for batch in seen[:3]]))) == 12  # of 24, half have a lesion


@pytest.mark.parametrize(("changes", "message"), [
    ({"training.sample_every": 5}, r"training\.sample_every is 5, but model\.task is 'classify'"),
    ({"data.healthy_only": True}, r"data\.healthy_only is True, but model\.task is 'classify'"),
    ({"data.healthy_only": True, "model.task": "denoise"}, r"data\.healthy_only and data\.balance are both True"),
])
def test_settings_that_cannot_be(classifier_config, changes, message):
    for name, value in changes.items():
        section, field = name.split(".")
        classifier_config[section][field] = value
    with pytest.raises(UserError, match=message):
        check_settings(classifier_config)
