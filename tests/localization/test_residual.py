"""The residual map against its definition, with a denoiser of known output."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from hae_jax.diffusion.process import Process
from hae_jax.diffusion.schedule import make_schedule
from hae_jax.errors import UserError
from hae_jax.localization.denoisers import Denoisers, step_noise
from hae_jax.localization.residual import ResidualSettings, residual

PROCESS = Process(make_schedule("linear", 1000), clipping="none")
HEALTHY, NULL = 0.1, -0.05  # the denoiser's predictions of x0 under both conditions, in every pixel


def predicts(value):
    """The predicted noise for which the prediction of x0 is `value`."""
    return lambda x, t: PROCESS.eps_from_x0(x, t, jnp.full_like(x, value))


DENOISERS = Denoisers(predicts(NULL), lambda x, t: (predicts(HEALTHY)(x, t), predicts(NULL)(x, t)))


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).uniform(-1, 1, (2, 12, 10, 4)).astype(np.float32)


def noise(images, seed=0):
    return step_noise(jax.random.split(jax.random.key(seed), len(images)), images.shape[1:])


def test_it_is_the_smoothed_weighted_residual(images):
    settings = ResidualSettings((50, 150), 2.0, modality=(0, 3), weights=(1, -0.5), smoothing=0.7)
    found = residual(PROCESS, DENOISERS, images, noise(images), settings)
    guided = 3 * HEALTHY - 2 * NULL  # guidance in eps is guidance in x0 at one timestep
    signed = (images[..., 0] - guided) - 0.5 * (images[..., 3] - guided)
    expected = ndimage.gaussian_filter(signed, 0.7, axes=(1, 2), mode="nearest", truncate=4)
    np.testing.assert_allclose(found.map, expected, atol=1e-4)
    assert 0.1 < (expected < 0).mean() < 0.9
    np.testing.assert_allclose(found.healthy, np.full((2, 12, 10, 2), guided), atol=1e-4)
    np.testing.assert_array_equal(found.spread, 0)


def test_noise_cancels_in_the_mean_and_draws_give_a_spread(images):
    """A denoiser that takes the noise for a part of the slice has a residual of noise, which cancels in the mean."""
    noisy = Denoisers(None, lambda x, t: (jnp.zeros_like(x), jnp.zeros_like(x)))
    zero = jnp.zeros_like(images)
    means = []
    for draws in (1, 64):
        settings = ResidualSettings((200,), draws=draws, smoothing=0)
        found = residual(PROCESS, noisy, zero, noise(images), settings)
        assert settings.passes == 2 * draws
        means.append(float(np.maximum(found.map, 0).mean()))
    assert means[1] < means[0] / 5  # 1 / 8 of the noise remains; if rectified one by one, all would remain
    deviation = np.sqrt(1 / PROCESS.schedule.alpha_bar[200] - 1)
    assert float(found.spread.mean()) == pytest.approx(deviation, rel=0.1)


def test_further_rounds_fill_in_what_was_found():
    """A denoiser that halves bright values finds half of a lesion in one round and three quarters in two."""
    half = lambda x, t: PROCESS.eps_from_x0(x, t, jnp.maximum(x, 0) / 2)
    denoisers = Denoisers(None, lambda x, t: (half(x, t), half(x, t)))
    x0 = jnp.zeros((1, 6, 6, 2)).at[0, 2:4, 2:4].set(0.8).at[0, 5, 5].set(-0.4)
    seen = []
    for rounds in (1, 2, 3):
        settings = ResidualSettings((1,), rounds=rounds, modality=(1,), weights=(1.0,), smoothing=0)
        found = residual(PROCESS, denoisers, x0, lambda i: jnp.zeros_like(x0), settings)
        assert settings.passes == 2 * rounds
        seen.append(float(found.map[0, 2, 2]))
        np.testing.assert_allclose(found.map[0, 5, 5], -0.4, atol=1e-3)
    np.testing.assert_allclose(seen, [0.4, 0.6, 0.7], atol=1e-3)


@pytest.mark.parametrize(("rectify", "expected"), [("after", 0), ("before", 0.1), ("never", 0.2)])
def test_where_the_sign_goes(rectify, expected):
    """The residual is 0.2 at one timestep and -0.2 at the other."""
    level = lambda t: jnp.where(t == 50, -0.2, 0.2)[:, None, None, None]
    eps = lambda x, t: PROCESS.eps_from_x0(x, t, jnp.broadcast_to(level(t), x.shape))
    zero = jnp.zeros((1, 6, 6, 2))
    settings = ResidualSettings((50, 150), modality=(1,), weights=(1.0,), smoothing=0.5, rectify=rectify)
    found = residual(PROCESS, Denoisers(None, lambda x, t: (eps(x, t), eps(x, t))), zero, noise(zero), settings)
    np.testing.assert_allclose(found.map, np.full((1, 6, 6), expected), atol=1e-4)
    np.testing.assert_allclose(found.healthy, np.zeros((1, 6, 6, 1)), atol=1e-4)


@pytest.mark.parametrize(("fields", "message"), [
    ({"rounds": 0}, r"translation\.rounds is 0"),
    ({"weights": (1, 2)}, "one number for each channel"), ({"weights": (0,)}, "not all 0")])
def test_settings_that_cannot_be_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        ResidualSettings(**fields)
