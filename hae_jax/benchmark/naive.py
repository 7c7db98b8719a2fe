"""Network and translation as they are usually written: what each of our savings is measured against.

A naive piece computes the same numbers as the function that it stands in for (`tests/benchmark/test_naive.py`). It is
swapped in while a program is traced, and only there: nothing outside the benchmark knows of it.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp

from hae_jax.diffusion.process import Denoiser, Process
from hae_jax.errors import UserError
from hae_jax.localization import forward_process
from hae_jax.localization.forward_process import HEALTHY, ForwardSettings, Translation
from hae_jax.model import UNetConfig, attention, layers, sparse
from hae_jax.model.conditioning import Context
from hae_jax.ops import group_norm


def attend_with_context(
    q: jax.Array,  # [B, T, h, d]
    k: jax.Array,  # [B, T, h, d]
    v: jax.Array,  # [B, T, h, d]
    context: Context | None,
    kernel: jax.Array,  # [E, h * 2 * d], head-major: each head's k, then its v
    bias: jax.Array,  # [h * 2 * d]
) -> jax.Array:  # [B, T, h, d]
    """The context as E x E product, then as E more keys and values, in one softmax over E + T tokens."""
    batch, _, heads, depth = q.shape
    if context is not None:
        c = context.c.astype(q.dtype)
        product = c[:, :, None] * c[:, None, :]  # [B, E, E]
        projected = product @ kernel.astype(q.dtype) + bias.astype(q.dtype)
        projected = projected.reshape(batch, -1, heads, 2, depth)
        k = jnp.concatenate([projected[:, :, :, 0], k], axis=1)
        v = jnp.concatenate([projected[:, :, :, 1], v], axis=1)
    scale = depth**-0.25
    scores = jnp.einsum("bthd,bshd->bhts", q * scale, k * scale, preferred_element_type=jnp.float32)
    if context is not None:
        is_pixel = jnp.arange(k.shape[1]) >= context.c.shape[1]
        scores = jnp.where(context.seen[:, None, None, None] | is_pixel, scores, -jnp.inf)
    weights = jax.nn.softmax(scores).astype(v.dtype)
    return jnp.einsum("bhts,bshd->bthd", weights, v)


def attend_blocks(
    q: jax.Array,  # [B, N, h, d]
    k: jax.Array,  # [B, N, h, d]
    v: jax.Array,  # [B, N, h, d]
    links: jax.Array,  # [blocks, seen] int32
    drop: sparse.Drop | None = None,
) -> jax.Array:  # [B, N, h, d]
    """Dense attention behind an N x N mask that says the same as the links."""
    tokens, blocks = q.shape[1], len(links)
    seen = jnp.zeros((blocks, blocks), bool).at[jnp.arange(blocks)[:, None], links].set(True)
    size = sparse.block_size(tokens)
    seen = jnp.repeat(jnp.repeat(seen, size, axis=0), size, axis=1)[:tokens, :tokens]
    return sparse.attend(q, k, v, ~seen, drop)


def conv2d(
    x: jax.Array,  # [B, H, W, C]
    kernel: jax.Array,  # [kh, kw, C, D]
    stride: int = 1,
    padding: int = 0,
) -> jax.Array:  # [B, H', W', D]
    """XLA's convolution and its own gradients, whatever the device."""
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), ((padding, padding),) * 2,
                                        dimension_numbers=("NHWC", "HWIO", "NHWC"))


def plain_group_norm(
    x: jax.Array,  # [B, H, W, C]
    gain: jax.Array,  # [B, C] float32
    offset: jax.Array,  # [B, C] float32
    groups: int,
    epsilon: float,
    silu: bool,
    dtype: jnp.dtype,
) -> jax.Array:  # [B, H, W, C], dtype
    """The mean, then the variance, then norm and SiLU apart, and the gradients of automatic differentiation."""
    grouped = x.astype(jnp.float32).reshape(*x.shape[:3], groups, -1)
    mean, variance = (f(grouped, (1, 2, 4), keepdims=True) for f in (jnp.mean, jnp.var))
    n = ((grouped - mean) * jax.lax.rsqrt(variance + epsilon)).reshape(x.shape)
    z = (n * gain[:, None, None] + offset[:, None, None]).astype(dtype)
    return jax.nn.silu(z) if silu else z


class SeparateDenoisers(NamedTuple):
    """`forward_process.Denoisers` without stacking; t are original timesteps."""

    null: Denoiser
    healthy_and_null: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
    healthy: Denoiser


