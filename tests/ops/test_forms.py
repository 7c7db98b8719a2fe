"""The rule for the choice of forms of operations, and XLA's options."""

import types

import jax
import jax.numpy as jnp
import pytest

from hae_jax.ops import forms
from hae_jax.ops.forms import attention_form, compiler_options, convolution_form


@pytest.mark.parametrize(("choice", "dtype", "platform", "form"), [
    ("auto", "float32", "cpu", "rows"), ("auto", "bfloat16", "gpu", "xla"), ("auto", "bfloat16", "tpu", "xla"),
    ("cudnn", "bfloat16", "gpu", "cudnn"), ("cudnn", "float32", "gpu", "xla"), ("cudnn", "bfloat16", "cpu", "rows"),
    ("cudnn", "bfloat16", "tpu", "xla"), ("xla", "float32", "cpu", "xla"),
    ("materialised", "float32", "gpu", "materialised")])
def test_attention(choice, dtype, platform, form, monkeypatch):
    monkeypatch.setattr(forms, "_compute_capability", lambda: 7.5)
    assert attention_form(choice, dtype, platform) == form


@pytest.mark.parametrize(("capability", "dtype", "form"), [
    ("8.0", "bfloat16", "cudnn"), ("9.0", "float16", "cudnn"), ("9.0", "float32", "xla"), ("7.5", "float16", "xla"),
    ("gfx90a", "bfloat16", "xla"), (None, "bfloat16", "xla")])
def test_automatic_attention_is_cudnn_s_on_gpus_that_have_it(capability, dtype, form, monkeypatch):
    device = types.SimpleNamespace(**({} if capability is None else {"compute_capability": capability}))
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert attention_form("auto", dtype, "gpu") == form


@pytest.mark.parametrize(("choice", "platform", "form"), [
    ("auto", "cpu", "winograd"), ("auto", "gpu", "xla"), ("xla", "cpu", "xla"), ("winograd", "gpu", "winograd")])
def test_convolution(choice, platform, form):
    assert convolution_form(choice, platform) == form


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_options_of_a_platform_are_known_to_xla(platform, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    options = compiler_options()
    assert options
    assert all(name.startswith(f"xla_{platform}_") for name in options)
    jax.jit(jnp.sin).lower(jnp.ones(3)).compile(options)  # raises for unknown options


def test_other_platforms_have_no_options(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert compiler_options() == {}
