"""DDIB and AnoDDPM against step-by-step loops, with a denoiser of known output, and their required properties."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hae_jax.diffusion.noise import simplex
from hae_jax.diffusion.process import Process, guide, sample
from hae_jax.diffusion.schedule import make_schedule
from hae_jax.errors import UserError
from hae_jax.localization.counterparts import AnoDdpm, ClassifierGuidance, Dae, Ddib, inverted
from hae_jax.localization.denoisers import Denoisers

PROCESS = Process(make_schedule("linear", 100, "50"))
KEYS = jax.random.split(jax.random.key(5), 4)
X0 = jax.random.uniform(jax.random.key(6), (4, 8, 8, 4), minval=-0.8, maxval=0.8)


def null_eps(x, t):
    return 0.3 * x + 0.1 * jnp.sin(t / 20)[:, None, None, None] + 0.05 * jnp.roll(x, 1, 1)


DENOISERS = Denoisers(null_eps, lambda x, t: (null_eps(x, t) + 0.05, null_eps(x, t)))
METHODS = [Ddib(PROCESS, 30), Ddib(PROCESS, 30, start="level"), AnoDdpm(PROCESS, 20), AnoDdpm(PROCESS, 20, "gaussian")]
each_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.name}-{getattr(m, 'start', '')}")


def rows(t):
    return jnp.full(len(X0), t)


def outputs(x, t, guidance):
    healthy, null = DENOISERS.healthy_and_null(x, PROCESS.original(rows(t)))
    return healthy if guidance is None else guide(healthy, null, guidance)


@pytest.mark.parametrize("guidance", [1.5, 0, None])
@pytest.mark.parametrize(("start", "first"), [("published", 29), ("level", 30)])
def test_ddib_step_by_step(start, first, guidance):
    x = X0
    for t in range(30):
        prediction = PROCESS.predict(null_eps(x, PROCESS.original(rows(t))), x, rows(t))
        x = PROCESS.ddim_inversion_step(prediction, rows(t))
    for t in range(first, -1, -1):
        x = PROCESS.ddim_step(PROCESS.predict(outputs(x, t, guidance), x, rows(t)), rows(t))
    found = jax.jit(lambda x0: Ddib(PROCESS, 30, guidance, start, (1, 3))(DENOISERS, x0, KEYS))(X0)
    np.testing.assert_allclose(found.healthy, x[..., [1, 3]], atol=1e-5)
    np.testing.assert_allclose(found.map, jnp.square(x - X0)[..., [1, 3]].mean(-1), atol=1e-5)


@pytest.mark.parametrize("noise", ["simplex", "gaussian"])
def test_anoddpm_step_by_step(noise):
    fold = lambda step: jax.vmap(lambda key: jax.random.fold_in(key, step))(KEYS)
    gaussian = lambda step: jax.vmap(lambda key: jax.random.normal(key, X0.shape[1:]))(fold(step))
    first = gaussian(20) if noise == "gaussian" else simplex(fold(20), X0.shape[1:], jnp.full(
        4, float(PROCESS.schedule.timesteps[19])))
    x = PROCESS.noised(X0, rows(19), first)
    for t in range(19, -1, -1):
        prediction = PROCESS.predict(null_eps(x, PROCESS.original(rows(t))), x, rows(t))
        x = PROCESS.ddpm_step(prediction, x, rows(t), gaussian(t))
    found = jax.jit(lambda x0: AnoDdpm(PROCESS, 20, noise, (0,))(Denoisers(null_eps, None), x0, KEYS))(X0)
    np.testing.assert_allclose(found.healthy, x[..., [0]], atol=1e-5)
    np.testing.assert_allclose(found.map, jnp.square(x - X0)[..., 0], atol=1e-5)


@each_method
def test_a_denoiser_that_knows_the_answer_is_followed(method):
    answer = jnp.flip(X0, 0) * 0.5

    def eps(x, t):  # the noise in x, if x is the noised `answer`
        a = jnp.asarray(make_schedule("linear", 100).alpha_bar, jnp.float32)[t][:, None, None, None]
        return (x - jnp.sqrt(a) * answer) / jnp.sqrt(1 - a)

    denoisers = Denoisers(eps, lambda x, t: (eps(x, t), eps(x, t)))
    found = jax.jit(lambda x0: method(denoisers, x0, KEYS))(X0)
    np.testing.assert_allclose(found.healthy, answer[..., [0, 3]], atol=1e-4)
    np.testing.assert_allclose(found.map, jnp.square(answer - X0)[..., [0, 3]].mean(-1), atol=1e-3)


@pytest.mark.parametrize("extra", [0, 1], ids=["published", "level"])
def test_inversion_then_ddim_returns_the_input_to_first_order(extra):
    """The exact denoiser of normally distributed images has a smooth flow, so the error halves with the step size."""
    variance, alpha_bar = 0.25, jnp.asarray(make_schedule().alpha_bar, jnp.float32)
    x0 = jnp.sqrt(variance) * jax.random.normal(jax.random.key(0), (2, 8, 8, 2))

    def eps(x, t):
        a = alpha_bar[t][:, None, None, None]
        return jnp.sqrt(1 - a) * x / (a * variance + 1 - a)

    counts, errors = [50, 100, 200, 400], []
    for count in counts:
        process = Process(make_schedule(respacing=str(count)), clipping="none")
        steps = int(np.count_nonzero(process.schedule.timesteps < 600))
        there_and_back = lambda x: sample(process, eps, inverted(process, eps, x, steps), steps + extra)  # noqa: B023
        errors.append(float(jnp.sqrt(jnp.square(jax.jit(there_and_back)(x0) - x0).mean())))
    slope = np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert -1.1 < slope < -0.9
    assert errors[-1] < 0.02 * np.sqrt(variance)


@each_method
def test_permuting_slices_permutes_results(method):
    order, run = jnp.array([2, 0, 3, 1]), jax.jit(lambda x0, keys: method(DENOISERS, x0, keys))
    for whole, permuted in zip(run(X0, KEYS), run(X0[order], KEYS[order]), strict=True):
        np.testing.assert_allclose(whole[order], permuted, rtol=0, atol=1e-5)


@each_method
def test_a_slice_does_not_depend_on_its_company(method):
    run = jax.jit(lambda x0, keys: method(DENOISERS, x0, keys))
    for whole, alone in zip(run(X0, KEYS), run(X0[1:2], KEYS[1:2]), strict=True):
        np.testing.assert_allclose(whole[1:2], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", [METHODS[0], METHODS[3]], ids=lambda m: m.name)
def test_memory_does_not_grow_with_the_steps(method):
    def temporary_bytes(steps):
        longer = dataclasses.replace(method, steps=steps)
        compiled = jax.jit(lambda x0: longer(DENOISERS, x0, KEYS)).lower(X0).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(45) - temporary_bytes(5) <= 40 * 4 * 2  # only step numbers


def test_only_the_noise_is_random():
    run = lambda method, keys: np.asarray(jax.jit(lambda keys: method(DENOISERS, X0, keys).map)(keys))
    others = jax.random.split(jax.random.key(9), 4)
    np.testing.assert_array_equal(run(METHODS[0], KEYS), run(METHODS[0], others))
    for method in METHODS[2:]:
        assert not np.allclose(run(method, KEYS), run(method, others))
    assert not np.allclose(run(METHODS[2], KEYS), run(METHODS[3], KEYS))


@pytest.mark.parametrize(("make", "field"), [
    (lambda: Ddib(PROCESS, 5, modality=()), "modality"),
    (lambda: AnoDdpm(PROCESS, 5, "perlin"), "method"),
])
def test_impossible_settings_name_the_field(make, field):
    """Settings that no configuration can have; the others are in `test_methods`."""
    with pytest.raises(UserError, match=rf"translation\.{field} "):
        make()


@pytest.mark.parametrize("scale", [0.0, 3.0])
def test_classifier_guidance_step_by_step(scale):
    """eps - s sqrt(1 - alpha_bar) grad log p(healthy), with a classifier whose gradient is known."""
    process = Process(make_schedule("linear", 50))
    rng = np.random.default_rng(0)
    x0, weight = rng.uniform(-0.5, 0.5, (2, 4, 4, 2)), rng.normal(size=(4, 4, 2))

    def logits(x, t):
        healthy = (x * jnp.asarray(weight, jnp.float32)).sum((1, 2, 3))
        return jnp.stack([healthy, -healthy], axis=-1)

    eps = lambda x, t: 0.3 * x
    method = ClassifierGuidance(process, 6, scale, (0, 1))
    found = method(Denoisers(eps, None, logits), jnp.asarray(x0, jnp.float32), None)
    alpha_bar = process.schedule.alpha_bar
    level = lambda t: alpha_bar[t] if t >= 0 else 1.0

    def moved(x, output, t, to):  # DDIM, with the predicted x0 clipped
        x0_t = np.clip((x - np.sqrt(1 - alpha_bar[t]) * output) / np.sqrt(alpha_bar[t]), -1, 1)
        output = (x - np.sqrt(alpha_bar[t]) * x0_t) / np.sqrt(1 - alpha_bar[t])
        return np.sqrt(to) * x0_t + np.sqrt(1 - to) * output

    x = x0.copy()
    for t in range(6):
        x = moved(x, 0.3 * x, t, alpha_bar[t + 1])
    for t in range(5, -1, -1):
        p_lesion = 1 / (1 + np.exp(2 * (x * weight).sum((1, 2, 3))))
        gradient = 2 * p_lesion[:, None, None, None] * weight
        x = moved(x, 0.3 * x - scale * np.sqrt(1 - alpha_bar[t]) * gradient, t, level(t - 1))
    np.testing.assert_allclose(found.healthy, x, atol=2e-5)
    np.testing.assert_allclose(found.map, np.abs(x - x0).mean(-1), atol=2e-5)
    assert method.passes == 12


def test_a_denoising_autoencoder_is_asked_once_without_noise():
    process = Process(make_schedule("single", 1), "x0")
    x0 = np.random.default_rng(0).uniform(-0.5, 0.5, (2, 4, 4, 2)).astype(np.float32)
    scale = np.sqrt(process.schedule.alpha_bar[0])
    method = Dae(process, (1,))
    found = method(Denoisers(lambda x, t: 0.5 * x / scale, None), jnp.asarray(x0), None)
    np.testing.assert_allclose(found.healthy, 0.5 * x0[..., 1:], rtol=1e-5)
    np.testing.assert_allclose(found.map, np.abs(0.5 * x0[..., 1]), rtol=1e-5)
