"""Noising, predictions and steps against the reference values, and the order of the DDIM inversion."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hae_jax.diffusion.process import Process, guide, sample
from hae_jax.diffusion.schedule import make_schedule
from hae_jax.errors import UserError


def nhwc(a):
    return jnp.asarray(np.moveaxis(a, 1, -1))


def toy(null=False):
    """The reference's toy network: 0.3 x + 0.1 sin(t/20), plus 0.05 (y + 1) with a class."""

    def eps(x, t, y):
        shift = 0.1 * jnp.sin(t / 20) + (0 if null else 0.05 * (y + 1))
        return 0.3 * x + shift[:, None, None, None]

    return eps


@pytest.fixture(scope="module")
def case(golden):
    data = np.load(golden / "diffusion.npz")
    names = [k for k in data.files if data[k].shape == (3, 4, 16, 16)]
    return {k: nhwc(data[k]) for k in names} | {"t": jnp.asarray(data["t"]), "y": jnp.asarray(data["y"])}


@pytest.fixture(scope="module")
def extras(golden):
    data = np.load(golden / "extras.npz")
    names = [k for k in data.files if data[k].shape == (3, 2, 8, 8)]
    return {k: nhwc(data[k]) for k in names} | {"t": jnp.asarray(data["t"])}


LINEAR = Process(make_schedule("linear", 100))


def close(a, b, atol=1e-5):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5, atol=atol)


def test_noised_equals_the_reference(case):
    close(LINEAR.noised(case["x0"], case["t"], case["noise"]), case["q_sample"])


@pytest.mark.parametrize("w", [-1, 2])  # in the reference, -1 means no guidance
def test_steps_equal_the_reference(case, w):
    x, t, y = case["q_sample"], case["t"], case["y"]
    eps = toy()(x, t, y)
    if w != -1:
        eps = guide(eps, toy(null=True)(x, t, y), w)
    prediction = LINEAR.predict(eps, x, t)
    close(prediction.x0, case[f"ddim_x0_w{w}"])
    close(LINEAR.ddim_step(prediction, t), case[f"ddim_w{w}"])
    close(LINEAR.ddpm_step(prediction, x, t, case["noise"]), case[f"ddpm_w{w}"])


def test_inversion_step_equals_the_reference(case):
    x, t = case["q_sample"], case["t"]
    prediction = LINEAR.predict(toy(null=True)(x, t, None), x, t)
    close(LINEAR.ddim_inversion_step(prediction, t), case["ddim_reverse_null"])


def test_dynamic_clipping_equals_the_reference(case):
    clipped = Process(LINEAR.schedule, clipping="dynamic").clip(3 * case["x0"])
    reference = Process(LINEAR.schedule, clipping="dynamic").clip(case["q_sample"])
    assert float(jnp.abs(clipped).max()) <= 1
    close(reference, case["clamp_to_spatial_quantile"])


@pytest.mark.parametrize(("key", "process", "network"), [
    ("learned_range", Process(LINEAR.schedule, variance="learned_range"),
     lambda x, t: jnp.concatenate([0.3 * x + 0.1 * jnp.sin(t / 20)[:, None, None, None], 0.2 * x], -1)),
    ("predict_x0", Process(LINEAR.schedule, predicts="x0"), lambda x, t: 0.8 * x),
    ("fixed_small", Process(LINEAR.schedule, variance="fixed_small"), lambda x, t: 0.3 * x),
])
def test_variants_of_the_process_equal_the_reference(extras, key, process, network):
    t = extras["t"]
    x = process.noised(extras["x0"], t, extras["noise"])
    prediction = process.predict(network(x, t), x, t)
    close(prediction.x0, extras[f"{key}_pred_xstart"])
    close(process.posterior_mean(prediction.x0, x, t), extras[f"{key}_mean"])
    if key != "predict_x0":
        close(jnp.broadcast_to(prediction.log_variance, x.shape), extras[f"{key}_log_variance"], atol=2e-5)


def test_the_last_ddpm_step_adds_no_noise(case):
    t = jnp.zeros(3, jnp.int32)
    prediction = LINEAR.predict(toy(null=True)(case["x0"], t, None), case["x0"], t)
    quiet = LINEAR.ddpm_step(prediction, case["x0"], t, jnp.zeros_like(case["x0"]))
    close(LINEAR.ddpm_step(prediction, case["x0"], t, case["noise"]), quiet, atol=0)


def test_eps_belongs_to_the_clipped_x0(case):
    x, t = 5 * case["x0"], jnp.array([10, 50, 90])
    prediction = LINEAR.predict(jnp.zeros_like(x), x, t)
    close(LINEAR.noised(prediction.x0, t, prediction.eps), x)
    assert float(jnp.abs(prediction.x0).max()) == 1


def test_inversion_then_ddim_returns_the_input_with_first_order():
    """The error of inversion and DDIM in a smooth flow decreases as 1 / steps, since DDIM is a first-order method."""
    x0 = 0.5 * jax.random.normal(jax.random.key(0), (1, 8, 8, 1))

    def round_trip_error(steps):
        process = Process(make_schedule("cosine", 1000, str(steps)), clipping="none")
        denoise = lambda x, t: 0.4 * x * jnp.cos(t / 300)[:, None, None, None]
        half = steps // 2

        def up(x, t):
            t = jnp.full(1, t)
            return process.ddim_inversion_step(process.predict(denoise(x, process.original(t)), x, t), t), None

        def down(x, t):
            t = jnp.full(1, t)
            return process.ddim_step(process.predict(denoise(x, process.original(t)), x, t), t), None

        x = jax.lax.scan(up, x0, jnp.arange(half))[0]
        x = jax.lax.scan(down, x, jnp.arange(half, 0, -1))[0]
        return float(jnp.abs(x - x0).mean())

    errors = np.array([round_trip_error(steps) for steps in (50, 100, 200)])
    order = np.log2(errors[:-1] / errors[1:])
    assert np.all((order > 0.7) & (order < 1.5)), (errors, order)


def test_sampling_with_a_perfect_denoiser_returns_the_image(case):
    x0 = case["x0"]
    process = Process(make_schedule("linear", 100, "10"))

    def denoise(x, t):
        index = jnp.searchsorted(jnp.asarray(process.schedule.timesteps), t)
        return process.eps_from_x0(x, index, x0)

    close(sample(process, denoise, case["noise"]), jnp.clip(x0, -1, 1))


def test_unknown_choice_names_the_field():
    with pytest.raises(UserError, match=r"diffusion\.variance"):
        Process(LINEAR.schedule, variance="learned")
