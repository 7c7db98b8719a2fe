"""The networks give the same outputs as the PyTorch implementations that they reproduce.

The expected values are reference results. A failure means that the network computes something else. Never change them
to match the code.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_weights import GoldenCase, read_case
from network_helpers import abstract, assert_close

from hae_jax.model import UNet
from hae_jax.torch_interop.weights import load_torch_state, torch_state

CASES = ("fpdm_tiny", "hae_tiny", "hae_lite_tiny", "hae_v2_tiny", "hae_v2c_tiny", "fpdm_options", "hae_v2c_options")
TOLERANCE = 1e-5  # of the output's maximum


class Network(NamedTuple):
    """A case with its network, compiled once."""

    case: GoldenCase
    model: UNet
    run: Callable  # (null, drop) -> output, gradients


def loaded(case: GoldenCase, **changes) -> UNet:
    model = nnx.merge(*abstract(dataclasses.replace(case.config, **changes)))
    load_torch_state(model, case.weights)
    return model


def forward(graph: nnx.GraphDef, case: GoldenCase) -> Callable:
    t, y = case.values["t"], case.values["y"]
    return lambda state, null, drop: nnx.merge(graph, state)(
        case.x, jnp.asarray(t), jnp.asarray(y), null=null, drop=drop, sparse_masks=case.masks)


@pytest.fixture(scope="module", params=CASES)
def network(request: pytest.FixtureRequest, golden) -> Network:
    case = read_case(golden, request.param)
    model = loaded(case)
    graph, state = nnx.split(model)
    f, direction = forward(graph, case), case.gradient_direction()

    def scalar(state, null, drop):
        out = f(state, null, drop)
        return jnp.mean(out * direction), out

    compiled = jax.jit(jax.value_and_grad(scalar, has_aux=True))

    def run(null, drop):
        (_, out), gradients = compiled(state, null, drop)
        return out, nnx.merge(graph, gradients)

    return Network(case, model, run)


def test_names_order_and_round_trip(network: Network):
    case, state = network.case, torch_state(network.model)
    assert list(state) == list(case.weights)
    for name, value in case.weights.items():
        np.testing.assert_array_equal(state[name], value, err_msg=name, strict=True)
    assert sum(value.size for value in state.values()) == case.parameters


def test_masked_attentions(network: Network):
    case, (_, height, width, _) = network.case, network.case.x.shape
    assert network.model.masked_tokens(height, width) == case.values["sparse_seq_lens"].tolist()


def test_outputs(network: Network):
    for mode, (null, drop) in network.case.modes().items():
        assert_close(network.run(null, drop)[0], network.case.output(mode), TOLERANCE)


def test_gradient_norm_of_every_parameter(network: Network):
    case = network.case
    _, gradients = network.run(*case.modes()[str(case.values["grad_mode"])])
    gradients = torch_state(gradients)
    expected = dict(zip(case.values["grad_keys"].tolist(), case.values["grad_l2"], strict=True))
    assert expected.keys() <= gradients.keys()
    norms = {name: np.linalg.norm(gradients[name].astype(np.float64)) for name in expected}
    wrong = {name: (norms[name], b) for name, b in expected.items() if abs(norms[name] - b) > 1e-5 * b + 1e-7}
    assert not wrong


@pytest.mark.parametrize("name", ["hae_v2c_tiny", "hae_v2c_options"])
def test_outputs_without_memory_optimization(golden, name: str):
    case = read_case(golden, name)
    graph, state = nnx.split(loaded(case, memory_optimization=False))
    run = jax.jit(forward(graph, case))
    outputs = {mode: run(state, null, drop) for mode, (null, drop) in case.modes().items()}
    for mode, out in outputs.items():
        assert_close(out, case.output(mode, "_memopt_off"), TOLERANCE)
    # Without the skip, a null pass attends to a context of biases only. The outputs must differ.
    assert np.abs(outputs["null"] - case.output("null")).max() > 1e-3


def test_the_full_size_network(golden):
    case = read_case(golden, "hae_v2c_brats")
    model = loaded(case)
    assert list(torch_state(model)) == list(case.weights)
    assert model.masked_tokens(128, 128) == case.values["sparse_seq_lens"].tolist()
    graph, state = nnx.split(model)
    run = jax.jit(forward(graph, case))
    for mode, (null, drop) in case.modes().items():
        assert_close(run(state, null, drop), case.output(mode), TOLERANCE)
