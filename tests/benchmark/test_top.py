"""Where the time goes: by the network's parts, nothing counted twice."""

import jax
import jax.numpy as jnp
import pytest

from hae_jax.benchmark import top
from hae_jax.benchmark.top import Operation, longest
from hae_jax.model.layers import conv2d


def test_parts_are_named_and_shares_add_up():
    @jax.jit
    def program(x, kernel):
        def scalar(kernel):
            h, _ = jax.lax.scan(lambda h, _: (jnp.tanh(conv2d(h, kernel, padding=1)), None), x, length=3)
            with jax.named_scope("attention, 9 tokens"):
                return jnp.sin(h).sum()

        return jax.grad(scalar)(kernel)

    x, kernel = jnp.ones((2, 32, 32, 64)), jnp.ones((3, 3, 64, 64))
    executable = program.lower(x, kernel).compile()
    found = longest(executable, lambda: jax.block_until_ready(executable(x, kernel)), count=100)
    convolution = "convolution 3x3, 64 to 64 channels, 32 px"
    assert {convolution, f"{convolution}, gradients"} <= {operation.name for operation in found}
    assert any(operation.name.startswith("attention, 9 tokens") for operation in found)
    assert sum(operation.share for operation in found) == pytest.approx(1)
    assert [operation.seconds for operation in found] == sorted((o.seconds for o in found), reverse=True)
    assert len(longest(executable, lambda: jax.block_until_ready(executable(x, kernel)), count=1)) == 1


def test_what_lies_within_is_not_counted_twice():
    events = [(0, 100, "while"), (10, 30, "a"), (15, 5, "b"), (50, 20, "a"), (100, 7, "c")]
    assert list(top._own_times_of_line(events)) == [
        ("while", 50e-9), ("a", 25e-9), ("b", 5e-9), ("a", 20e-9), ("c", 7e-9)]


def test_text():
    last = top.text("x", [Operation("norm", 1e-3, 0.5)]).splitlines()[-1]
    assert last.replace(" ", "") == "|norm|1ms|50.0%|"
