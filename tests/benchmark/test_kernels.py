"""The choice among kernels of attention, with XLA's in the place of cuDNN's: by time, unless one fails or is wrong."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hae_jax.benchmark import blocks, kernels
from hae_jax.benchmark.kernels import fastest_attention
from hae_jax.commands import devices
from hae_jax.errors import UserError
from hae_jax.ops import dropped_attention, fused_attention
from hae_jax.ops.platform import ATTENTION, attention_kernels


@pytest.fixture(autouse=True)
def _little(monkeypatch):
    monkeypatch.setenv(ATTENTION, "xla")  # so that whatever a test leaves there is taken away
    monkeypatch.delenv(ATTENTION)
    monkeypatch.setattr(blocks, "_SIZES", {"attention": (8, 32), "patches": (640, 16)})
    monkeypatch.setattr("hae_jax.benchmark.measure._SHORTEST_TURN", 1e-9)
    monkeypatch.setattr(kernels, "_BATCH", 2)


@pytest.fixture
def gpu(monkeypatch):
    """What is asked for goes the way of cuDNN's kernel, which XLA computes; says what has been traced."""
    traced = []
    xla = jax.nn.dot_product_attention

    def attend(q, k, v, implementation, **options):
        traced.append(implementation)
        return xla(q, k, v, **options)

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax.nn, "dot_product_attention", attend)
    return traced


def _timed(monkeypatch, *seconds):
    """Instead of the clock: what each kernel's program takes beside XLA's, one kernel after the other."""
    times = iter(seconds)
    monkeypatch.setattr(kernels, "in_turns", lambda calls, repeats: np.array(
        [[time] * repeats for _, time in zip(calls, next(times), strict=True)]))


@pytest.mark.parametrize(("seconds", "best"), [
    ((2e-3, 1e-3), "cudnn"), ((1e-3, 2e-3), "xla"), ((1e-3, 0.95e-3), "xla")])
def test_the_faster_one_is_chosen_where_it_is_worth_it(gpu, monkeypatch, seconds, best):
    said = []
    _timed(monkeypatch, seconds, (1e-3, 2e-3))
    assert fastest_attention("bfloat16", gradients=True, dropout=False, say=said.append) == best
    assert gpu == ["cudnn"] * 2
    assert said[:1] == [f"attention at 8 px, with gradients: by {best} (xla {1e3 * seconds[0]:.2f} ms, "
                    f"cudnn {1e3 * seconds[1]:.2f} ms)"]


def test_each_kernel_is_chosen_for_itself(gpu, monkeypatch):
    """The kernel for dropout as an ordinary program, with what it drops: the same as XLA's way."""
    monkeypatch.setattr(dropped_attention, "INTERPRET", True)
    said = []
    _timed(monkeypatch, (1e-3, 2e-3), (2e-3, 1e-3), (2e-3, 1e-3))  # cuDNN loses on dense attention, the others win
    assert fastest_attention("bfloat16", gradients=True, dropout=True, say=said.append) == "cudnn_sparse+pallas"
    assert [line.partition(":")[0] for line in said] == [
        "attention at 8 px, with gradients", "sparse attention, 640 tokens, with gradients",
        "sparse attention with dropout, 640 tokens, with gradients"]
    _timed(monkeypatch, (2e-3, 1e-3), (1e-3, 2e-3))  # winning on dense attention says nothing about rows
    assert fastest_attention("bfloat16", gradients=False, dropout=False, say=str) == "cudnn"


def test_programs_are_really_timed(gpu, monkeypatch):
    slow = fused_attention.attend_with_token

    def sleeping(q, *rest):
        jax.debug.callback(lambda: time.sleep(0.2))
        return slow(q, *rest)

    monkeypatch.setattr(fused_attention, "attend_with_token", sleeping)
    assert "cudnn" not in fastest_attention("bfloat16", gradients=False, dropout=False, say=str).split("+")


def test_a_kernel_that_does_not_run(gpu, monkeypatch):
    def attend(*_, **__):
        raise RuntimeError("cuDNN is not detected.\nand more")

    said = []
    monkeypatch.setattr(jax.nn, "dot_product_attention", attend)
    assert fastest_attention("bfloat16", gradients=False, dropout=False, say=said.append) == "xla"
    assert said[0] == "attention at 8 px: cudnn's kernel does not run here (cuDNN is not detected.)"


@pytest.mark.parametrize("wrong", [0.0, jnp.nan])
def test_a_kernel_that_is_wrong(gpu, monkeypatch, wrong):
    said = []
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda q, k, v, **_: wrong * q)
    _timed(monkeypatch, (1.0,), (1.0,))
    assert fastest_attention("bfloat16", gradients=False, dropout=False, say=said.append) == "xla"
    assert said[0] == "attention at 8 px: cudnn's kernel gives other numbers than XLA's here"


def test_a_misspelt_kernel_is_named_wherever_the_process_runs(monkeypatch):
    monkeypatch.setenv(ATTENTION, "cuddn")
    with pytest.raises(UserError, match="HAE_JAX_ATTENTION is 'cuddn'"):
        devices.choose_attention("float32", gradients=True)


def test_only_gpus_choose_and_the_environment_goes_first(monkeypatch):
    monkeypatch.setattr(kernels, "fastest_attention", lambda dtype, gradients, dropout: "cudnn")
    devices.choose_attention("bfloat16", gradients=True)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    devices.choose_attention("float32", gradients=True)
    assert attention_kernels() == ()
    monkeypatch.setenv(ATTENTION, "xla")
    devices.choose_attention("bfloat16", gradients=True)
    assert attention_kernels() == ()
    monkeypatch.delenv(ATTENTION)
    devices.choose_attention("bfloat16", gradients=True)
    assert attention_kernels() == ("cudnn",)
