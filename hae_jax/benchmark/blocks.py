"""Benchmark of single blocks of the network, each in our form and in others."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from hae_jax.benchmark import naive
from hae_jax.benchmark.measure import compile_program, in_turns, sharing_memory
from hae_jax.benchmark.naive import NAIVE
from hae_jax.benchmark.results import OURS, Row
from hae_jax.diffusion.noise import gaussian, simplex
from hae_jax.model import UNetConfig, attention, layers, sparse
from hae_jax.model.conditioning import Context
from hae_jax.model.config import HYBRID_HEADS, NORM_GROUPS
from hae_jax.model.flops import TRAINING_FACTOR, count_flops
from hae_jax.model.hybrid import MultiHeadAttention
from hae_jax.ops import group_norm
from hae_jax.ops.convolution import conv2d
from hae_jax.ops.forms import attention_form, convolution_form
from hae_jax.ops.threefry import dropped
from hae_jax.training.mesh import batch_sharding, make_mesh, replicated

_HEADS = 4  # of the attention block
_DROPOUT = 0.1
_SIZES = {  # those of the full network at 128 px, or (64 channels) of a network with half the width
    "attention": (32, 256),  # pixels on a side, channels
    "sparse": (4096 + 256 + 64, 16),  # tokens of all patch sizes together, numbers in a head
    "patches": (4096, 16),  # likewise, for the smallest patches only
    "convolutions": (  # side of the kernel, pixels, channels in and out
        (3, 128, 128, 128), (3, 128, 256, 128), (3, 128, 64, 64), (3, 64, 128, 128), (3, 64, 384, 128),
        (3, 32, 256, 256), (3, 32, 512, 256), (3, 16, 384, 384), (3, 16, 768, 384), (3, 8, 512, 512), (3, 8, 1024, 512),
        (3, 128, 4, 128), (3, 128, 128, 4), (1, 128, 256, 128)),
    "norm": (128, 128),  # pixels, channels; also for the dropout
    "noise": (128, 4),
}


class Block(NamedTuple):
    """A block of the network in several forms.

    Attributes:
      name: the block's name with its size.
      forms: functions of `params` and `inputs`, one of them `OURS`. The others are compared with the first.
      params: parameters, replicated on all devices.
      inputs: arrays [B, ...], split over the devices.
      has_gradients: whether gradients are measured.
      counted: the form whose operations are used for the speed.
    """

    name: str
    forms: dict[str, Callable[..., jax.Array]]
    params: Any
    inputs: tuple[jax.Array, ...]
    has_gradients: bool = True
    counted: str = OURS

    def placed(self, mesh: Mesh) -> tuple[Any, ...]:
        """The arguments of the forms, on the devices."""
        return jax.device_put(self.params, replicated(mesh)), *jax.device_put(self.inputs, batch_sharding(mesh))


def measure_blocks(batch: int, dtype: str, repeats: int, mesh: Mesh, say: Callable[[str], None] = print) -> list[Row]:
    """Times the forms of each block in turns, forward and with gradients. Memory is that of XLA's plan.

    Args:
      batch: images per call, divisible by the number of devices. Only the sparse attention has one, on one device.
      repeats: number of turns.
      say: function that gets progress messages.
    """
    return [row for block in blocks(batch, dtype) for gradients in (False, True)[:1 + block.has_gradients]
            for row in _rows(block, gradients, repeats, mesh, say)]


def _rows(block: Block, gradients: bool, repeats: int, mesh: Mesh, say: Callable[[str], None]) -> list[Row]:
    images, forms = len(block.inputs[0]), block.forms.values()
    mesh = mesh if images % mesh.size == 0 else make_mesh(devices=[mesh.devices.flat[0]])
    arguments = block.placed(mesh)
    name = f"{block.name}, {'with gradients' if gradients else 'forward'}"
    say(f"blocks: {name}")
    programs = [compile_program(lambda f=f: jax.jit(with_gradients(f) if gradients else f).lower(*arguments),
                                sharing_memory(mesh)) for f in forms]
    turns = in_turns([lambda p=program: p.executable(*arguments) for program in programs], repeats)
    flops = [(TRAINING_FACTOR if gradients else 1) * count_flops(f, *arguments) for f in forms]
    times = [float(np.median(turn / turns[0])) for turn in turns]
    first = programs[0].memory
    memories = [program.memory / first if program.memory and first else None for program in programs]
    counted = list(block.forms).index(block.counted)
    return [Row("blocks", name, form, turns[i].tolist(), images, flops[i], flops[counted],
                programs[i].memory, programs[i].seconds, times[i], memories[i]) for i, form in enumerate(block.forms)]


def with_gradients(f: Callable[..., jax.Array]) -> Callable[..., Any]:
    """Output and gradients of |f|^2 / 2 for all arguments."""

    def both(*arguments):
        out, pull = jax.vjp(f, *arguments)
        return out, pull(out)

    return both


def blocks(batch: int, dtype: str) -> Iterator[Block]:
    """Yields all blocks in the sizes of the full network."""
    yield attention_block(batch, dtype)
    yield _sparse_attention(dtype)
    yield _sparse_layer(batch, dtype)
    for shape in _SIZES["convolutions"]:
        yield _convolution(batch, dtype, *shape)
    yield _norm(batch, dtype)
    yield _dropout(batch, dtype)
    yield simplex_noise(batch)


def attention_block(batch: int, dtype: str, form: str = "auto", *, small: bool = False) -> Block:
    """Attention over the largest map that has it: without context, ours, and with the context materialised.

    Args:
      form: of attention, for ours.
      small: of a size for rehearsals.
    """
    side, channels = (8, 32) if small else _SIZES["attention"]

    def call(form, sees_context):
        config = UNetConfig(dtype=dtype, attention=form)
        graph, params = _split(lambda: attention.AttentionBlock(channels, _HEADS, config, nnx.Rngs(0)))

        def run(params, x, c):
            context = Context(c, jnp.ones(len(c), bool)) if sees_context else None
            return nnx.merge(graph, params)(x, layers.Conditioning(emb=c, context=context))

        return run, params

    without, params = call(form, False)
    forms = {"no context": without, OURS: call(form, True)[0], NAIVE: call("materialised", True)[0]}
    inputs = _normal((batch, side, side, channels), dtype), _normal((batch, UNetConfig().embedding_width))
    return Block(f"attention at {side} px", forms, params, inputs)


def _sparse_attention(dtype: str) -> Block:
    tokens, depth = _SIZES["sparse"]
    q, k, v = (_normal((1, tokens, HYBRID_HEADS, depth), dtype, seed) for seed in range(3))

    def ours(_, q, k, v):
        links = sparse.block_links(tokens, jax.random.key(0))
        return sparse.attend_blocks(q, k, v, links, form=attention_form("auto", dtype))

    def dense(_, q, k, v):
        weights = jax.nn.softmax(jnp.einsum("bihd,bjhd->bhij", q, k) * depth**-0.5)
        return jnp.einsum("bhij,bjhd->bihd", weights, v)

    forms = {OURS: ours, "dense": dense, "dense by jax.nn": lambda _, *qkv: jax.nn.dot_product_attention(*qkv)}
    return Block(f"sparse attention, {tokens} tokens", forms, None, (q, k, v))


def smallest_patches(batch: int, dtype: str, form: str = "auto", *, small: bool = False) -> Block:
    """Sparse attention over the tokens of the smallest patches, without dropout. Arguments as `attention_block`."""
    tokens, depth = (256, 8) if small else _SIZES["patches"]
    qkv = [_normal((batch, tokens, HYBRID_HEADS, depth), dtype, seed) for seed in range(3)]

    def ours(_, q, k, v):
        links = sparse.block_links(tokens, jax.random.key(0))
        return sparse.attend_blocks(q, k, v, links, form=attention_form(form, dtype))

    return Block(f"sparse attention, {tokens} tokens", {OURS: ours}, None, tuple(qkv))


def _sparse_layer(batch: int, dtype: str) -> Block:
    """The sparse attention layer with its projections."""
    side, channels = _SIZES["attention"]
    forms = {}
    for form, pattern in ((OURS, "blocks"), ("dense", "dense")):
        config = UNetConfig(dtype=dtype, sparse_pattern=pattern)
        graph, params = _split(lambda config=config: MultiHeadAttention(channels, config, nnx.Rngs(0)))
        forms[form] = lambda params, x, graph=graph: nnx.merge(graph, params)(x, None, None, is_sparse=True)
    return Block(f"sparse layer, {side**2} tokens", forms, params, (_normal((batch, side**2, channels), dtype),))


def _convolution(batch: int, dtype: str, side: int, size: int, inputs: int, outputs: int) -> Block:
    """A convolution with a side x side kernel, compared with XLA's on every device."""
    x, kernel = _normal((batch, size, size, inputs), dtype), 0.1 * _normal((side, side, inputs, outputs), dtype)
    forms = {name: lambda kernel, x, form=form: conv2d(x, kernel, padding=side // 2, form=form)
             for name, form in ((OURS, convolution_form("auto")), ("xla", "xla"))}
    name = f"{side}x{side} convolution, {inputs} to {outputs} channels, {size} px"
    return Block(name, forms, kernel, (x,), counted="xla")


def _norm(batch: int, dtype: str) -> Block:
    """The norm with scale and shift of a timestep, and SiLU."""
    size, channels = _SIZES["norm"]

    def form(group_norm):
        return lambda _, x, gain, offset: group_norm(x, gain, offset, NORM_GROUPS, layers.EPSILON, True, x.dtype)

    inputs = _normal((batch, size, size, channels), dtype), *_normal((2, batch, channels))
    forms = {OURS: form(group_norm.group_norm), NAIVE: form(naive.plain_group_norm)}
    return Block(f"norm with SiLU, {channels} channels, {size} px", forms, None, inputs)


def _dropout(batch: int, dtype: str) -> Block:
    """Dropout, compared with a form that draws a random word for each value. The arguments are seeds of the keys."""
    size, channels = _SIZES["norm"]

    def ours(_, x, seeds):
        return dropped(x, jax.vmap(jax.random.key)(seeds), _DROPOUT)

    def by_words(_, x, seeds):
        keep = jax.vmap(lambda seed: jax.random.bernoulli(jax.random.key(seed), 1 - _DROPOUT, x.shape[1:]))(seeds)
        return jnp.where(keep, x / (1 - _DROPOUT), 0).astype(x.dtype)

    x = _normal((batch, size, size, channels), dtype)
    return Block(f"dropout, {channels} channels, {size} px", {OURS: ours, "a word for each": by_words}, None,
                 (x, jnp.arange(batch)), False)


def simplex_noise(batch: int) -> Block:
    """Simplex noise of six octaves, compared with Gaussian noise. The arguments are seeds of the keys."""
    size, channels = _SIZES["noise"]
    shape, keys = (size, size, channels), lambda seeds: jax.vmap(jax.random.key)(seeds)
    forms = {OURS: lambda _, seeds: simplex(keys(seeds), shape, 10.0 * jnp.arange(len(seeds))),
             "Gaussian": lambda _, seeds: gaussian(keys(seeds), shape)}
    return Block(f"simplex noise, {size} px, {channels} channels", forms, None, (jnp.arange(batch),), False)


def _split(make: Callable[[], nnx.Module]) -> tuple[nnx.GraphDef, nnx.State]:
    """A module's graph, and random parameters without zeros."""
    graph, shapes = nnx.split(nnx.eval_shape(make))
    return graph, jax.tree.map(lambda a: 0.1 * _normal(a.shape, a.dtype), shapes)


def _normal(shape: tuple[int, ...], dtype: Any = "float32", seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32), dtype)
