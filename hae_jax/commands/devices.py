"""Using a machine well: a JAX device for each CPU core, a cache of compiled programs, the fastest attention."""

import contextlib
import itertools
import os
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from hae_jax.ops import platform
from hae_jax.ops.platform import KERNELS, XLA

_CHOICES = [XLA, *("+".join(some) for n in range(len(KERNELS)) for some in itertools.combinations(KERNELS, n + 1))]


def use_all_cores(batch_size: int = 0) -> None:
    """Splits the CPU into devices, as many as there are cores and as divide the batch.

    One device with all cores leaves most of them idle in all but the largest operations; batches over one device a core
    ran 1.3 to 2 times faster on two cores. Without effect where JAX finds an accelerator. To be called first of all.

    Args:
      batch_size: the global batch that will be cut into equal parts; 0 where any number of parts will do.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # A program that has computed already, such as a notebook, keeps the devices it has.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", max(n for n in range(1, cores + 1) if batch_size % n == 0))


def use_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache folder, so that the next start compiles nothing.

    `JAX_COMPILATION_CACHE_DIR` wins. Where the folder cannot be written, JAX says so and compiles.
    """
    if jax.config.jax_compilation_cache_dir is None:
        # Unlike Path.home, expanduser never fails: a container's user may have no home.
        base = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
        if not base.is_absolute():
            return
        jax.config.update("jax_compilation_cache_dir", str(base / "hae-jax" / "compiled"))


def choose_attention(dtype: str, *, gradients: bool, dropout: bool = False) -> None:
    """On GPUs, times the kernels of attention and takes the fastest for this process; it is said which.

    The environment variable `HAE_JAX_ATTENTION` has the first word, and where a run must go on to the last bit on
    another kind of GPU, the last. In float32 and on anything but GPUs there is nothing to choose. Of several
    processes, the first one's choice holds for all.

    Args:
      dtype: of computation.
      gradients: whether the process will train.
      dropout: whether it will drop weights of attention.

    Raises:
      UserError: the environment variable names an unknown kernel.
    """
    platform.attention_kernels()
    if jax.default_backend() != "gpu" or platform.ATTENTION in os.environ or dtype == "float32":
        return
    from hae_jax.benchmark.kernels import fastest_attention

    first = jax.process_index() == 0
    choice = _CHOICES.index(fastest_attention(dtype, gradients=gradients, dropout=dropout) if first else XLA)
    if jax.process_count() > 1:
        choice = int(multihost_utils.broadcast_one_to_all(np.int32(choice)))
    os.environ[platform.ATTENTION] = _CHOICES[choice]
