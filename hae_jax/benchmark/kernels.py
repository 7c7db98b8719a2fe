"""Which kernel of attention is the fastest on this machine: measured, since neither shapes nor data sheets tell."""

from collections.abc import Callable

import jax
import numpy as np

from hae_jax.benchmark.blocks import attention_block, with_gradients
from hae_jax.benchmark.measure import in_turns
from hae_jax.benchmark.results import OURS
from hae_jax.model.platform import KERNELS, attention_by
from hae_jax.training.mesh import make_mesh

_BATCH = 8
_TURNS = 5
_WORTH_IT = 0.9  # of XLA's time: what is hardly faster is not chosen, so that a run that goes on finds the same again
_MOST_ERROR = 0.05  # of the largest number; the kernels round to bfloat16 at different places


def fastest_attention(dtype: str, *, gradients: bool, say: Callable[[str], None] = print) -> str:
    """Times the full network's attention block over its largest map by each kernel, in turns, on one device.

    A kernel that cannot be run here, or that gives other numbers than XLA's, is not chosen, and it is said why.

    Args:
      dtype: of computation.
      gradients: whether gradients count as well, as in training.
      say: is told what was found.
    """
    block = attention_block(_BATCH, dtype)
    arguments = block.placed(make_mesh(devices=jax.local_devices()[:1]))
    own, tokens = block.forms[OURS], np.prod(block.inputs[0].shape[1:3])
    programs, wanted = {}, None
    for kernel in KERNELS:
        try:
            with attention_by(kernel):  # a new function each time: JAX remembers what it has traced
                f = (lambda *a: with_gradients(own)(*a)) if gradients else (lambda *a: own(*a))
                program = jax.jit(f).lower(*arguments).compile()
            got = jax.tree.leaves(jax.device_get(program(*arguments)))
        except (RuntimeError, ValueError) as error:
            if wanted is None:
                raise  # XLA's own way
            say(f"attention: {kernel}'s kernel does not run here ({str(error).strip().splitlines()[0]})")
            continue
        wanted = wanted or got
        if not all(map(_agree, got, wanted)):
            say(f"attention: {kernel}'s kernel gives other numbers than XLA's here")
            continue
        programs[kernel] = program
    turns = in_turns([lambda p=p: jax.block_until_ready(p(*arguments)) for p in programs.values()], _TURNS)
    seconds = dict(zip(programs, np.median(turns, axis=1), strict=True))
    best = min(seconds, key=seconds.get)
    best = best if seconds[best] <= _WORTH_IT * seconds[KERNELS[0]] else KERNELS[0]
    say(f"attention by {best}: {', '.join(f'{kernel} {1e3 * time:.2f} ms' for kernel, time in seconds.items())} for a "
        f"block over {tokens} tokens{', with gradients' if gradients else ''}")
    return best


def _agree(a: np.ndarray, b: np.ndarray) -> bool:
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    return bool(np.abs(a - b).max() <= _MOST_ERROR * np.abs(b).max())
