"""Naive forms of network and translation, the baseline of the benchmark.

A naive piece computes the same values as the piece that it replaces (`tests/benchmark/test_naive.py`). The network's
naive pieces are forms that its config selects. The translation's naive piece and the plain norm are in this module.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hae_jax.diffusion.process import Process
from hae_jax.errors import UserError
from hae_jax.localization.denoisers import HEALTHY, guided_output
from hae_jax.localization.forward_process import ForwardSettings, Translation
from hae_jax.model import UNetConfig
from hae_jax.ops.forms import convolution_form

NAIVE = "naive"  # all pieces together
TRANSLATION = "translation"
_FIELDS = {"attention": "materialised", "convolution": "xla"}  # of the network
PIECES = (*_FIELDS, TRANSLATION)


def pieces_of(baseline: str, network: UNetConfig, *, translation: bool) -> tuple[str, ...]:
    """The pieces that a baseline makes naive in a program; empty if it changes nothing.

    Args:
      baseline: "naive" for all of them, or the name of one.
      network: the program's network.
      translation: whether the program is a translation.

    Raises:
      UserError: for an unknown name.
    """
    if baseline not in (NAIVE, *PIECES):
        raise UserError(f"--baseline {baseline}: choose among {NAIVE}, {', '.join(PIECES)}, none")
    changes = {"attention": network.attention != "materialised",
               "convolution": convolution_form(network.convolution) != "xla", TRANSLATION: translation}
    return tuple(name for name in PIECES if baseline in (NAIVE, name) and changes[name])


def fields_of(pieces: tuple[str, ...]) -> dict[str, str]:
    """The fields of the network's config that make these pieces naive."""
    return {name: value for name, value in _FIELDS.items() if name in pieces}


def plain_group_norm(
    x: jax.Array,  # [B, H, W, C]
    gain: jax.Array,  # [B, C] float32
    offset: jax.Array,  # [B, C] float32
    groups: int,
    epsilon: float,
    silu: bool,
    dtype: jnp.dtype,
) -> jax.Array:  # [B, H, W, C], dtype
    """Computes mean, variance, norm and SiLU one after the other, with gradients by automatic differentiation."""
    grouped = x.astype(jnp.float32).reshape(*x.shape[:3], groups, -1)
    mean, variance = (f(grouped, (1, 2, 4), keepdims=True) for f in (jnp.mean, jnp.var))
    n = ((grouped - mean) * jax.lax.rsqrt(variance + epsilon)).reshape(x.shape)
    z = (n * gain[:, None, None] + offset[:, None, None]).astype(dtype)
    return jax.nn.silu(z) if silu else z


def translate(
    process: Process,
    model: Callable[..., jax.Array],  # (x, t, y, null=...) -> output
    x0: jax.Array,  # [B, H, W, C]
    noise: Callable[[jax.Array], jax.Array],
    settings: ForwardSettings,
) -> Translation:
    """The forward process with four passes per step and all predictions stored, [T, B, H, W, M].

    Each condition has a separate pass, and each slice a separate embedding of the timestep. It makes only the published
    maps, for the default `settings` of maps.
    """
    modality = jnp.asarray(settings.modality)

    def step(x, t):
        rows = jnp.full(len(x), t)
        both = _predictions(process, model, x, rows, settings)
        return _next(process, model, x, x0, rows + 1, noise, settings), both

    first = process.noised(x0, jnp.zeros(len(x0), jnp.int32), noise(jnp.int32(0)))
    _, stacks = jax.lax.scan(step, first, jnp.arange(settings.steps))
    guided, reference = (stack[..., modality] for stack in stacks)
    x = x0[..., modality]
    errors = jnp.square(guided - x)
    mse, ref, diff = (jnp.moveaxis(square.mean((2, 3)), 0, 1)
                      for square in (errors, jnp.square(reference - x), jnp.square(guided - reference)))
    t_e = jnp.argmax(diff, axis=1)  # [B, M]
    count = jnp.maximum(t_e, 1)
    averaged = jnp.arange(settings.steps)[:, None, None] < count
    total = jnp.where(averaged[:, :, None, None], errors, 0).sum(0)
    healthy = jnp.take_along_axis(guided, t_e[None, :, None, None, :], axis=0)[0]
    return Translation(mse, ref, diff, total / count[:, None, None], t_e, healthy)


def _predictions(process, model, x, t, settings) -> tuple[Any, Any]:
    """The guided prediction of x0 and, with a separate pass, the reference."""
    original = process.original(t)
    healthy, null = _healthy(model, x, original), model(x, original, null=True)
    guided = guided_output(healthy, null, settings.guidance)
    # The input depends on the earlier passes, since XLA would otherwise remove the repeated pass. An optimisation
    # barrier does not prevent this. Zero times a number must be computed, since the number might be infinite.
    again = x + 0 * guided[..., :x.shape[-1]]
    reference = (_healthy(model, again, original) if settings.reference == "healthy"
                 else model(again, original, null=True))
    return process.predict(guided, x, t).x0, process.predict(reference, x, t).x0


def _next(process, model, x, x0, t, noise, settings) -> jax.Array:
    """x at step t."""
    if not settings.d_reverse:
        return process.noised(x0, t, noise(t[0]))
    level = t if settings.inversion == "published" else t - 1
    return process.ddim_inversion_step(process.predict(model(x, process.original(level), null=True), x, level), level)


def _healthy(model, x, t) -> jax.Array:
    return model(x, t, jnp.full(len(x), HEALTHY))
