"""Sample grids: images that the network generates for each class, at several guidance strengths."""

from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from hae_jax.diffusion.noise import draw_noise
from hae_jax.diffusion.process import Process, guide, sample
from hae_jax.evaluation.figures import sample_grid
from hae_jax.model import UNetConfig
from hae_jax.training.mesh import replicated

_PER_CLASS = 2
_CLASS_NAMES = ("healthy", "lesion")


def make_sampler(
    mesh: Mesh, graph: nnx.GraphDef, config: UNetConfig, process: Process, noise: str = "gaussian"
) -> Callable[..., jax.Array]:
    """Compiles `sampler(params, seed, strength) -> [R, H, W, C]`: R rows, two for each class, from the same noise.

    Args:
      noise: `diffusion.noise`, as in training.
    """

    def sampler(params: nnx.State, seed: jax.Array, strength: jax.Array) -> jax.Array:
        model = nnx.merge(graph, params)
        labels = jnp.arange(config.num_classes or 1).repeat(_PER_CLASS)
        rows = len(labels)
        null = jnp.arange(2 * rows) >= rows

        def denoise(x, t):
            if config.num_classes is None:
                return model(x, t)
            both = model(jnp.concatenate([x, x]), jnp.concatenate([t, t]), jnp.concatenate([labels, labels]), null=null)
            return guide(both[:rows], both[rows:], strength)

        # All classes use the same noise, so that their samples differ only by the label.
        keys = jax.random.split(jax.random.key(seed), _PER_CLASS)
        last = jnp.full(_PER_CLASS, process.schedule.steps - 1)
        field = draw_noise(noise, process, keys, (config.image_size, config.image_size, config.in_channels), last)
        return sample(process, denoise, jnp.tile(field, (rows // _PER_CLASS, 1, 1, 1)))

    return jax.jit(sampler, out_shardings=replicated(mesh))


def draw_samples(sampler: Callable, params: nnx.State, seed: int, strengths: Sequence[float]) -> np.ndarray:
    """Samples from the same noise at each strength: [strengths, R, H, W, C]. All processes must call it."""
    return np.stack([np.asarray(sampler(params, np.uint32(seed), np.float32(w))) for w in strengths])


def write_samples(
    path: Path, images: np.ndarray, strengths: Sequence[float], classes: int | None, modalities: Sequence[str]
) -> None:
    """Writes a grid with a row for each sample and a column for each guidance strength. Channels are `modalities`."""
    names = _CLASS_NAMES if classes == len(_CLASS_NAMES) else [f"class {i}" for i in range(classes or 1)]
    titles = [name for name in names for _ in range(_PER_CLASS)] if classes else None
    sample_grid(path, images, strengths, row_titles=titles, channels=tuple(modalities), title=f"samples, {path.stem}")