def separate_denoisers(model: Callable[..., jax.Array]) -> SeparateDenoisers:
    """A pass for each condition, and an embedding of the timestep for each slice."""

    def healthy(x, t):
        return model(x, _rows(x, t), jnp.full(len(x), HEALTHY))

    def null(x, t):
        return model(x, _rows(x, t), null=True)

    return SeparateDenoisers(null, lambda x, t: (healthy(x, t), null(x, t)), healthy)


def _rows(x: jax.Array, t: jax.Array) -> jax.Array:  # [B, ...], [B] or [1] -> [B]
    return jnp.broadcast_to(t, x.shape[:1])


def predictions(
    process: Process, denoisers: SeparateDenoisers, x: jax.Array, t: jax.Array, settings: ForwardSettings
) -> tuple[jax.Array, jax.Array]:  # [B, H, W, C] each
    """The guided prediction of x0 and, with a pass of its own, the reference."""
    steps = process.original(t)
    healthy, null = denoisers.healthy_and_null(x, steps)
    guided = forward_process.guided_output(healthy, null, settings.guidance)
    # Made to depend on the passes before, or XLA would see that one of them is repeated and leave it out. An
    # optimisation barrier does not stop it; zero times a number that might be infinite must be computed.
    again = x + 0 * guided[..., :x.shape[-1]]
    reference = (denoisers.healthy if settings.reference == "healthy" else denoisers.null)(again, steps)
    return process.predict(guided, x, t).x0, process.predict(reference, x, t).x0


def stacking_walk(
    process: Process,
    denoisers: SeparateDenoisers,
    x0: jax.Array,  # [B, H, W, C]
    noise: Callable[[jax.Array], jax.Array],
    settings: ForwardSettings,
    counts: Callable[..., jax.Array],
) -> Translation:
    """Both predictions of every step are stored, [T, B, H, W, M], and curves and maps read off the stacks.

    Only for the published maps: `settings` has its defaults for those. `counts` chooses t_e while walking, and has no
    use here.
    """
    modality = jnp.asarray(settings.modality)

    def step(x, t):
        rows = jnp.full(x.shape[0], t)
        both = forward_process._predictions(process, denoisers, x, rows, settings)
        return forward_process._next(process, denoisers, x, x0, rows + 1, noise, settings), both

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


class _Piece(NamedTuple):
    """A saving: which functions it consists of, each with its naive form, and where it matters."""

    swaps: tuple[tuple[ModuleType, str, Callable], ...]
    changes: Callable[[UNetConfig], bool]  # whether it makes a difference to this network
    translation_only: bool = False


_PIECES = {
    "context": _Piece(((attention, "attend_with_context", attend_with_context),),
                      lambda network: network.num_classes is not None),
    "sparse": _Piece(((sparse, "attend_blocks", attend_blocks),),
                     lambda network: bool(network.rules.hybrid and network.use_hae
                                          and network.sparse_pattern == "blocks")),
    "convolution": _Piece(((layers, "conv2d", conv2d),), lambda network: True),
    "norm": _Piece(((group_norm, "group_norm", plain_group_norm),), lambda network: True),
    "passes": _Piece(((forward_process, "network_denoisers", separate_denoisers),
                      (forward_process, "_predictions", predictions)),
                     lambda network: network.num_classes is not None, translation_only=True),
    "stacks": _Piece(((forward_process, "_walk", stacking_walk),), lambda network: True, translation_only=True),
}
PIECES = tuple(_PIECES)


def pieces_of(baseline: str, network: UNetConfig, *, translation: bool) -> tuple[str, ...]:
    """The pieces that a baseline makes naive in a program; empty where it makes no difference.

    Args:
      baseline: "naive" for all of them, or the name of one.
      network: the program's network.
      translation: whether the program is a translation.

    Raises:
      UserError: for an unknown name.
    """
    if baseline not in ("naive", *PIECES):
        raise UserError(f"--baseline {baseline}: choose among naive, {', '.join(PIECES)}, none")
    return tuple(name for name, piece in _PIECES.items() if baseline in ("naive", name)
                 and piece.changes(network) and (translation or not piece.translation_only))


@contextlib.contextmanager
def swapped_in(pieces: Sequence[str]) -> Iterator[None]:
    """While it lasts, programs are traced with these pieces naive. What was traced before keeps its form.

    Functions that have been traced must be made anew, since JAX keeps what it has traced by function.
    """
    with contextlib.ExitStack() as stack:
        for name in pieces:
            for module, attribute, function in _PIECES[name].swaps:
                stack.enter_context(mock.patch.object(module, attribute, function))
        yield
