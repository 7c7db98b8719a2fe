"""Learning-rate schedules and the network's config from the config tree."""

import jax
import numpy as np
import optax
import pytest

from hae_jax.errors import UserError
from hae_jax.training.mesh import make_mesh
from hae_jax.training.state import abstract_network, learning_rate, network_config, sharded_initial_state


@pytest.mark.parametrize(("anneal", "middle", "last"), [
    ("none", 1e-3, 1e-3),
    ("linear", 5.5e-4, 0),
    ("cosine", 5.8e-4, 0),
])
def test_the_learning_rate_warms_up_and_anneals(tiny_config, anneal, middle, last):
    training = tiny_config.training
    training.steps, training.warmup_steps, training.anneal = 110, 10, anneal
    rate = learning_rate(training)
    assert 0 < rate(0) < rate(5) < 1e-3
    np.testing.assert_allclose(rate(10), 1e-3, rtol=1e-6)
    np.testing.assert_allclose(rate(55), middle, rtol=0.01)
    np.testing.assert_allclose(rate(110), last, atol=1e-9)


def test_a_learned_variance_doubles_the_output(tiny_config):
    tiny_config.diffusion.variance = "learned_range"
    assert network_config(tiny_config.to_dict()).out_channels == 8


def test_an_unknown_field_of_the_network_is_named(tiny_config):
    tree = tiny_config.to_dict()
    tree["model"]["hedas"] = 4
    with pytest.raises(UserError, match=r"model\.hedas: no such field"):
        network_config(tree)


def test_the_initial_state_does_not_depend_on_where_it_lies(tiny_config):
    network = network_config(tiny_config.to_dict())
    whole, _ = sharded_initial_state(make_mesh(devices=jax.devices()[:1]), network, optax.adamw(1e-3), 2, seed=3)
    parts, shardings = sharded_initial_state(make_mesh(fsdp=True), network, optax.adamw(1e-3), 2, seed=3)
    jax.tree.map(np.testing.assert_array_equal, whole, parts)
    jax.tree.map(np.testing.assert_array_equal, parts.params, parts.ema[1])
    assert any(not s.is_fully_replicated for s in jax.tree.leaves(shardings))
    assert jax.tree.structure(abstract_network(network)[1]) == jax.tree.structure(parts.params)
