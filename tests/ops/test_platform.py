"""The options of XLA, and what programs for accelerators get of them."""

import jax
import jax.numpy as jnp

from hae_jax.ops.platform import accelerator_forms, compiler_options


def test_cpus_have_options_that_xla_knows_and_accelerators_none():
    options = compiler_options()
    assert options
    jax.jit(jnp.sin).lower(jnp.ones(3)).compile(options)  # raises for what it does not know
    with accelerator_forms():
        assert compiler_options() == {}
