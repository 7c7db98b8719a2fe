"""All ways of averaging a map: running sums against stored predictions of all steps and NumPy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hae_jax.diffusion.process import Process, guide
from hae_jax.diffusion.schedule import make_schedule
from hae_jax.localization.denoisers import Denoisers, step_noise
from hae_jax.localization.forward_process import ForwardSettings, forward_process

PROCESS = Process(make_schedule("linear", 100))
SETTINGS = ForwardSettings(steps=60, guidance=2.0, modality=(0, 2))
CENTRES = jnp.array([[12.0, 0, 30], [45, 0, 55], [0, 0, 22]])[:, None, None, :]  # of diff's peak, [B, 1, 1, C]


def null_eps(x, t):
    return 0.3 * x + 0.1 * jnp.sin(t / 20)[:, None, None, None]


def healthy_eps(x, t):
    """The healthy prediction. It differs most from the null one at a timestep that depends on slice and channel."""
    width = jnp.where(CENTRES == 0, 0.5, 6)
    return null_eps(x, t) + jnp.exp(-jnp.square((t[:, None, None, None] - CENTRES) / width)) * (0.2 + 0.1 * x)


DENOISERS = Denoisers(null_eps, lambda x, t: (healthy_eps(x, t), null_eps(x, t)))


X0 = jax.random.uniform(jax.random.key(1), (3, 6, 7, 3), minval=-0.8, maxval=0.8)
NOISE = step_noise(jax.random.split(jax.random.key(0), 3), (6, 7, 3))


@functools.cache
def stacks(reference_name, d_reverse):
    """The guided and the reference prediction of every step, [B, T, H, W, M] each, step by step."""
    rows = lambda t: jnp.full(len(X0), t)
    x, guided, reference = PROCESS.noised(X0, rows(0), NOISE(0)), [], []
    for t in range(SETTINGS.steps):
        healthy, null = healthy_eps(x, rows(t)), null_eps(x, rows(t))
        for stack, output in ((guided, guide(healthy, null, SETTINGS.guidance)),
                              (reference, healthy if reference_name == "healthy" else null)):
            stack.append(np.asarray(PROCESS.predict(output, x, rows(t)).x0[..., list(SETTINGS.modality)], np.float64))
        if d_reverse:
            x = PROCESS.ddim_inversion_step(PROCESS.predict(null_eps(x, rows(t + 1)), x, rows(t + 1)), rows(t + 1))
        else:
            x = PROCESS.noised(X0, rows(t + 1), NOISE(t + 1))
    return np.stack(guided, 1), np.stack(reference, 1)


def averaged(t_e, settings):
    """The steps that a map averages."""
    if settings.last_step_only:
        return [max(t_e - 1, 0)]
    if settings.every > 1:
        return [*range(0, t_e, settings.every), t_e]
    return range(max(t_e, 1))


def terms(guided, reference, x, settings):
    """The term of each step in the map, [B, T, H, W, M]."""
    if settings.maps == "mse":
        return (guided - x) ** 2
    a = PROCESS.schedule.alpha_bar[:settings.steps, None, None, None]
    scale = ((1 - a) / np.sqrt(a)) ** 2 * (1 + settings.guidance) ** 2
    return (guided - reference) ** 2 / (scale if settings.maps == "gradient" else 1)


@pytest.mark.parametrize("changes", [
    {}, {"maps": "gradient"}, {"maps": "gradient_unscaled"}, {"last_step_only": True}, {"every": 2}, {"every": 7},
    {"t_e_ratio": 0.5}, {"t_e_ratio": 0.01}, {"t_e_ratio": 1.4}, {"t_e_ratio": 0.5, "every": 3},
    {"t_e_ratio": 0.75, "last_step_only": True}, {"maps": "gradient", "every": 5, "reference": "null"},
    {"t_e_ratio": 0.6, "d_reverse": False}, {"t_e_ratio": 1.2, "maps": "gradient", "last_step_only": True},
], ids=lambda changes: ",".join(f"{name}={value}" for name, value in changes.items()) or "none")
def test_running_sums_equal_stored_stacks(changes):
    settings = dataclasses.replace(SETTINGS, **changes)
    found = jax.jit(lambda x0: forward_process(PROCESS, DENOISERS, x0, NOISE, settings))(X0)
    guided, reference = stacks(settings.reference, settings.d_reverse)
    each = terms(guided, reference, np.asarray(X0)[:, None][..., list(settings.modality)], settings)
    diff = ((guided - reference) ** 2).mean((2, 3))
    np.testing.assert_allclose(found.diff, diff, rtol=1e-3, atol=1e-7)
    largest = diff.argmax(1)
    assert largest.min() == 0 < np.sort(largest.ravel())[1]  # both rules occur, also that for t_e = 0
    t_e = np.minimum(np.round(settings.t_e_ratio * largest), settings.steps - 1).astype(int)
    np.testing.assert_array_equal(found.t_e, t_e)
    for b, m in np.ndindex(t_e.shape):
        expected = each[b, list(averaged(t_e[b, m], settings)), :, :, m].mean(0)
        np.testing.assert_allclose(found.map[b, :, :, m], expected, rtol=1e-3, atol=1e-5 * expected.max())
        np.testing.assert_allclose(found.healthy[b, :, :, m], guided[b, t_e[b, m], :, :, m], atol=1e-4)


@pytest.mark.parametrize("changes", [{"t_e_ratio": 0.5}, {"last_step_only": True}, {"every": 3}, {"maps": "gradient"}])
def test_curves_are_those_of_the_method_itself(changes):
    plain, found = (forward_process(PROCESS, DENOISERS, X0, NOISE, dataclasses.replace(SETTINGS, **changed))
                    for changed in ({}, changes))
    for name in ("mse", "ref", "diff"):
        np.testing.assert_allclose(getattr(found, name), getattr(plain, name), rtol=1e-4, atol=1e-7)
    assert not np.allclose(found.map, plain.map)


def test_memory_does_not_grow_with_the_steps_of_two_walks():
    def temporary_bytes(steps):
        settings = dataclasses.replace(SETTINGS, steps=steps, t_e_ratio=0.5)
        function = lambda x: forward_process(PROCESS, DENOISERS, x, lambda t: x, settings)
        return jax.jit(function).lower(X0).compile().memory_analysis().temp_size_in_bytes

    # Only the curves may grow with the steps: 3 x B x M floats per step and walk.
    assert temporary_bytes(90) - temporary_bytes(10) <= 80 * 3 * 3 * 2 * 4 * 2 * 2
