"""Settings, calibrations and weights with arbitrary content are read correctly, or an error of one line names them."""

import dataclasses
import json
import math

import numpy as np
import pytest
import safetensors.numpy
from any_input import changed, changed_bytes, few, right_or_one_line
from hypothesis import given
from hypothesis import strategies as st

from hae_jax.commands.config import read_config
from hae_jax.localization.methods import make_method
from hae_jax.pipeline.calibrations import load_calibration
from hae_jax.runs import completed_config
from hae_jax.torch_interop.files import read_state_dict
from hae_jax.torch_interop.guess import guess_network
from hae_jax.training.weights import load_weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("any")


CALIBRATION = {"threshold": 0.99, "diff_max": [0.05, 0.04], "diff_min": [], "modality": [0, 3], "healthy_slices": 3,
               "lesion_slices": 4, "errors": 0, "made_with": {}}
MAP_THRESHOLD = {"method": "residual", "rule": "healthy_fpr", "labels": "image labels", "threshold": 0.1,
                 "slice_threshold": 0.2, "slice_errors": 1, "slice_auc": 0.9, "healthy_slices": 3, "lesion_slices": 4,
                 "expected_dice": 0.5, "interval": [0.1, 0.2], "lesion_share": 0.1, "made_with": {}}


@pytest.mark.parametrize(("name", "good"), [("hae", CALIBRATION), ("residual", MAP_THRESHOLD)])
@few
@given(data=st.data())
def test_calibrations(folder, name, good, data):
    config, path = read_config("default", [f"--config.translation.method={name}"]), folder / "calibration.json"
    method = make_method(config)
    path.write_text(json.dumps(changed(good, data.draw)))
    found = right_or_one_line(lambda: load_calibration(method, path), path)
    if found is not None:
        assert math.isfinite(found.threshold)
        path.write_text(json.dumps(dataclasses.asdict(found)))
        assert load_calibration(method, path) == found
    path.write_text(json.dumps(good))
    load_calibration(method, path)


SMALL = read_config("default", [f"--config.model.{field}" for field in (
    "image_size=16", "model_channels=32", "num_res_blocks=1", "channel_mult=(1,)", "attention_resolutions=()",
    "variant=fpdm")]).to_dict()


@few
@given(st.data())
def test_configs_of_networks(folder, data):
    good = json.loads(json.dumps(SMALL))
    tree = changed(good, data.draw)
    if isinstance(tree, dict):
        right_or_one_line(lambda: completed_config(tree))
    path = folder / "config.json"
    path.write_text(json.dumps(data.draw(st.sampled_from([tree, {"config": tree, "step": 3}, {"config": tree}]))))
    assert right_or_one_line(lambda: load_weights(folder)) is None  # there are no weights in the folder


NAMES = ("seed", "data.modalities", "model.channel_mult", "training.learning_rate", "training.wandb", "model.dtype",
         "translation.weights", "data.balance", "data.phantom", "training", "model.x")


@few
@given(st.sampled_from(NAMES), st.text(max_size=8) | st.from_regex(r"[-(\[{0-9.,'\"e)\]}]{0,8}", fullmatch=True))
def test_overrides(name, value):
    right_or_one_line(lambda: read_config("default", [f"--config.{name}={value}"]))


@few
@given(st.text(max_size=60)
       | st.from_regex(r"def get_config\(\w?\):\n    (return )?(None|1|x|\{\}|\[\])", fullmatch=True))
def test_configuration_files(folder, text):
    path = folder / "own.py"
    path.write_text(text, encoding="utf-8", errors="replace")
    assert right_or_one_line(lambda: read_config(str(path), []), path) is None


@few
@given(st.data())
def test_weights(folder, data):
    path = folder / "a.safetensors"
    state = {"time_embed.0.weight": np.ones((2, 3), np.float32), "out.2.bias": np.ones(2, np.float16)}
    good = safetensors.numpy.save(state)
    path.write_bytes(changed_bytes(good, data.draw))
    found = right_or_one_line(lambda: read_state_dict(path), path)
    assert found is None or all(np.isfinite(value).all() for value in found.values())


@few
@given(st.data())
def test_names_and_shapes_of_weights(golden, data):
    lines = (golden / "hae_v2c_tiny.keys.tsv").read_text().splitlines()
    shapes = {key: tuple(map(int, shape.split("x"))) for key, shape in (line.split("\t") for line in lines)}
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(shapes)))
        del shapes[name]
        if data.draw(st.booleans()):
            shapes[name] = tuple(data.draw(st.lists(st.integers(0, 64), max_size=4)))
        if data.draw(st.booleans()):
            shapes[data.draw(st.text(max_size=20))] = (3,)
    found = right_or_one_line(lambda: guess_network(shapes))
    assert found is None or found["model_channels"] > 0
