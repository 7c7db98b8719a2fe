"""Weights are converted between PyTorch's layers and ours in both directions without changing outputs."""

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from network_helpers import SMALL, assert_close, filled
from torch_modules import module_of, tensors

from hae_jax.model import VARIANTS, UNet, UNetConfig
from hae_jax.model.attention import AttentionBlock
from hae_jax.model.config import HYBRID_HEADS
from hae_jax.model.hybrid import MultiHeadAttention
from hae_jax.model.layers import Conditioning, ParameterKeys, conv, group_norm, layer_norm, linear
from hae_jax.torch_interop.files import read_state_dict, write_state_dict
from hae_jax.torch_interop.weights import load_torch_state, torch_state, walk

CONFIG = UNetConfig(**SMALL, sparse_pattern="dense")
C, HEADS, TOLERANCE = 32, 4, 1e-5  # of the largest value


class TorchAttentionBlock(torch.nn.Module):
    """GroupNorm, 1x1 convolutions over pixels, and head-major q, k, v, as in the published code."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.GroupNorm(32, C)
        self.qkv = torch.nn.Conv1d(C, 3 * C, 1)
        self.encoder_kv = torch.nn.Conv1d(CONFIG.embedding_width, 2 * C, 1)
        self.proj_out = torch.nn.Conv1d(C, C, 1)

    def forward(self, x):
        batch, _, height, width = x.shape
        qkv = self.qkv(self.norm(x).reshape(batch, C, -1))
        q, k, v = qkv.reshape(batch * HEADS, 3 * C // HEADS, -1).chunk(3, dim=1)
        weights = torch.softmax(torch.einsum("bct,bcs->bts", q, k) / (C // HEADS) ** 0.5, dim=-1)
        out = torch.einsum("bts,bcs->bct", weights, v).reshape(batch, C, -1)
        return x + self.proj_out(out).reshape(batch, C, height, width)


class TorchLayers(torch.nn.Module):
    """Layers of PyTorch."""

    def __init__(self):
        super().__init__()
        self.dense = torch.nn.Linear(C, 48)
        self.conv = torch.nn.Conv2d(C, 24, 3, padding=1)
        self.down = torch.nn.Conv2d(C, C, 3, stride=2, padding=1)
        self.group_norm = torch.nn.GroupNorm(32, C)
        self.layer_norm = torch.nn.LayerNorm(C)
        self.attention = torch.nn.MultiheadAttention(C, HYBRID_HEADS, batch_first=True)
        self.block = TorchAttentionBlock()
        self.labels = torch.nn.Embedding(5, C)

    def outputs(self, image, tokens, labels):
        image, tokens = torch.from_numpy(image.transpose(0, 3, 1, 2).copy()), torch.from_numpy(tokens)
        images = (layer(image).permute(0, 2, 3, 1) for layer in (self.conv, self.down, self.group_norm, self.block))
        attended = self.attention(tokens, tokens, tokens, need_weights=False)[0]
        rest = self.dense(tokens), self.layer_norm(tokens), attended, self.labels(torch.from_numpy(labels))
        return [out.detach().numpy() for out in (*images, *rest)]


class OurLayers(nnx.Module):
    """The same layers of this project."""

    def __init__(self):
        keys, dtype = ParameterKeys(jax.random.key(0)), "float32"
        self.dense = linear(C, 48, keys, dtype=dtype)
        self.conv = conv(C, 24, 3, CONFIG, keys)
        self.down = conv(C, C, 3, CONFIG, keys, stride=2)
        self.group_norm = group_norm(C, keys, dtype=dtype)
        self.layer_norm = layer_norm(C, keys, dtype=dtype)
        self.attention = MultiHeadAttention(C, CONFIG, keys)
        self.block = AttentionBlock(C, HEADS, CONFIG, keys)
        self.labels = nnx.Embed(5, C, rngs=keys)
        self.parameter_paths = tuple(path for path, _ in walk(self))

    def outputs(self, image, tokens, labels):
        images = self.conv(image), self.down(image), self.group_norm(image), self.block(image, Conditioning(emb=None))
        attended = self.attention(tokens, None, None, is_sparse=False)
        return [np.asarray(out) for out in (
            *images, self.dense(tokens), self.layer_norm(tokens), attended, self.labels(labels))]


@pytest.fixture
def arrays() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """An image [2, 6, 10, C], tokens [2, 7, C], labels [4]."""
    rng = np.random.default_rng(0)
    image, tokens = (3 * rng.standard_normal(shape, np.float32) + 1 for shape in ((2, 6, 10, C), (2, 7, C)))
    image[1] /= 100  # a variance of 1e-3, for which the norm's epsilon has an effect
    tokens[1] /= 100
    return image, tokens, np.array([0, 4, 2, 2])


def test_plain_layers_import(arrays):
    torch.manual_seed(0)
    theirs, ours = TorchLayers(), OurLayers()
    with torch.no_grad():
        for parameter in theirs.parameters():  # also of norms and the zero biases
            parameter += 0.1 * torch.randn_like(parameter)
    load_torch_state(ours, {name: value.numpy() for name, value in theirs.state_dict().items()})
    for mine, reference in zip(ours.outputs(*arrays), theirs.outputs(*arrays), strict=True):
        assert_close(mine, reference, TOLERANCE)


def test_plain_layers_export(arrays):
    ours, theirs = OurLayers(), TorchLayers()
    rng = np.random.default_rng(1)
    for _, parameter in walk(ours):
        parameter.set_value(parameter[...] + 0.1 * rng.standard_normal(parameter.shape, np.float32))
    state = torch_state(ours)
    theirs.load_state_dict(tensors(state), strict=True)
    assert list(state) == list(theirs.state_dict())
    for mine, reference in zip(ours.outputs(*arrays), theirs.outputs(*arrays), strict=True):
        assert_close(mine, reference, TOLERANCE)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_network_goes_to_a_file_that_pytorch_loads_strictly_and_back(variant, tmp_path):
    graph, params = filled(UNetConfig(**SMALL | {"variant": variant}))
    ours: UNet = nnx.merge(graph, params)
    state = torch_state(ours)
    write_state_dict(tmp_path / "model.pt", state)
    theirs = module_of({name: value.shape for name, value in state.items()})
    theirs.load_state_dict(torch.load(tmp_path / "model.pt"), strict=True)
    # PyTorch numbers an optimiser's parameters in this order.
    assert [name for name, _ in theirs.named_parameters()] == list(state)
    torch.save(theirs.state_dict(), tmp_path / "again.pt")
    back = nnx.merge(graph, jax.tree.map(np.zeros_like, params))
    load_torch_state(back, read_state_dict(tmp_path / "again.pt"))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(back, nnx.Param), params)


def test_a_network_with_another_name_is_not_loaded_strictly(golden):
    lines = (golden / "hae_tiny.keys.tsv").read_text().splitlines()
    shapes = {key: tuple(map(int, shape.split("x"))) for key, shape in (line.split("\t") for line in lines)}
    state = torch_state(nnx.merge(*filled(UNetConfig(**SMALL))))
    with pytest.raises(RuntimeError, match="Missing key"):
        module_of(shapes).load_state_dict(tensors(state), strict=True)
