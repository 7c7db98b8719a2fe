"""The initial state of a run: optimiser, learning rate, the network's config, the state on its devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hae_jax.errors import UserError
from hae_jax.training.mesh import make_mesh
from hae_jax.training.state import (
    abstract_network,
    abstract_state,
    learning_rate,
    make_optimizer,
    network_config,
    remembered_timesteps,
    sharded_initial_state,
    shardings_of,
)


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


@pytest.mark.parametrize(("clip_norm", "decay"), [(None, 0.0), (0.5, 0.0), (0.5, 0.1)])
def test_updates_are_adams_on_clipped_gradients(tiny_config, clip_norm, decay):
    """The reference is Loshchilov & Hutter 2019, algorithm 2, in NumPy. Only the first gradient is clipped."""
    training = tiny_config.training
    training.clip_norm, training.weight_decay, training.learning_rate, training.warmup_steps = clip_norm, decay, 0.01, 1
    optimizer, p, m, v = make_optimizer(training), np.array([0.3, -2.0]), 0.0, 0.0
    params, rate = jnp.asarray(p, jnp.float32), learning_rate(training)
    state = optimizer.init(params)
    for i, g in enumerate((np.array([30.0, -40.0]), np.array([0.1, 0.2]))):
        updates, state = optimizer.update(jnp.asarray(g, jnp.float32), state, params)
        params = optax.apply_updates(params, updates)
        g = g if clip_norm is None else g * min(1, clip_norm / np.linalg.norm(g))
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        direction = m / (1 - 0.9 ** (i + 1)) / (np.sqrt(v / (1 - 0.999 ** (i + 1))) + 1e-8)
        p = p - rate(i) * (direction + decay * p)
        np.testing.assert_allclose(params, p, rtol=2e-5)


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
    parts, shardings = sharded_initial_state(make_mesh((1, -1)), network, optax.adamw(1e-3), 2, seed=3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), whole, parts)
    jax.tree.map(np.testing.assert_array_equal, parts.params, parts.ema[1])
    assert any(not s.is_fully_replicated for s in jax.tree.leaves(shardings))
    assert jax.tree.structure(abstract_network(network)[1]) == jax.tree.structure(parts.params)


def test_the_abstract_state_is_the_real_ones_shape_and_losses_are_remembered_everywhere(tiny_config):
    tiny_config.diffusion.steps = 4096  # the rules for parameters would shard the history
    network, mesh = network_config(tiny_config.to_dict()), make_mesh((1, -1))
    assert remembered_timesteps(tiny_config) is None
    tiny_config.training.timesteps = "loss-second-moment"
    remembered = remembered_timesteps(tiny_config.to_dict())
    state, shardings = sharded_initial_state(mesh, network, optax.adamw(1e-3), 1, 0, remembered)
    abstract = abstract_state(network, optax.adamw(1e-3), 1, remembered)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), state) == jax.tree.map(lambda a: (a.shape, a.dtype), abstract)
    assert shardings_of(mesh, abstract) == shardings
    assert state.timesteps.losses.shape == (4096, 10)
    assert all(leaf.sharding.is_fully_replicated for leaf in state.timesteps)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
