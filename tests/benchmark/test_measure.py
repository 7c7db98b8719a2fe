"""Turns, memory plans, tables."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hae_jax.benchmark.measure import (
    _own_times,
    compile_program,
    copy_speed,
    in_turns,
    longest_kernels,
    matmul_peak,
    peak_of_first_call,
    sharing_memory,
)
from hae_jax.benchmark.results import number, render, seconds, size
from hae_jax.training.mesh import make_mesh


def test_calls_take_turns(monkeypatch):
    called, waited = [], []

    class Result:
        """A result that notes who waits for it."""

        def __init__(self, name):
            self.name = name

        def block_until_ready(self):
            waited.append(self.name)

    monkeypatch.setattr("hae_jax.benchmark.measure._SHORTEST_TURN", 1e-4)
    turns = in_turns([lambda name=name: called.append(name) or Result(name) for name in ("a", "b", "c")], repeats=3)
    assert turns.shape == (3, 3)
    assert (turns > 0).all()
    assert "".join(waited) == "aabbcc" + "abc" * 3  # only the last call of a turn is waited for
    assert len(called) > len(waited)
    changes = [here for before, here in zip([None, *called], called, strict=False) if here != before]
    assert "".join(changes) == "abc" * 4  # once to warm up, then three turns


def test_memory_is_arguments_results_and_what_lies_between():
    n = 256

    def f(x):
        y = x @ x
        return jnp.sort(y @ x, axis=0).sum()

    shape = jax.ShapeDtypeStruct((n, n), jnp.float32)
    compiled = compile_program(lambda: jax.jit(f).lower(shape), devices=3)
    matrix = 4 * n * n
    assert compiled.arguments == matrix
    assert 3 * 2 * matrix <= compiled.memory <= 3 * 5 * matrix
    assert compiled.seconds > 0


def test_results_over_donated_arguments_count_once():
    shape = jax.ShapeDtypeStruct((1000,), jnp.float32)
    plans = [compile_program(lambda d=donated: jax.jit(lambda x: x + 1, donate_argnums=d).lower(shape), 1).memory
             for donated in ((), (0,))]
    assert plans[0] - plans[1] == 4000


class _Device:
    """A device with memory statistics that a call changes."""

    def __init__(self, in_use, peak):
        self.stats = {"bytes_in_use": in_use, "peak_bytes_in_use": peak}

    def memory_stats(self):
        return dict(self.stats)


@pytest.mark.parametrize(("peak_after", "found"), [(900, 900 - 300 + 100), (500, None)])
def test_device_statistics_tell_a_call_only_by_a_new_peak(peak_after, found):
    device = _Device(in_use=300, peak=500)
    assert peak_of_first_call(device, lambda: device.stats.update(peak_bytes_in_use=peak_after), arguments=100) == found


def test_devices_without_statistics_say_nothing():
    called = []
    assert peak_of_first_call(jax.devices()[0], lambda: called.append(1), arguments=100) is None
    assert called == [1]


def test_matmul_peak_is_positive_and_cores_share_a_memory(monkeypatch):
    monkeypatch.setattr("hae_jax.benchmark.measure._PEAK_SIZES", {"cpu": 64})
    mesh = make_mesh(devices=jax.devices()[:2])
    monkeypatch.setattr("hae_jax.benchmark.measure._COPIED", (64, 64))
    assert matmul_peak(mesh, "float32", repeats=1) > 0
    assert copy_speed(mesh, repeats=1) > 0
    assert sharing_memory(mesh) == 2


def test_a_profile_names_the_kernels_that_take_longest():
    x = jnp.ones((600, 600))
    program = jax.jit(lambda x: (jax.lax.fori_loop(0, 3, lambda _, y: y @ x, x), jnp.sin(x))).lower(x).compile()
    found = longest_kernels(lambda: jax.block_until_ready(program(x)), count=3)
    assert not found[0][0].startswith("while")  # its time is that of the products in it
    assert found[0][1] >= found[-1][1] > 0
    assert 0.5 < found[0][2] <= sum(share for _, _, share in found) < 1.001


def test_a_gpus_kernels_are_counted_by_their_own_names_though_they_overlap(tmp_path):
    text = """planes { name: "/device:GPU:0"
      event_metadata { key: 1 value { id: 1 name: "gemm" } } event_metadata { key: 2 value { id: 2 name: "norm" } }
      lines { name: "Stream #14" events { metadata_id: 1 offset_ps: 0 duration_ps: 3000000 }
              events { metadata_id: 2 offset_ps: 1000000 duration_ps: 1000000 } }
      lines { name: "Steps" events { metadata_id: 2 offset_ps: 0 duration_ps: 9000000 } } }"""
    path = tmp_path / "a.xplane.pb"
    path.write_bytes(jax.profiler.ProfileData.text_proto_to_serialized_xspace(text))
    assert list(_own_times(path)) == [("gemm", pytest.approx(3e-6)), ("norm", pytest.approx(1e-6))]


def test_table_lines_up_and_sets_numbers_right():
    text = render(("part", "time"), [("train", "3 s"), ("a", "12.5 s")])
    assert text == ("| part  |   time |\n"
                    "|-------|-------:|\n"
                    "| train |    3 s |\n"
                    "| a     | 12.5 s |")


def test_numbers_have_three_digits():
    assert [number(x) for x in (None, 0.012345, 1.2345, 123.45, 12345.6)] == ["", "0.0123", "1.23", "123", "12,346"]
    assert [seconds(x) for x in (None, 0.0123, 2.0, 600.0)] == ["", "12.3 ms", "2 s", "600 s"]
    assert [size(x) for x in (None, 2_345_678, 45_678_901, 3.456e9)] == ["", "2.35 MB", "45.7 MB", "3.46 GB"]
    assert np.isfinite(float(number(0.0)))
