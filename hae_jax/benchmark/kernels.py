"""Which kernels of attention are the fastest on this machine: measured, since neither shapes nor data sheets tell."""

from collections.abc import Callable

import jax
import numpy as np

from hae_jax.benchmark.blocks import Block, attention_block, smallest_patches, with_gradients
from hae_jax.benchmark.measure import in_turns
from hae_jax.benchmark.results import OURS
from hae_jax.ops.platform import KERNELS, XLA, attention_by
from hae_jax.training.mesh import make_mesh

_BATCH = 8
_TURNS = 5
_WORTH_IT = 0.9  # of XLA's time: what is hardly faster is not chosen, so that a run that goes on finds the same again
_MOST_ERROR = 0.05  # of the largest number; the kernels round to bfloat16 at different places


def fastest_attention(dtype: str, *, gradients: bool, dropout: bool, say: Callable[[str], None] = print) -> str:
    """Times the full network's largest attentions by each kernel, in turns with XLA, on one device.

    A kernel that cannot be run here, or that gives other numbers than XLA's, is not chosen, and it is said why.

    Args:
      dtype: of computation.
      gradients: whether gradients count as well, as in training.
      dropout: whether weights of attention are dropped, as in most training.
      say: is told what was found.

    Returns:
      What `HAE_JAX_ATTENTION` is to be.
    """
    blocks = {"cudnn": attention_block(_BATCH, dtype), "cudnn_sparse": smallest_patches(_BATCH, dtype, dropout=False)}
    if dropout:
        blocks["pallas"] = smallest_patches(_BATCH, dtype, dropout=True)
    chosen = [kernel for kernel in KERNELS if kernel in blocks and _wins(kernel, blocks[kernel], gradients, say)]
    return "+".join(chosen) or XLA


def _wins(kernel: str, block: Block, gradients: bool, say: Callable[[str], None]) -> bool:
    arguments, own = block.placed(make_mesh(devices=jax.local_devices()[:1])), block.forms[OURS]
    programs, wanted = {}, None
    for name in (XLA, kernel):
        try:
            with attention_by(name):  # a new function each time: JAX remembers what it has traced
                f = (lambda *a: with_gradients(own)(*a)) if gradients else (lambda *a: own(*a))
                program = jax.jit(f).lower(*arguments).compile()
            got = jax.tree.leaves(jax.device_get(program(*arguments)))
        except (RuntimeError, ValueError) as error:
            if wanted is None:
                raise  # XLA's own way
            say(f"{block.name}: {name}'s kernel does not run here ({str(error).strip().splitlines()[0]})")
            return False
        wanted = wanted or got
        if not all(map(_agree, got, wanted)):
            say(f"{block.name}: {name}'s kernel gives other numbers than XLA's here")
            return False
        programs[name] = program
    turns = in_turns([lambda p=p: jax.block_until_ready(p(*arguments)) for p in programs.values()], _TURNS)
    seconds = dict(zip(programs, np.median(turns, axis=1), strict=True))
    wins = bool(seconds[kernel] <= _WORTH_IT * seconds[XLA])
    say(f"{block.name}{', with gradients' if gradients else ''}: by {kernel if wins else XLA} ("
        f"{', '.join(f'{name} {1e3 * time:.2f} ms' for name, time in seconds.items())})")
    return wins


def _agree(a: np.ndarray, b: np.ndarray) -> bool:
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    return bool(np.abs(a - b).max() <= _MOST_ERROR * np.abs(b).max())
