"""A slice's result is a function of the slice: not of its batch, the batch size, or the devices."""

import jax
import numpy as np
import pytest
from flax import nnx

from hae_jax.diffusion.process import Process
from hae_jax.diffusion.schedule import make_schedule
from hae_jax.errors import UserError
from hae_jax.model import UNet, UNetConfig
from hae_jax.translation.batched import Slice, SliceTranslator, stacked
from hae_jax.translation.calibration import Calibration
from hae_jax.translation.forward_process import ForwardSettings
from hae_jax.translation.masks import make_masks

PROCESS = Process(make_schedule("linear", 50))
SETTINGS = ForwardSettings(steps=5, modality=(0, 3))
CALIBRATION = Calibration(0.999, (0.01, 0.01), (), (0, 3))


def _slices(count):
    images = np.random.default_rng(0).uniform(-1, 1, (count, 8, 8, 4)).astype(np.float32)
    return [Slice(image, f"case_{i % 3}", i // 3) for i, image in enumerate(images)]


def _translate(model, mesh, slices, batch_size=4, seed=0, settings=SETTINGS):
    translator = SliceTranslator(model, PROCESS, settings, batch_size=batch_size, seed=seed, mesh=mesh)
    found = list(translator(iter(slices)))
    assert [item for item, _ in found] == list(slices)
    return stacked(result for _, result in found)


def _assert_close(found, expected):
    for name, ours, theirs in zip(found._fields, found, expected, strict=True):
        # The counterpart is one step's prediction, in which rounding is magnified; maps and curves are averages.
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 if name == "healthy" else 1e-6, err_msg=name)


@pytest.fixture(scope="module")
def network():
    # One level with attention: it has the rule by which a batch decides whether its rows see the class context.
    model = UNet(UNetConfig(image_size=8, model_channels=32, num_res_blocks=1, channel_mult=(1,),
                            attention_resolutions=(1,)), rngs=nnx.Rngs(0))
    graph, params = nnx.split(model)
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(0)  # an untrained network answers 0 everywhere
    return nnx.merge(graph, tree.unflatten(a + rng.normal(0, 0.03, a.shape).astype(np.float32) for a in leaves))


@pytest.fixture(scope="module")
def on_one(network, mesh_of):
    return _translate(network, mesh_of(1), _slices(6))


def test_one_and_four_devices_agree(network, mesh_of, on_one):
    on_four = _translate(network, mesh_of(4), _slices(6))
    _assert_close(on_four, on_one)
    masks = [make_masks(r.mse, r.ref, r.diff, r.map, CALIBRATION, median=False) for r in (on_one, on_four)]
    np.testing.assert_array_equal(masks[0].mask_all, masks[1].mask_all)
    assert masks[0].mask_all.any()


def test_company_does_not_matter(network, mesh_of, on_one):
    order = [5, 2, 0, 3]
    company = _translate(network, mesh_of(1), [_slices(6)[i] for i in order])
    _assert_close(company, type(on_one)(*(field[order] for field in on_one)))


def test_batch_size_does_not_matter(toy_network, mesh_of):
    _assert_close(_translate(toy_network(), mesh_of(1), _slices(7), batch_size=3),
                  _translate(toy_network(), mesh_of(1), _slices(7), batch_size=7))


def test_noise_is_the_slice_s_own(toy_network, mesh_of):
    image = _slices(1)[0].image
    same_image = [Slice(image, "a", 1), Slice(image, "a", 2), Slice(image, "b", 1), Slice(image, "a", 1)]
    settings = ForwardSettings(steps=5, d_reverse=False)  # noise at every step
    mse = _translate(toy_network(), mesh_of(1), same_image, settings=settings).mse
    np.testing.assert_array_equal(mse[0], mse[3])
    other_seed = _translate(toy_network(), mesh_of(1), same_image, seed=1, settings=settings).mse
    for different in (mse[1], mse[2], other_seed[0]):
        assert np.abs(different - mse[0]).max() > 1e-4


def test_the_batch_size_is_rounded_up_to_the_devices(toy_network, mesh_of):
    make = lambda n: SliceTranslator(toy_network(), PROCESS, SETTINGS, batch_size=n, seed=0, mesh=mesh_of(4))
    assert [make(n).batch_size for n in (1, 4, 5)] == [4, 4, 8]
    with pytest.raises(UserError, match=r"translation\.batch_size is 0"):
        make(0)


def test_the_next_batch_is_read_before_results_are_waited_for(toy_network, mesh_of):
    read = []
    slices = (read.append(i) or item for i, item in enumerate(_slices(6)))
    translator = SliceTranslator(toy_network(), PROCESS, SETTINGS, batch_size=2, seed=0, mesh=mesh_of(1))
    results = translator(slices)
    next(results)
    assert len(read) == 4  # two batches, and no more: memory stays bounded
