"""Numbers of parameters of the networks, counted from shapes. `tools/draw_models.py --table` prints them."""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
from flax import nnx

from hae_jax.model.classifier import make_network
from hae_jax.model.config import UNetConfig
from hae_jax.model.hybrid import JointHybrid, PerScaleHybrid

# Settings of the last column: no labels, no scale-shift norm, four levels.
_UNCONDITIONAL = {"channel_mult": (1, 2, 4, 8), "use_scale_shift_norm": False, "num_classes": None}
_BYTES = 4  # parameters are float32


class ParameterCount(NamedTuple):
    """Numbers of parameters."""

    total: int
    hybrid: int  # those in the hybrid blocks


def count_parameters(config: UNetConfig) -> ParameterCount:
    """Counts parameters without allocating them."""
    model = nnx.eval_shape(lambda: make_network(config, nnx.Rngs(0)))
    hybrids = [module for _, module in nnx.iter_modules(model) if isinstance(module, JointHybrid | PerScaleHybrid)]
    return ParameterCount(_count(model), sum(map(_count, hybrids)))


def parameter_table(configs: Sequence[UNetConfig]) -> str:
    """A Markdown table with a row per network: as configured, and unconditional with widths 1, 2, 4, 8."""
    lines = ["| variant | parameters | float32, MiB | of them in hybrid blocks | four wide levels, unconditional |",
             "|---|---:|---:|---:|---:|"]
    for config in configs:
        count, wide = count_parameters(config), count_parameters(dataclasses.replace(config, **_UNCONDITIONAL))
        mebibytes = count.total * _BYTES / 2**20
        lines.append(f"| `{config.variant}` | {count.total} | {mebibytes:.1f} | {count.hybrid} | {wide.total} |")
    return "\n".join(lines)


def _count(module: nnx.Module) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))
