"""The forward process against the reference's stored stacks, and its required properties."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hae_jax.diffusion.process import Process
from hae_jax.diffusion.schedule import make_schedule
from hae_jax.errors import UserError
from hae_jax.localization.denoisers import Denoisers, network_denoisers, step_noise
from hae_jax.localization.forward_process import ForwardSettings, forward_process
from hae_jax.model import UNet, UNetConfig

PROCESS = Process(make_schedule("linear", 100))
SETTINGS = ForwardSettings(steps=60, guidance=2.0, modality=(0, 3))


def toy_eps(x, t, shift):
    return 0.3 * x + 0.1 * jnp.sin(t / 20)[:, None, None, None] + shift


def toy_denoisers(shift=0.05):
    """The reference's toy network. The class healthy adds 0.05, and the null condition adds nothing."""
    return Denoisers(lambda x, t: toy_eps(x, t, 0), lambda x, t: (toy_eps(x, t, shift), toy_eps(x, t, 0)))


def peaked_denoisers():
    """Denoisers whose outputs differ most at a step that depends on the slice. The peak is larger than rounding."""
    def shift(x, t):
        centre = 30 + 100 * x.mean((1, 2), keepdims=True)
        return 0.2 * jnp.exp(-jnp.square((t[:, None, None, None] - centre) / 6))

    return Denoisers(lambda x, t: toy_eps(x, t, 0), lambda x, t: (toy_eps(x, t, shift(x, t)), toy_eps(x, t, 0)))


@pytest.fixture(scope="module")
def case(golden):
    data = np.load(golden / "diffusion.npz")
    nhwc = lambda a: jnp.asarray(np.moveaxis(a, -3, -1))
    return {k: nhwc(data[k]) for k in data.files if k in ("x0", "noise") or k.startswith("fpdm_xstart")}


def run(case, denoisers=None, **changes):
    settings, denoisers = dataclasses.replace(SETTINGS, **changes), denoisers or toy_denoisers()
    function = lambda x0: forward_process(PROCESS, denoisers, x0, lambda t: case["noise"], settings)
    return jax.jit(function)(case["x0"])


def test_a_network_is_asked_for_healthy_and_null_with_one_time_for_all():
    asked = []

    def network(x, t, y=None, null=None):
        asked.append((x.shape, t.shape, y, null))
        return 0.1 * x

    x0, denoisers = jnp.ones((3, 4, 4, 4)), network_denoisers(network)
    forward_process(PROCESS, denoisers, x0, lambda t: 0 * x0, SETTINGS)
    assert {(shape, times) for shape, times, _, _ in asked} == {
        ((3, 4, 4, 4), (1,)), ((6, 4, 4, 4), (1,))}  # one time embedding per step
    asked.clear()
    null_alone, both = denoisers[:2]
    null_alone(x0, jnp.zeros(1, int))
    both(x0, jnp.zeros(1, int))
    (_, _, _, null), (_, _, y, nulls) = asked
    assert null is True
    np.testing.assert_array_equal(y, 0)  # healthy
    np.testing.assert_array_equal(nulls, [False] * 3 + [True] * 3)


