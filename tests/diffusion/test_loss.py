"""Training losses and timestep weights against the reference values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hae_jax.diffusion.loss import empty_history, remember_losses, second_moment_weights, training_loss
from hae_jax.diffusion.process import Process
from hae_jax.diffusion.schedule import make_schedule

SCHEDULE = make_schedule("linear", 100)


def nhwc(a):
    return jnp.asarray(np.moveaxis(a, 1, -1))


@pytest.fixture(scope="module")
def extras(golden):
    return np.load(golden / "extras.npz")


@pytest.mark.parametrize(("key", "process", "network"), [
    ("learned_range", Process(SCHEDULE, variance="learned_range"),
     lambda x, t: jnp.concatenate([0.3 * x + 0.1 * jnp.sin(t / 20)[:, None, None, None], 0.2 * x], -1)),
    ("predict_x0", Process(SCHEDULE, predicts="x0"), lambda x, t: 0.8 * x),
    ("fixed_small", Process(SCHEDULE, variance="fixed_small"), lambda x, t: 0.3 * x),
])
def test_losses_equal_the_reference(extras, key, process, network):
    x0, noise, t = nhwc(extras["x0"]), nhwc(extras["noise"]), jnp.asarray(extras["t"])
    x_t = process.noised(x0, t, noise)
    loss = jax.jit(lambda x_t: training_loss(process, network(x_t, t), x0, x_t, t, noise))(x_t)
    np.testing.assert_allclose(loss.mse, extras[f"{key}_train_mse"], rtol=1e-5)
    np.testing.assert_allclose(loss.loss, extras[f"{key}_train_loss"], rtol=2e-5)
    if key == "learned_range":
        np.testing.assert_allclose(loss.vb, extras[f"{key}_train_vb"], rtol=1e-4)


def test_toy_network_loss_equals_the_reference(golden):
    data = np.load(golden / "diffusion.npz")
    x0, noise, t, y = nhwc(data["x0"]), nhwc(data["noise"]), jnp.asarray(data["t"]), jnp.asarray(data["y"])
    process = Process(SCHEDULE)
    x_t = process.noised(x0, t, noise)
    eps = 0.3 * x_t + (0.1 * jnp.sin(t / 20) + 0.05 * (y + 1))[:, None, None, None]
    np.testing.assert_allclose(training_loss(process, eps, x0, x_t, t, noise).loss, data["train_mse"], rtol=1e-5)


def test_the_bound_does_not_teach_the_mean(extras):
    """Only the variance channels have a gradient of it."""
    process = Process(SCHEDULE, variance="learned_range")
    x0, noise, t = nhwc(extras["x0"]), nhwc(extras["noise"]), jnp.asarray(extras["t"])
    x_t = process.noised(x0, t, noise)
    output = jnp.concatenate([0.3 * x_t, 0.2 * x_t], -1)
    gradient = jax.jit(jax.grad(lambda o: training_loss(process, o, x0, x_t, t, noise).vb.sum()))(output)
    assert not np.any(gradient[..., :2])
    assert np.any(gradient[..., 2:])


def test_second_moment_weights_equal_the_reference(extras):
    t, loss = extras["second_moment_t"], extras["second_moment_loss"]
    history, count = remember_losses(*empty_history(5), jnp.asarray(t), jnp.asarray(loss, jnp.float32))
    np.testing.assert_allclose(second_moment_weights(history, count), extras["second_moment_weights"], rtol=1e-5)


def test_weights_are_uniform_until_every_timestep_is_known():
    history, count = remember_losses(*empty_history(4), jnp.array([0] * 12 + [1] * 10 + [2] * 10), jnp.arange(32.0))
    np.testing.assert_allclose(second_moment_weights(history, count), 0.25)
    assert count.tolist() == [10, 10, 10, 0]
    assert history[0].tolist() == list(range(2, 12))
