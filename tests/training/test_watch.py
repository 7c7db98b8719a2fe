"""Reports of the training loop: their contents and the steps at which they are written."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hae_jax.model.flops import training_flops
from hae_jax.training import watch
from hae_jax.training.mesh import make_mesh
from hae_jax.training.state import initial_state, network_config


@pytest.fixture
def config(tiny_config):
    tiny_config.training.steps = 7
    tiny_config.training.log_every = 2
    tiny_config.training.validate_every = 3
    tiny_config.training.sample_every = 4
    tiny_config.training.warmup_steps = 9
    return tiny_config


@pytest.fixture
def clock(monkeypatch):
    """A clock that only `advance` changes."""
    now = [0.0]
    monkeypatch.setattr(watch.time, "monotonic", lambda: now[0])

    def advance(seconds):
        now[0] += seconds

    return advance


def state_of(step, loss):
    """A state with two steps in its window, parameters of norm 5, EMA weights at distance 0.5, and one skipped step."""
    state = initial_state({"w": jnp.array([3.0, 4.0])}, (), ({"w": jnp.array([3.0, 4.5])},), step=step)
    window = state.window._replace(steps=jnp.float32(2), loss=jnp.float32(2 * loss), gradient_norm=jnp.float32(6),
                                   bin_loss=jnp.array([1.0, 0, 8, 0]), bin_count=jnp.array([2.0, 0, 4, 0]))
    return state._replace(window=window, skipped=jnp.int32(1))


def run(config, workdir, clock, start=0, validation_seconds=0.0, localization=None):
    """Runs a loop in which a batch takes 1 s and a step 3 s. Returns the last state."""

    def validation(params):
        clock(validation_seconds)
        return {"validation_loss": 0.25}

    def batches():
        for i in itertools.count():
            clock(1)
            yield {"image": np.full(8, i)}

    mesh = make_mesh(devices=jax.devices()[:2])
    report = watch.Report(workdir, config, network_config(config.to_dict()), mesh, start, sampler=None,
                          validation=validation, localization=localization)
    source, state = batches(), None
    for done in range(start + 1, config.training.steps + 1):
        assert report.next(source)["image"][0] == done - start - 1
        clock(100 if done == start + 1 else 3)  # the first one compiles
        report.stepped(done, {"loss": jnp.float32(1)})
        state = state_of(done, 1 / done)
        if report.due(done):
            state = report.write(done, state)
    report.close()
    return state


@pytest.fixture
def exported(monkeypatch):
    """Steps whose weights were exported as the best."""
    steps = []
    monkeypatch.setattr(watch.Report, "_export", lambda self, done, params: steps.append(done))
    return steps


def test_the_weights_that_find_most_lesions_are_kept_also_after_a_restart(config, tmp_path, clock, exported):
    """The score is expected Dice times slice AUC. A resumed run reads the best score from its log."""
    config.training.localization_every = 1
    values = dict(enumerate([(np.nan, 0.5), (0.4, 0.9), (0.6, 0.5), (0.5, 0.9), (0.5, 0.9), (0.4, 0.9), (0.9, 0.9)], 1))

    def localization_from(start):
        steps = itertools.count(start + 1)

        def localization(params):
            expected, auc = values[next(steps)]
            return {"localization_expected_dice": expected, "localization_auc": auc}

        return localization

    run(config, tmp_path, clock, localization=localization_from(0))
    assert exported == [2, 4, 7]
    assert read(tmp_path)[1]["localization_expected_dice"] is None
    assert read(tmp_path)[4]["localization_auc"] == 0.9
    exported.clear()
    run(config, tmp_path, clock, start=4, localization=localization_from(4))
    assert exported == [7]


def read(workdir):
    return {line.pop("step"): line for line in map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())}


def test_lines_are_written_when_due(config, tmp_path, clock):
    state = run(config, tmp_path, clock)
    lines = read(tmp_path)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == len(lines)
    assert [step for step, line in lines.items() if "loss" in line] == [2, 4, 6, 7]
    assert [step for step, line in lines.items() if "validation_loss" in line] == [3, 6, 7]
    assert float(state.window.steps) == 0
    assert (tmp_path / "loss.png").exists()


def test_what_a_line_says(config, tmp_path, clock):
    run(config, tmp_path, clock, validation_seconds=50)
    line = read(tmp_path)[6]
    flops = training_flops(network_config(config.to_dict()))
    expected = {
        "loss": 1 / 6, "gradient_norm": 3, "loss_t1of4": 0.5, "loss_t3of4": 2,
        "parameter_norm": 5, "ema_distance": 0.1, "skipped_steps": 1,
        "learning_rate": 1e-3 * 5 / 10,  # the fifth step that was not skipped
        "validation_loss": 0.25,
        "images_per_second": 8 / 4, "model_flops_per_second": flops * 2, "input_wait_seconds": 1,
        "input_wait_share": 0.25,
    }
    assert {name: line[name] for name in expected} == pytest.approx(expected, rel=1e-6)
    assert 0.05 < line["device_memory_gib"] < 1000
    assert line.keys() == expected.keys() | {"device_memory_gib"}  # the peak of a CPU is unknown


def test_compilation_does_not_count_as_speed(config, tmp_path, clock):
    config.training.log_every = 1
    run(config, tmp_path, clock)
    lines = read(tmp_path)
    assert "images_per_second" not in lines[1]
    assert lines[2]["images_per_second"] == 2


def test_the_share_of_the_peak(config, tmp_path, clock, monkeypatch):
    flops = training_flops(network_config(config.to_dict()))
    monkeypatch.setattr(watch, "device_peak_flops", lambda device, dtype: 4 * flops)
    run(config, tmp_path, clock)
    assert read(tmp_path)[4]["peak_share"] == pytest.approx(2 / (4 * 2))  # of two devices


def test_only_timing_differs_between_a_run_and_its_resumed_twin(config, tmp_path, clock):
    for name, step in (("whole", 0), ("parts", 0), ("parts", 3)):
        run(config, tmp_path / name, clock, start=step)
    whole, parts = read(tmp_path / "whole"), read(tmp_path / "parts")
    assert list(whole) == list(parts)

    def lasting(line):
        return {name: value for name, value in line.items() if name not in watch.TIMING_FIELDS}

    assert [lasting(line) for line in whole.values()] == [lasting(line) for line in parts.values()]


def test_other_processes_write_nothing(config, tmp_path, clock, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(watch, "_memory_gib", lambda devices: 1.0)
    run(config, tmp_path, clock)
    assert not list(tmp_path.iterdir())