@pytest.mark.parametrize(("d_reverse", "key"), [(True, "ddim"), (False, "ddpm")])
def test_equals_the_stored_stacks(case, d_reverse, key):
    result = run(case, d_reverse=d_reverse)
    guided, reference = case[f"fpdm_xstart_{key}"], case[f"fpdm_xstart_null_{key}"]  # [B, T, H, W, M]
    x = case["x0"][:, None][..., jnp.array([0, 3])]
    for ours, a, b in ((result.mse, guided, x), (result.ref, reference, x), (result.diff, guided, reference)):
        np.testing.assert_allclose(ours, jnp.square(a - b).mean((2, 3)), rtol=1e-4, atol=1e-7)
    stacked = np.square(np.asarray(guided - x))
    diff = np.asarray(jnp.square(guided - reference).mean((2, 3)))
    for b in range(3):
        for m in range(2):
            # If two steps are equal up to rounding, either can be chosen. The map must belong to the chosen step.
            t_e = int(result.t_e[b, m])
            assert diff[b, t_e, m] >= diff[b, :, m].max() * (1 - 1e-5)
            expected = stacked[b, :max(t_e, 1), :, :, m].mean(0)
            np.testing.assert_allclose(result.map[b, :, :, m], expected, rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(result.healthy[b, :, :, m], guided[b, t_e, :, :, m], atol=1e-5)


@pytest.mark.parametrize("guidance", [0, 0.0, None])
@pytest.mark.parametrize("d_reverse", [True, False])
def test_without_guidance_there_is_no_difference_from_the_healthy_reference(case, guidance, d_reverse):
    result = run(case, guidance=guidance, d_reverse=d_reverse)
    np.testing.assert_allclose(result.diff, 0, atol=1e-10)  # squares
    np.testing.assert_allclose(result.mse, result.ref, rtol=1e-5)
    if guidance is None:  # both predictions are the same
        assert not np.any(result.diff)
        assert not np.any(result.t_e)  # nothing is strictly larger than the first step


def test_the_null_reference_is_another_prediction(case):
    assert not np.allclose(run(case, reference="null").ref, run(case).ref)


def test_permuting_slices_permutes_results(case):
    order = jnp.array([2, 0, 1])
    whole, permuted = (run(part, peaked_denoisers()) for part in (case, {k: v[order] for k, v in case.items()}))
    assert len(np.unique(whole.t_e)) > 3
    for a, b in zip(whole, permuted, strict=True):
        np.testing.assert_allclose(a[order], b, rtol=0, atol=1e-5)


def test_memory_does_not_grow_with_the_steps():
    x0 = jnp.zeros((2, 16, 16, 4))

    def temporary_bytes(steps):
        settings = dataclasses.replace(SETTINGS, steps=steps)
        function = lambda x: forward_process(PROCESS, toy_denoisers(), x, lambda t: x, settings)
        return jax.jit(function).lower(x0).compile().memory_analysis().temp_size_in_bytes

    # Only the curves may grow with the steps: 3 x B x M floats per step.
    assert temporary_bytes(90) - temporary_bytes(10) <= 80 * 3 * 2 * 2 * 4 * 2


def test_the_loop_overwrites_its_carries():
    """x, two sums and the reconstruction are updated in place, so that a step needs no second copy of them."""
    x0 = jnp.zeros((2, 64, 64, 4))
    function = lambda x: forward_process(PROCESS, toy_denoisers(), x, lambda t: x, SETTINGS)
    program = jax.jit(function).lower(x0).compile()
    carries = x0.nbytes + 3 * x0.nbytes // 2  # the maps have two of four channels
    assert program.memory_analysis().temp_size_in_bytes < 1.9 * carries


def test_the_noise_of_a_slice_is_its_own_at_each_step():
    keys = jax.random.split(jax.random.key(3), 4)
    noise = step_noise(keys, (5, 6, 2))
    expected = [jax.random.normal(jax.random.fold_in(key, 7), (5, 6, 2)) for key in keys]
    np.testing.assert_allclose(noise(jnp.int32(7)), jnp.stack(expected), atol=1e-5)
    np.testing.assert_allclose(step_noise(keys[2:], (5, 6, 2))(7), noise(7)[2:], atol=1e-5)
    assert not np.allclose(noise(7), noise(8))


def test_a_network_without_classes_is_not_asked_for_any():
    x, t = jnp.ones((2, 4, 4, 1)), jnp.array([3, 4])
    denoisers = network_denoisers(lambda x, t: x * t[:, None, None, None], conditional=False)
    np.testing.assert_array_equal(denoisers.null(x, t)[:, 0, 0, 0], [3, 4])
    assert denoisers.healthy_and_null is None


@pytest.mark.parametrize("bad", [
    {"steps": 0}, {"reference": "paper"}, {"modality": ()}, {"modality": (0, 0)}, {"guidance": -1.0},
    {"guidance": float("nan")}, {"maps": "mean"}, {"t_e_ratio": 0}, {"t_e_ratio": float("inf")}, {"every": 0},
    {"every": 2, "last_step_only": True}])
def test_impossible_settings_name_the_field(bad):
    field = "forward_steps" if "steps" in bad else next(iter(bad))
    with pytest.raises(UserError, match=rf"translation\.{field} "):
        dataclasses.replace(SETTINGS, **bad)


def test_a_bfloat16_network_is_walked_in_float32():
    """Its outputs are rounded, but the sums over steps are not. So results are close to those in float32."""
    def walked(dtype):
        network = UNetConfig(variant="hae_v2c", image_size=16, model_channels=32, channel_mult=(1,), num_res_blocks=1,
                             attention_resolutions=(), num_classes=2, use_scale_shift_norm=True, dtype=dtype)
        graph, shapes = nnx.split(nnx.eval_shape(lambda: UNet(network, rngs=nnx.Rngs(0))))
        rng = np.random.default_rng(0)
        params = jax.tree.map(lambda a: jnp.asarray(rng.normal(0, 0.05, a.shape), jnp.float32), shapes)
        x0 = jnp.asarray(rng.uniform(-1, 1, (2, 16, 16, 4)), jnp.float32)
        denoisers = network_denoisers(nnx.merge(graph, params))
        return forward_process(PROCESS, denoisers, x0, lambda t: jnp.ones_like(x0), SETTINGS)

    exact, rounded = jax.jit(walked, static_argnums=0)("float32"), jax.jit(walked, static_argnums=0)("bfloat16")
    for name in ("mse", "ref", "diff", "map", "healthy"):
        a, b = getattr(rounded, name), getattr(exact, name)
        assert a.dtype == jnp.float32
        assert 0 < jnp.abs(a - b).max() < 0.1 * jnp.abs(b).max(), name
