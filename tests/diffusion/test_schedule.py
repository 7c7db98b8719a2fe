"""Schedules and respacing against the reference values."""

import numpy as np
import pytest

from hae_jax.diffusion.schedule import make_schedule, retained_timesteps
from hae_jax.errors import UserError


@pytest.fixture(scope="module")
def reference(golden):
    return np.load(golden / "diffusion.npz")


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize(("ours", "theirs"), [
    ("betas", "betas"),
    ("alpha_bar", "alphas_cumprod"),
    ("alpha_bar_prev", "alphas_cumprod_prev"),
    ("alpha_bar_next", "alphas_cumprod_next"),
    ("posterior_variance", "posterior_variance"),
    ("posterior_log_variance", "posterior_log_variance_clipped"),
    ("posterior_coef_x0", "posterior_mean_coef1"),
    ("posterior_coef_xt", "posterior_mean_coef2"),
])
def test_constants_equal_the_reference(reference, name, ours, theirs):
    schedule = make_schedule(name, 100)
    np.testing.assert_allclose(getattr(schedule, ours), reference[f"{name}_{theirs}"], rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize(("respacing", "key"), [("20", "respaced20"), ("ddim20", "ddim20")])
def test_respacing_equals_the_reference(reference, respacing, key):
    schedule = make_schedule("linear", 100, respacing)
    np.testing.assert_array_equal(schedule.timesteps, reference[f"{key}_timesteps"])
    np.testing.assert_allclose(schedule.betas, reference[f"{key}_betas"], rtol=1e-10)


def test_sections_are_respaced_one_by_one():
    kept = retained_timesteps(300, "10,15,20")
    assert [int(((kept >= lo) & (kept < lo + 100)).sum()) for lo in (0, 100, 200)] == [10, 15, 20]
    assert kept[0] == 0
    assert kept[-1] == 299


def test_positions_on_a_half_round_to_even():
    # 3 of 6 steps: positions 0, 2.5, 5.
    np.testing.assert_array_equal(retained_timesteps(6, "3"), [0, 2, 5])


def test_respaced_alpha_bars_are_the_original_ones_at_the_kept_steps():
    full, kept = make_schedule("cosine", 1000), make_schedule("cosine", 1000, "37")
    np.testing.assert_allclose(kept.alpha_bar, full.alpha_bar[kept.timesteps], rtol=1e-10)


@pytest.mark.parametrize("respacing", ["0", "x", "10,", "2000", "ddim999"])
def test_impossible_respacing_names_the_field(respacing):
    with pytest.raises(UserError, match=r"translation\.respacing"):
        make_schedule("linear", 1000, respacing)


def test_unknown_schedule_names_the_choices():
    with pytest.raises(UserError, match="linear, cosine or single"):
        make_schedule("sigmoid")


def test_the_single_step_of_a_denoising_autoencoder():
    """Its noise is 0.4 in the range [-1, 1], which is 0.2 in the range [0, 1]."""
    schedule = make_schedule("single", 1)
    assert np.sqrt((1 - schedule.alpha_bar) / schedule.alpha_bar) == pytest.approx(0.4)
    with pytest.raises(UserError, match=r"diffusion\.steps is 2: the schedule single has 1"):
        make_schedule("single", 2)
