"""Random words equal JAX's, for keys of any number and of any generator."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hae_jax.ops import threefry


@pytest.mark.parametrize("generator", ["threefry2x32", "rbg"])
@pytest.mark.parametrize("batch", [(), (3,), (2, 2)])
def test_words_are_those_of_jax(generator: str, batch: tuple[int, ...]):
    keys = jax.random.split(jax.random.key(5, impl=generator), batch)
    draw = lambda key: jax.random.bits(key, (7, 3), jnp.uint32)
    for _ in batch:
        draw = jax.vmap(draw)
    np.testing.assert_array_equal(jax.jit(threefry.words, static_argnums=1)(keys, (7, 3)), jax.jit(draw)(keys))
