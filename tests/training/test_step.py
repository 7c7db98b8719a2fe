"""The training step on the smallest network: random draws, loss history, skipped steps, a single compilation."""

import dataclasses
import logging
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
from flax import nnx

from hae_jax.diffusion.loss import second_moment_weights, training_loss
from hae_jax.diffusion.process import Process
from hae_jax.diffusion.schedule import make_schedule
from hae_jax.errors import UserError
from hae_jax.model import UNet, UNetConfig
from hae_jax.model.layers import Randomness
from hae_jax.training.checkpoint import Checkpoints
from hae_jax.training.mesh import make_mesh, replicated, shard_batch
from hae_jax.training.state import (
    LossHistory,
    TrainState,
    abstract_network,
    abstract_state,
    empty_window,
    sharded_initial_state,
    shardings_of,
)
from hae_jax.training.step import StepSettings, draw, make_train_step, state_norms, step_settings

STEPS, BATCH, RATES = 4, 16, (0.5, 0.9)
PROCESS = Process(make_schedule("cosine", STEPS))
NETWORK = UNetConfig(variant="fpdm", image_size=8, model_channels=32, num_res_blocks=1, channel_mult=(1,),
                     attention_resolutions=(), dropout=0.1, num_classes=2, use_scale_shift_norm=True)
SETTINGS = StepSettings(7, 0.3, 1, RATES, "simplex", "skip")
OPTIMIZER = optax.adamw(1e-3)


class Trainer(NamedTuple):
    jitted: object  # the step on the arrays of a state
    state: TrainState  # before the first step, which donates it; use `fresh` for a copy
    shardings: TrainState
    batch: dict

    def fresh(self):
        return jax.tree.map(jnp.copy, self.state)

    def step(self, state, batch):
        leaves, metrics = self.jitted(jax.tree.leaves(state), batch)
        return jax.tree.structure(state).unflatten(leaves), metrics


def make_trainer(devices, **settings):
    mesh = make_mesh(devices=jax.devices()[:devices])
    state, shardings = sharded_initial_state(mesh, NETWORK, OPTIMIZER, len(RATES), 0, STEPS)
    # The history is full, so that timesteps are drawn by it from the first step on.
    known = np.random.default_rng(1).uniform(0.1, 3, (STEPS, 10)) * np.arange(1, STEPS + 1)[:, None]
    history = LossHistory(known.astype(np.float32), np.full(STEPS, 10, np.int32))
    state = state._replace(timesteps=jax.device_put(history, replicated(mesh)))
    step = make_train_step(mesh, shardings, abstract_network(NETWORK)[0], NETWORK, PROCESS, OPTIMIZER,
                           SETTINGS._replace(**settings))
    return Trainer(step, state, shardings, shard_batch(mesh, host_batch()))


def host_batch():
    images = np.random.default_rng(0).uniform(-1, 1, (BATCH, 8, 8, 4)).astype(np.float32)
    return {"image": images, "label": np.arange(BATCH, dtype=np.int32) % 2, "stop": np.zeros(BATCH, np.int32)}


@pytest.fixture(scope="module")
def trainer():
    return make_trainer(1)


def broken(trainer):
    return trainer.batch | {"image": trainer.batch["image"].at[3, 2, 2, 1].set(jnp.nan)}


def losses(trainer, steps):
    state, found = trainer.fresh(), []
    for _ in range(steps):
        state, metrics = trainer.step(state, trainer.batch)
        found.append(float(metrics["loss"]))
    return found, state


