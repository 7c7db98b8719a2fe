"""The baselines compute what ours compute: the same numbers, by the detours that they are there for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hae_jax.benchmark import naive
from hae_jax.diffusion.process import Process
from hae_jax.diffusion.schedule import make_schedule
from hae_jax.errors import UserError
from hae_jax.localization import forward_process
from hae_jax.model import UNet, UNetConfig, attention, layers, sparse
from hae_jax.model.conditioning import Context
from hae_jax.model.flops import count_flops
from hae_jax.ops import group_norm

# 12 x 12 tokens in the hybrid block, enough to be sparse; two of its four rows see no label.
NETWORK = {"image_size": 24, "in_channels": 2, "model_channels": 32, "channel_mult": (1, 1), "num_res_blocks": 1,
           "attention_resolutions": (2,), "num_classes": 2, "num_heads": 4, "use_scale_shift_norm": True}
STEPS = 4


def small_network(variant):
    """A network in which nothing is zero, and so every path matters."""
    network = UNetConfig(variant=variant, **NETWORK)
    graph, shapes = nnx.split(nnx.eval_shape(lambda: UNet(network, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda a: jnp.asarray(rng.normal(0, 0.1, a.shape), jnp.float32), shapes)
    return network, graph, params


def forward_of(graph):
    """A function of the parameters, new at each call: JAX would otherwise remember how it traced the last one."""
    x = jnp.asarray(np.random.default_rng(1).normal(size=(4, 24, 24, 2)), jnp.float32)
    t, y, drop = jnp.arange(4) * 200, jnp.array([0, 1, 0, 1]), jnp.array([False, True, False, True])
    return lambda params: nnx.merge(graph, params)(x, t, y, drop=drop)


def test_network_is_the_same_with_its_gradients():
    network, graph, params = small_network("hae_v2c")

    def output_and_gradients():
        forward = forward_of(graph)

        def half_square(params):
            out = forward(params)
            return jnp.square(out).mean() / 2, out

        return jax.jit(jax.grad(half_square, has_aux=True))(params)

    gradients, ours = output_and_gradients()
    with naive.swapped_in(naive.pieces_of("naive", network, translation=False)):
        their_gradients, theirs = output_and_gradients()
    assert_same_tree(theirs, ours)
    assert_same_tree(their_gradients, gradients)


@pytest.mark.parametrize("baseline", ["context", "sparse"])
def test_each_piece_is_a_detour(baseline):
    network, graph, params = small_network("hae_v2c")
    ours = count_flops(forward_of(graph), params)
    with naive.swapped_in(naive.pieces_of(baseline, network, translation=False)):
        theirs = count_flops(forward_of(graph), params)
    assert theirs > ours


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (1, 1)])
def test_convolution_is_the_same(kernel, stride):
    rng = np.random.default_rng(0)
    x, weight = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 8, 8, 4), (kernel, kernel, 4, 8)))
    assert_same(lambda conv2d, *inputs: conv2d(*inputs, stride, kernel // 2), layers.conv2d, naive.conv2d, x, weight)


@pytest.mark.parametrize("silu", [True, False])
def test_norm_is_the_same(silu):
    rng = np.random.default_rng(0)
    inputs = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 8, 8, 12), (2, 12), (2, 12)))
    fixed = 3, 1e-5, silu, jnp.dtype("float32")
    assert_same(lambda norm, *inputs: norm(*inputs, *fixed), group_norm.group_norm, naive.plain_group_norm, *inputs)


@pytest.mark.parametrize("seen", [True, False])
def test_context_is_the_same(seen):
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, 2, 20, 4, 8)).astype(np.float32)
    c, kernel, bias = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 16), (16, 64), (64,)))

    def attend(function, q, k, v, c, kernel, bias):
        return function(q, k, v, Context(c, jnp.array([True, seen])), kernel, bias)

    assert_same(attend, attention.attend_with_context, naive.attend_with_context, q, k, v, c, kernel, bias)


@pytest.mark.parametrize("tokens", [144, 150])  # 150: the last block is ragged
def test_sparse_attention_is_the_same(tokens):
    q, k, v = np.random.default_rng(0).normal(size=(3, 2, tokens, 2, 8)).astype(np.float32)
    links = sparse.block_links(tokens, jax.random.key(0))
    assert_same(lambda function, *qkv: function(*qkv, links), sparse.attend_blocks, naive.attend_blocks, q, k, v)


def assert_same(call, ours, theirs, *inputs):
    """Outputs and gradients of `call(function, *inputs)` agree."""
    results = []
    for function in (ours, theirs):
        @jax.jit
        def both(*inputs, function=function):
            out, pull = jax.vjp(lambda *inputs: call(function, *inputs), *inputs)
            return out, pull(jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape))

        results.append(both(*inputs))
    assert_same_tree(*results)


def assert_same_tree(actual, desired):
    """Every array agrees, relative to the largest number in the tree."""
    largest = max(np.abs(a).max() for a in jax.tree.leaves(desired))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * largest), actual, desired)


def small_model(x, t, y=None, null=False):
    """Stands in for a network: a matrix product over the pixels, in which the label matters less and less with t."""
    size = x.shape[1]
    shift = 0 * t if null is True else jnp.where(null, 0, (1 + y) * jnp.exp(-t / 80))
    mixing = jnp.asarray(np.random.default_rng(0).normal(0, 1 / size, (size, size)), jnp.float32)
    shift, t = (a[:, None, None, None] for a in (shift, t))
    return jnp.einsum("ij,bjwc->biwc", mixing, jnp.tanh(x + t / 1000 + shift * jnp.cos(t / 100 + 3 * x)))


def translation(settings):
    """The forward process with the small model, new at each call."""
    process = Process(make_schedule("linear", 1000, "20"))
    x0 = jnp.asarray(np.random.default_rng(2).uniform(-1, 1, (3, 8, 8, 4)), jnp.float32)
    keys = jax.random.split(jax.random.key(0), 3)

    def translate(x0):
        denoisers = forward_process.network_denoisers(small_model)
        noise = forward_process.step_noise(keys, x0.shape[1:])
        return forward_process.forward_process(process, denoisers, x0, noise, settings)

    return jax.jit(translate).lower(x0).compile(), x0


@pytest.mark.parametrize("baseline", ["passes", "stacks", "naive"])
@pytest.mark.parametrize("reference", ["healthy", "null"])
def test_translation_is_the_same(baseline, reference):
    settings = forward_process.ForwardSettings(12, reference=reference)
    ours, x0 = translation(settings)
    with naive.swapped_in(naive.pieces_of(baseline, UNetConfig(num_classes=2), translation=True)):
        theirs, _ = translation(settings)
    ours, theirs = ours(x0), theirs(x0)
    assert len(np.unique(ours.t_e)) > 1
    np.testing.assert_array_equal(theirs.t_e, ours.t_e)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5), ours, theirs)


def test_translation_by_a_network_with_all_pieces_naive_is_the_same():
    network, graph, params = small_network("hae_v2c")
    process = Process(make_schedule("linear", 1000, "20"))
    settings = forward_process.ForwardSettings(3, modality=(0, 1))
    x0 = jnp.asarray(np.random.default_rng(2).uniform(-1, 1, (2, 24, 24, 2)), jnp.float32)
    keys = jax.random.split(jax.random.key(0), 2)

    def translated(pieces):
        def translate(params, x0):
            return forward_process.forward_process(
                process, forward_process.network_denoisers(nnx.merge(graph, params)), x0,
                forward_process.step_noise(keys, x0.shape[1:]), settings)

        with naive.swapped_in(pieces):
            return jax.jit(translate)(params, x0)

    ours, theirs = translated([]), translated(naive.pieces_of("naive", network, translation=True))
    np.testing.assert_array_equal(theirs.t_e, ours.t_e)
    assert_same_tree(theirs, ours)


def test_compiler_keeps_the_fourth_pass():
    settings = forward_process.ForwardSettings(2)
    three, _ = translation(settings)
    with naive.swapped_in(["passes"]):
        four, _ = translation(settings)
    products = [compiled.as_text().count(" dot(") for compiled in (three, four)]
    assert products == [2, 4]  # two of ours are one, over twice the rows


def test_nothing_stays_swapped():
    before = {name: [getattr(module, attribute) for module, attribute, _ in piece.swaps]
              for name, piece in naive._PIECES.items()}
    with pytest.raises(ZeroDivisionError), naive.swapped_in(naive.PIECES):
        raise ZeroDivisionError
    assert before == {name: [getattr(module, attribute) for module, attribute, _ in piece.swaps]
                      for name, piece in naive._PIECES.items()}


def test_pieces_are_those_that_change_something():
    whole, plain = UNetConfig(num_classes=2), UNetConfig(variant="fpdm", num_classes=2)
    assert naive.pieces_of("naive", whole, translation=False) == ("context", "sparse", "convolution", "norm")
    assert naive.pieces_of("naive", whole, translation=True) == naive.PIECES
    assert naive.pieces_of("sparse", plain, translation=False) == ()
    assert naive.pieces_of("passes", whole, translation=False) == ()
    assert naive.pieces_of("naive", UNetConfig(sparse_pattern="dense"), translation=False) == (
        "convolution", "norm")
    with pytest.raises(UserError, match="choose among naive, context"):
        naive.pieces_of("speed", whole, translation=False)
