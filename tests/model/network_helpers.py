"""Helpers for tests of the network: networks with deterministic values, shapes in a program."""

import functools
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx

from hae_jax.model import UNet, UNetConfig

# A network with two levels. Its hybrid block has 12 x 12 tokens, enough to be sparse.
SMALL = {"image_size": 24, "in_channels": 2, "model_channels": 32, "channel_mult": (1, 1), "num_res_blocks": 1,
         "attention_resolutions": (2,), "num_classes": 2, "num_heads": 4, "use_scale_shift_norm": True}


@functools.cache
def abstract(config: UNetConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """The network's structure and the shapes of its parameters."""
    return nnx.split(nnx.eval_shape(lambda: UNet(config, nnx.Rngs(0))))


@functools.cache
def filled(config: UNetConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """A network without zero parameters, so that every path has an effect. Values depend on the names only."""
    graph, state = abstract(config)
    return graph, jax.tree_util.tree_map_with_path(_draw, state)


def _draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    name = jax.tree_util.keystr(path)
    z = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(leaf.shape, np.float32)
    if "kernel" in name:
        z /= np.sqrt(np.prod(leaf.shape[:-1]))
    elif "embedding" not in name:
        z = 0.1 * z + ("scale" in name)
    return jax.device_put(z.astype(np.float32))  # jnp.asarray would compile a copy for each shape


def inputs(config: UNetConfig, batch: int, size: int | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images, timesteps and labels."""
    rng = np.random.default_rng(3)
    size = size or config.image_size
    x = rng.standard_normal((batch, size, size, config.in_channels), np.float32)
    return x, rng.integers(0, 1000, batch), rng.integers(0, config.num_classes or 1, batch)


def shapes_in(f: Callable, *args: Any) -> Iterator[tuple[int, ...]]:
    """The shape of every array that `f` computes, inner functions included."""
    yield from _shapes(jax.make_jaxpr(f)(*args).jaxpr)


def _shapes(jaxpr) -> Iterator[tuple[int, ...]]:
    for equation in jaxpr.eqns:
        yield from (variable.aval.shape for variable in equation.outvars)
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from _shapes(inner)


def assert_close(actual: Any, desired: Any, tolerance: float) -> None:
    """Asserts that all differences are within the tolerance, relative to the largest desired value."""
    actual, desired = np.asarray(actual, np.float64), np.asarray(desired, np.float64)
    assert actual.shape == desired.shape
    error = np.abs(actual - desired).max() / np.abs(desired).max()
    assert error <= tolerance, f"differs by {error:.1e} of the largest value, more than {tolerance:.0e}"
