"""What all methods share: the network's outputs, the noise of each slice, and checks of settings.

Source of the guidance: Ho and Salimans 2022, arXiv:2207.12598.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from hae_jax.diffusion.noise import gaussian
from hae_jax.diffusion.process import Denoiser, guide
from hae_jax.errors import UserError

HEALTHY = 0  # the class label


class Denoisers(NamedTuple):
    """The network's outputs for a translation. t has original timesteps, [B] or, with one for all slices, [1]."""

    null: Denoiser  # (x, t) -> output under the null condition
    # (x, t) -> both outputs, from one stacked pass; None for a network without classes
    healthy_and_null: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]] | None
    classifier: Callable[[jax.Array, jax.Array], jax.Array] | None = None  # (x, t) -> logits [B, classes]


class GivenDenoisers(nnx.Module):
    """Denoisers without parameters, in place of a network."""

    def __init__(self, denoisers: Denoisers):
        self.denoisers = nnx.static(denoisers) if hasattr(nnx, "static") else denoisers


def network_denoisers(model: Callable[..., jax.Array], conditional: bool = True) -> Denoisers:
    """The denoisers of a network: `model(x, t, y, null=...)`, or `model(x, t)` if it is not class-conditional.

    Denoisers of a `hae_jax.model.classifier.GuidedNetwork` include its classifier.
    """
    if isinstance(model, GivenDenoisers):
        return model.denoisers
    classifier = getattr(model, "classifier", None)
    if not conditional:
        return Denoisers(model, None, classifier)

    def healthy_and_null(x, t):
        y = jnp.full(2 * len(x), HEALTHY)
        null = jnp.arange(2 * len(x)) >= len(x)
        both = t if len(t) == 1 else jnp.concatenate([t, t])
        out = model(jnp.concatenate([x, x]), both, y, null=null)
        return out[:len(x)], out[len(x):]

    return Denoisers(lambda x, t: model(x, t, null=True), healthy_and_null, classifier)


def step_noise(
    keys: jax.Array,  # [B] keys, one for each slice
    shape: tuple[int, ...],  # of one slice
) -> Callable[[jax.Array], jax.Array]:  # step () -> [B, *shape]
    """Gaussian noise for each step. The noise of a slice depends only on its own key."""
    return lambda step: gaussian(step_keys(keys, step), shape)


def step_keys(keys: jax.Array, step: int | jax.Array) -> jax.Array:  # [B], () -> [B]
    """Each slice's key for a step."""
    return jax.vmap(lambda key: jax.random.fold_in(key, step))(keys)


def guided_output(healthy: jax.Array, null: jax.Array, guidance: float | None) -> jax.Array:  # [B, H, W, C]
    """(1 + w) f(x, t, healthy) - w f(x, t, null) (Ho and Salimans 2022, eq. 6); with w None, f(x, t, healthy)."""
    return healthy if guidance is None else guide(healthy, null, guidance)


def check_choice(field: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raises a UserError for a value of `translation.<field>` that is none of the choices."""
    if value not in choices:
        raise UserError(f"translation.{field} is {value!r}: choose {', '.join(choices[:-1])} or {choices[-1]}")


def check_guidance(guidance: float | None) -> None:
    """Raises a UserError for a negative or infinite guidance strength."""
    if guidance is not None and not (guidance >= 0 and math.isfinite(guidance)):
        raise UserError(f"translation.guidance is {guidance}: give a strength of at least 0, which is no guidance")


def check_modality(modality: tuple[int, ...]) -> None:
    """Raises a UserError unless these are different channel numbers."""
    if not modality or min(modality) < 0 or len(set(modality)) != len(modality):
        raise UserError(f"translation.modality is {modality}: give different channel numbers from 0")