def assert_equal(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


def test_devices_and_accumulation_change_neither_losses_nor_history(trainer):
    (expected, alone), (found, parts) = losses(trainer, 3), losses(make_trainer(4, accumulation=4), 3)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(parts.timesteps.losses, alone.timesteps.losses, rtol=1e-4)
    np.testing.assert_allclose(parts.window.bin_count, alone.window.bin_count, rtol=1e-5)
    assert len(set(expected)) == 3


def sample_losses(params, batch, draws):
    x_t = PROCESS.noised(batch["image"], draws.t, draws.noise)
    randomness = Randomness(draws.keys, jax.random.key(0))  # this network does not use the shared key
    output = nnx.merge(abstract_network(NETWORK)[0], params)(
        x_t, PROCESS.original(draws.t), batch["label"], drop=draws.drop, rngs=randomness)
    return training_loss(PROCESS, output, batch["image"], x_t, draws.t, draws.noise).loss


def test_a_step_against_its_definition(trainer):
    """Loss, history, window and EMA weights are computed from the same draws in NumPy."""
    old = trainer.state
    draws = draw(SETTINGS, PROCESS, old.step, old.timesteps, trainer.batch["image"].shape)
    each = np.asarray(jax.jit(sample_losses)(old.params, trainer.batch, draws))
    new, metrics = trainer.step(trainer.fresh(), trainer.batch)

    t, weight = np.asarray(draws.t), np.asarray(draws.weight)
    np.testing.assert_allclose(metrics["loss"], (weight * each).mean(), rtol=1e-5)
    rows = [list(row) for row in np.asarray(old.timesteps.losses)]
    for i in range(BATCH):
        rows[t[i]] = [*rows[t[i]][1:], each[i]]
    np.testing.assert_allclose(new.timesteps.losses, rows, rtol=1e-5)
    np.testing.assert_allclose(new.window.bin_count, [weight[t == i].sum() for i in range(STEPS)], rtol=1e-5)
    np.testing.assert_allclose(new.window.bin_loss, [(weight * each)[t == i].sum() for i in range(STEPS)], rtol=1e-5)
    for rate, average in zip(RATES, new.ema, strict=True):
        jax.tree.map(lambda a, p, q, rate=rate: np.testing.assert_allclose(a, rate * p + (1 - rate) * q, atol=1e-6),
                     average, old.params, new.params)
    norms = state_norms(new)
    flat = [np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (new.params, *new.ema)]
    np.testing.assert_allclose(norms["parameter_norm"], np.linalg.norm(flat[0]), rtol=1e-5)
    for name, average in (("ema_distance", flat[1]), ("ema_distance_2", flat[2])):
        np.testing.assert_allclose(norms[name], np.linalg.norm(average - flat[0]) / np.linalg.norm(flat[0]), rtol=1e-4)


def test_gradients_that_are_not_finite_are_skipped_and_counted(trainer):
    state, _ = trainer.step(trainer.fresh(), trainer.batch)
    before = jax.tree.map(np.array, state)
    state, metrics = trainer.step(state, broken(trainer))
    assert (bool(metrics["finite"]), int(metrics["skipped"])) == (False, 1)
    assert_equal(state, before._replace(step=np.int32(2), skipped=np.int32(1)))
    state, metrics = trainer.step(state, trainer.batch)
    assert (bool(metrics["finite"]), int(metrics["skipped"]), int(state.step)) == (True, 1, 3)
    assert float(state.window.steps) == 2
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_one_host_that_wants_to_stop_is_enough(trainer):
    state, metrics = trainer.step(trainer.fresh(), trainer.batch)
    assert not metrics["stop"]
    _, metrics = trainer.step(state, trainer.batch | {"stop": trainer.batch["stop"].at[5].set(1)})
    assert metrics["stop"]


def test_nothing_compiles_after_the_first_step(trainer, tmp_path, caplog):
    """This also holds with an emptied window and with a restored state."""
    checkpoints = Checkpoints(tmp_path)
    state, _ = trainer.step(trainer.fresh(), trainer.batch)
    everywhere = replicated(make_mesh(devices=jax.devices()[:1]))
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        for _ in range(2):
            emptied = jax.device_put(empty_window(), everywhere)
            state, _ = trainer.step(state._replace(window=emptied), trainer.batch)
        checkpoints.save(state, {})
        checkpoints.close()
        expected, _ = trainer.step(state, trainer.batch)
        checkpoints = Checkpoints(tmp_path)
        state = checkpoints.restore(3, trainer.state, trainer.shardings)
        state, _ = trainer.step(state, trainer.batch)
        checkpoints.close()
    assert_equal(state, expected)
    assert not [record for record in caplog.records if "jit(step)" in record.getMessage()]
    assert trainer.jitted._cache_size() == 1


def test_the_state_is_updated_in_place(trainer):
    state = trainer.fresh()
    memory = trainer.jitted.lower(jax.tree.leaves(state), trainer.batch).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= 0.99 * sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    trainer.step(state, trainer.batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize(("p_uncond", "dropped"), [(0.0, 0), (1.0, 256)])
def test_labels_are_dropped_never_or_always(p_uncond, dropped):
    settings = SETTINGS._replace(p_uncond=p_uncond, noise="gaussian")
    assert draw(settings, PROCESS, 3, None, (256, 1, 1, 1)).drop.sum() == dropped


def test_timesteps_follow_their_losses_and_the_weights_make_up_for_it(trainer):
    history, uniform = trainer.state.timesteps, SETTINGS._replace(noise="gaussian")
    count = 8192
    draws = draw(uniform, PROCESS, 0, history, (count, 1, 1, 1))
    p = np.asarray(second_moment_weights(*history))
    assert p.max() > 2 * p.min()
    np.testing.assert_allclose(np.bincount(draws.t, minlength=STEPS) / count, p, atol=4 * np.sqrt(0.25 / count))
    np.testing.assert_allclose(draws.weight, 1 / (STEPS * p[draws.t]), rtol=1e-6)
    np.testing.assert_allclose(draws.weight.mean(), 1, atol=0.03)
    np.testing.assert_array_equal(draw(uniform, PROCESS, 0, None, (8, 1, 1, 1)).weight, 1)


def test_what_a_row_draws_does_not_depend_on_the_batch(trainer):
    def drawing(rows):
        return jax.jit(lambda step: draw(SETTINGS, PROCESS, step, trainer.state.timesteps, (rows, 4, 4, 2)))

    three = drawing(3)
    few, many = (d(5)._replace(keys=None) for d in (three, drawing(6)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b[:3], rtol=1e-5, atol=1e-5), few, many)
    assert not np.array_equal(few.noise, three(6).noise)


def test_an_unconditional_network_is_given_no_labels(monkeypatch):
    network = UNetConfig(image_size=16, model_channels=32, num_res_blocks=1, channel_mult=(1, 1),
                         attention_resolutions=(2,), use_scale_shift_norm=True)
    mesh, state = make_mesh(), abstract_state(network, OPTIMIZER, len(RATES))
    given, call = [], UNet.__call__

    def listen(self, x, t, *more, **named):
        given.append((more, named.keys()))
        return call(self, x, t, *more, **named)

    monkeypatch.setattr(UNet, "__call__", listen)
    step = make_train_step(mesh, shardings_of(mesh, state), abstract_network(network)[0], network, PROCESS, OPTIMIZER,
                           SETTINGS._replace(accumulation=2))
    batch = {"image": jax.ShapeDtypeStruct((8, 16, 16, 4), "f4"), "label": jax.ShapeDtypeStruct((8,), "i4")}
    new, _ = jax.eval_shape(step, jax.tree.leaves(state), batch)
    assert [(a.shape, a.dtype) for a in new] == [(a.shape, a.dtype) for a in jax.tree.leaves(state)]
    assert given
    assert all(more == () and names == {"rngs"} for more, names in given)


def test_recomputation_keeps_less_for_the_backward_pass():
    kept = {}
    for remat in ("none", "block", "full"):
        graph, params = abstract_network(dataclasses.replace(NETWORK, num_res_blocks=2, remat=remat))

        def backward(params, x, graph=graph):
            return jax.vjp(lambda p: nnx.merge(graph, p)(x, jnp.zeros(8), jnp.zeros(8, jnp.int32)), params)[1]

        residuals = jax.tree.leaves(jax.eval_shape(backward, params, jnp.zeros((8, 8, 8, 4))))
        kept[remat] = sum(leaf.size for leaf in residuals) - sum(leaf.size for leaf in jax.tree.leaves(params))
    assert 3 * kept["block"] < kept["none"]  # not more, since a norm always stores only its input
    assert 4 * kept["full"] < 3 * kept["block"]


@pytest.mark.parametrize(("section", "name"), [
    ("training", "timesteps"), ("training", "nonfinite"), ("diffusion", "noise")])
def test_unknown_choices_are_named(section, name):
    config = ml_collections.ConfigDict({
        "seed": 0, "diffusion": {"noise": "simplex"},
        "training": {"p_uncond": 0.1, "accumulation": 2, "ema_rates": [0.9], "timesteps": "uniform",
                     "nonfinite": "stop"}})
    assert step_settings(config) == StepSettings(0, 0.1, 2, (0.9,), "simplex", "stop")
    config[section][name] = "white"
    with pytest.raises(UserError, match=rf"{section}\.{name} is 'white': choose one of "):
        step_settings(config)
