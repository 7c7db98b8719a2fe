"""State dicts are loaded strictly or refused, and are exported in PyTorch's form."""

import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from network_helpers import SMALL, abstract, filled

from hae_jax.errors import UserError
from hae_jax.model import UNet, UNetConfig
from hae_jax.torch_interop.weights import load_torch_state, torch_state

CONFIG = UNetConfig(**SMALL)


@pytest.fixture
def model() -> UNet:
    return nnx.merge(*filled(CONFIG))


def assert_equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert list(a) == list(b)
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name, strict=True)


def test_every_mismatch_is_listed_and_nothing_is_changed(model: UNet):
    before = torch_state(model)
    state = {name: value + 1 for name, value in before.items()}
    state["out.7.weight"] = state.pop("out.2.weight")
    del state["time_embed.0.bias"]
    state["time_embed.2.weight"] = state["time_embed.2.weight"][:-1]
    state["label_emb.weight"] = state["label_emb.weight"].T
    with pytest.raises(UserError) as caught:
        load_torch_state(model, state)
    message = str(caught.value)
    for part in ("5 entries", "unknown: out.7.weight", "missing: out.2.weight", "missing: time_embed.0.bias",
                 "misshapen: time_embed.2.weight is (127, 128), the network has (128, 128)",
                 "misshapen: label_emb.weight is (32, 2), the network has (2, 32)"):
        assert part in message
    assert "\n" not in message
    assert_equal(torch_state(model), before)


def test_another_variants_weights_are_refused(model: UNet):
    other = torch_state(nnx.merge(*filled(UNetConfig(variant="hae_v2", **SMALL))))
    with pytest.raises(UserError, match="check the variant"):
        load_torch_state(model, other)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_precisions_become_float32(model: UNet, dtype):
    state = {name: (value / 2).astype(dtype) for name, value in torch_state(model).items()}
    load_torch_state(model, state)
    assert_equal(torch_state(model), {name: value.astype(np.float32) for name, value in state.items()})


def test_order_of_entries_does_not_matter_and_a_loaded_model_is_a_copy(model: UNet):
    state = torch_state(model)
    wanted = {name: value + 1 for name, value in state.items()}
    given = dict(reversed([(name, value.copy()) for name, value in wanted.items()]))
    load_torch_state(model, given)
    for value in given.values():
        value[...] = 0
    assert_equal(torch_state(model), wanted)


def test_an_abstract_model_is_filled(model: UNet):
    state, empty = torch_state(model), nnx.merge(*abstract(CONFIG))
    load_torch_state(empty, state)
    assert_equal(torch_state(empty), state)


def test_arrays_can_be_written_to_without_changing_the_model(model: UNet):
    first, wanted = torch_state(model), torch_state(model)
    for value in first.values():
        assert value.flags.c_contiguous
        assert value.flags.writeable
        value[...] = 0
    assert_equal(torch_state(model), wanted)
