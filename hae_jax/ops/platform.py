"""Which form of an operation a program gets: that for CPUs, or that for accelerators.

Forms for CPUs keep what they work on in caches, by loops that accelerators would be slow in. All of them are chosen
here, so that a program can also be planned for an accelerator where there is none.
"""

import contextlib
import contextvars
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax

from hae_jax.errors import UserError

ATTENTION = "HAE_JAX_ATTENTION"  # the environment variable that chooses kernels of attention on GPUs
# Beside XLA's own ways: cuDNN's kernel for dense attention, the same for the rows of sparse attention, and ours for
# sparse attention whose weights are dropped.
KERNELS = ("cudnn", "cudnn_sparse", "pallas")
XLA = "xla"

_planned = contextvars.ContextVar("planned", default="")


@contextlib.contextmanager
def accelerator_forms(platform: str = "accelerator") -> Iterator[None]:
    """While it lasts, programs are traced as for an accelerator, whatever the machine. What JAX has traced stays.

    Args:
      platform: "gpu" for what GPUs alone have as well.
    """
    token = _planned.set(platform)
    try:
        yield
    finally:
        _planned.reset(token)


def by_platform(*args: Any, cpu: Callable[..., Any], default: Callable[..., Any]) -> Any:
    """`cpu(*args)` or `default(*args)`, which must agree in shapes; decided when the program is lowered.

    Both are traced and, if differentiated, both keep what their gradients need: give them gradients of their own.
    """
    return default(*args) if _planned.get() else jax.lax.platform_dependent(*args, cpu=cpu, default=default)


def is_cpu() -> bool:
    """Whether a program is to run on this machine's CPU; for forms without gradients of their own."""
    return jax.default_backend() == "cpu" and not _planned.get()


def compiler_options() -> dict[str, Any]:
    """XLA's options for the large programs (training step, translation), each here because a measurement said so.

    On CPUs, the order of operations that needs the least memory: a tenth less, and a little faster. On GPUs there are
    none: nothing was measured there; `tools/benchmark.py --option NAME=VALUE` tries one.
    """
    return {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"} if is_cpu() else {}


def attention_kernels() -> tuple[str, ...]:
    """The kernels of attention on GPUs that take the place of XLA's ways, as `HAE_JAX_ATTENTION` says.

    The environment variable is "xla" for none of them, which is the default, or their names joined by "+". Anything but
    a GPU has none. It is the machine's choice and not the network's, so no config has it: the same run may go on, or
    its network be used, where the other is better.

    Raises:
      UserError: the variable says something else.
    """
    text = os.environ.get(ATTENTION, XLA)
    names = () if text == XLA else tuple(text.split("+"))
    if not set(names) <= set(KERNELS):
        raise UserError(f"environment variable {ATTENTION} is {text!r}: set it to {XLA} or to some of "
                        f"{', '.join(KERNELS)}, joined by +")
    return names if (_planned.get() or jax.default_backend()) == "gpu" else ()


@contextlib.contextmanager
def attention_by(kernels: str) -> Iterator[None]:
    """While it lasts, programs are traced with these kernels (`attention_kernels`), whatever the environment says."""
    before = os.environ.get(ATTENTION)
    os.environ[ATTENTION] = kernels
    try:
        yield
    finally:
        if before is None:
            del os.environ[ATTENTION]
        else:
            os.environ[ATTENTION] = before
