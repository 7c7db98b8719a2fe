"""Sample grids: what the network draws for each class, at several guidance strengths."""

from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hae_jax.data.cases import MODALITIES
from hae_jax.diffusion.process import Process, guide, sample
from hae_jax.evaluation.figures import sample_grid
from hae_jax.model import UNetConfig

_PER_CLASS = 2
_CLASS_NAMES = ("healthy", "lesion")


def make_sampler(graph: nnx.GraphDef, config: UNetConfig, process: Process) -> Callable[..., jax.Array]:
    """Compiles `sampler(params, key, strength) -> [R, H, W, C]`: R rows, two for each class, from the same noise."""

    def sampler(params: nnx.State, key: jax.Array, strength: jax.Array) -> jax.Array:
        model = nnx.merge(graph, params)
        labels = jnp.arange(config.num_classes or 1).repeat(_PER_CLASS)
        rows = len(labels)
        null = jnp.arange(2 * rows) >= rows

        def denoise(x, t):
            if config.num_classes is None:
                return model(x, t)
            both = model(jnp.concatenate([x, x]), jnp.concatenate([t, t]), jnp.concatenate([labels, labels]), null=null)
            return guide(both[:rows], both[rows:], strength)

        # One field of noise per place in a class: the classes differ by nothing but the label.
        noise = jax.random.normal(key, (_PER_CLASS, config.image_size, config.image_size, config.in_channels))
        return sample(process, denoise, jnp.tile(noise, (rows // _PER_CLASS, 1, 1, 1)))

    return jax.jit(sampler)


def draw_samples(sampler: Callable, params: nnx.State, seed: int, strengths: Sequence[float]) -> np.ndarray:
    """Draws the same noise at each strength: [strengths, R, H, W, C]."""
    return np.stack([np.asarray(sampler(params, jax.random.key(seed), jnp.float32(w))) for w in strengths])


def write_samples(path: Path, images: np.ndarray, strengths: Sequence[float], classes: int | None) -> None:
    """Writes a grid: a row for each sample, a column for each guidance strength."""
    names = _CLASS_NAMES if classes == len(_CLASS_NAMES) else [f"class {i}" for i in range(classes or 1)]
    titles = [name for name in names for _ in range(_PER_CLASS)] if classes else None
    channels = MODALITIES if images.shape[-1] == len(MODALITIES) else ()
    sample_grid(path, images, strengths, row_titles=titles, channels=channels, title=f"samples, {path.stem}")
