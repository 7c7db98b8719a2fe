"""Operations of one pass through a network, counted from shapes. The log's model FLOP/s are based on them.

A multiplication and an addition are two operations. Convolutions (as direct sums) and matrix products are counted as
this network computes them; sparse attention computes only the blocks that it keeps. Recomputation by remat and XLA's
optimisations are not taken into account.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from hae_jax.model.classifier import make_network
from hae_jax.model.config import UNetConfig

TRAINING_FACTOR = 3  # the backward pass takes two products for each one of the forward pass

# Dense peak FLOP/s of one JAX device, from the makers' data sheets, without structured sparsity: bfloat16, and float32
# in JAX's default precision (TF32 on NVIDIA from Ampere on, one bfloat16 pass on TPUs). The first entry is used whose
# name is in the device's `device_kind`.
_PEAKS = (
    ("GB200", 2500e12, 1250e12),
    ("B200", 2250e12, 1100e12),
    ("H100 PCIe", 756e12, 378e12),
    ("H100 NVL", 835e12, 417e12),
    ("H100", 989e12, 494e12),
    ("H200", 989e12, 494e12),
    ("A100", 312e12, 156e12),
    ("A10G", 70e12, 35e12),
    ("L40S", 362e12, 181e12),
    ("L40", 181e12, 91e12),
    ("L4", 121e12, 60e12),
    ("A6000", 155e12, 77e12),
    ("RTX 6000 Ada", 364e12, 182e12),
    ("RTX 4090", 165e12, 83e12),
    ("RTX 3090", 71e12, 36e12),
    ("V100", 15.7e12, 15.7e12),  # no bfloat16 units
    ("TPU v4", 275e12, 275e12),
    ("TPU v5 lite", 197e12, 197e12),
    ("TPU v5", 459e12, 459e12),
    ("TPU v6 lite", 918e12, 918e12),
)


def countable(config: UNetConfig) -> UNetConfig:
    """The network in forms whose operations can be counted: without cuDNN's kernel and Winograd's form."""
    attention = config.attention if config.attention == "materialised" else "xla"
    return dataclasses.replace(config, convolution="xla", attention=attention)


@functools.cache
def forward_flops(config: UNetConfig) -> int:
    """Operations of the forward pass of one image with its label, at the config's image size."""
    graph, params = nnx.split(nnx.eval_shape(lambda: make_network(countable(config), nnx.Rngs(0))))
    image = jax.ShapeDtypeStruct((1, config.image_size, config.image_size, config.in_channels), jnp.float32)
    row = jax.ShapeDtypeStruct((1,), jnp.int32)
    if config.task == "classify":
        return count_flops(lambda params, x, t: nnx.merge(graph, params)(x, t), params, image, row)
    return count_flops(lambda params, x, t, y: nnx.merge(graph, params)(x, t, y), params, image, row, row)


def training_flops(config: UNetConfig) -> int:
    """Operations of one image in a training step. The backward pass counts twice the forward pass."""
    return TRAINING_FACTOR * forward_flops(config)


def device_peak_flops(device: jax.Device, dtype: str) -> float | None:
    """The peak FLOP/s of dense products according to a device's maker, or None if unknown (CPUs).

    Args:
      dtype: "bfloat16" or "float32".
    """
    column = {"bfloat16": 0, "float32": 1}[dtype]
    return next((peaks[column] for name, *peaks in _PEAKS if name in device.device_kind), None)


def count_flops(f: Any, *args: Any) -> int:
    """Operations in the convolutions and matrix products of `f(*args)`, without running it.

    Args:
      args: arrays, or `jax.ShapeDtypeStruct`.

    Raises:
      ValueError: for a loop around products whose number of turns does not show in the program.
    """
    return _flops_of(jax.make_jaxpr(f)(*args).jaxpr)


def _flops_of(jaxpr: Any) -> int:
    return sum(map(_flops_of_equation, jaxpr.eqns))


def _flops_of_equation(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        return _product_flops(equation)
    if name == "conv_general_dilated":
        return _convolution_flops(equation)
    inner = [_flops_of(jaxpr) for jaxpr in _inner_jaxprs(params)]
    if name == "cond":
        return max(inner)
    if name == "scan":
        return params["length"] * sum(inner)
    if name == "while" and sum(inner):
        raise ValueError("a while loop around matrix products: nobody can tell how often it turns")
    return sum(inner)


def _inner_jaxprs(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            part = getattr(part, "jaxpr", part)  # of a ClosedJaxpr
            if hasattr(part, "eqns"):
                yield part


def _product_flops(equation: Any) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    terms = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
    return 2 * terms * equation.outvars[0].aval.size


def _convolution_flops(equation: Any) -> int:
    """Two operations per output and weight of the output. Products with zeros of the padding count."""
    kernel = equation.invars[1].aval.shape
    layout = equation.params["dimension_numbers"].rhs_spec  # axes of output channels, input channels, space
    return 2 * equation.outvars[0].aval.size * math.prod(kernel) // kernel[layout[0]]
