"""A slice's result depends only on the slice, and not on its batch, the batch size or the devices."""

import types

import jax
import numpy as np
import pytest
from flax import nnx

from hae_jax.diffusion.process import Process
from hae_jax.diffusion.schedule import make_schedule
from hae_jax.errors import UserError
from hae_jax.localization import batched
from hae_jax.localization.batched import Slice, SliceTranslator
from hae_jax.localization.calibration import Calibration
from hae_jax.localization.forward_process import ForwardSettings
from hae_jax.localization.map_threshold import NO_FILTERS, stacked
from hae_jax.localization.published import Hae, make_masks
from hae_jax.model import UNet, UNetConfig

PROCESS = Process(make_schedule("linear", 50))
SETTINGS = ForwardSettings(steps=5, modality=(0, 3))
METHOD = Hae(PROCESS, SETTINGS)
CALIBRATION = Calibration(0.999, (0.01, 0.01), (), (0, 3))


def _slices(count):
    images = np.random.default_rng(0).uniform(-1, 1, (count, 8, 8, 4)).astype(np.float32)
    return [Slice(image, f"case_{i % 3}", i // 3, image) for i, image in enumerate(images)]


def _translate(model, mesh, slices, batch_size=4, seed=0, settings=SETTINGS):
    translator = SliceTranslator(model, Hae(PROCESS, settings), batch_size=batch_size, seed=seed, mesh=mesh)
    found = list(translator(iter(slices)))
    assert [item for item, _ in found] == list(slices)
    return stacked(result for _, result in found)


def _assert_close(found, expected):
    for name, ours, theirs in zip(found._fields, found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max(), err_msg=name)


@pytest.fixture(scope="module")
def network():
    # One level with attention, so that the network has the rule for the class context that depends on the batch.
    model = UNet(UNetConfig(image_size=8, model_channels=32, num_res_blocks=1, channel_mult=(1,),
                            attention_resolutions=(1,), num_classes=2, use_scale_shift_norm=True), rngs=nnx.Rngs(0))
    graph, params = nnx.split(model)
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(0)  # an untrained network's output is 0
    return nnx.merge(graph, tree.unflatten(a + rng.normal(0, 0.03, a.shape).astype(np.float32) for a in leaves))


@pytest.fixture(scope="module")
def on_one(network, mesh_of):
    return _translate(network, mesh_of(1), _slices(6))


def test_slices_of_all_cases_need_one_compilation(network, mesh_of, monkeypatch):
    translator = SliceTranslator(network, METHOD, batch_size=4, seed=0, mesh=mesh_of(1))
    compiled, lower = [], translator._run.lower
    monkeypatch.setattr(translator, "_run", types.SimpleNamespace(
        lower=lambda *arguments: compiled.append(1) or lower(*arguments)))
    assert len(list(translator(_slices(6)))) == 6
    assert len(list(translator(_slices(3)))) == 3  # as for calibration and then cases
    assert len(compiled) == 1


def test_one_and_four_devices_agree(network, mesh_of, on_one):
    on_four = _translate(network, mesh_of(4), _slices(6))
    _assert_close(on_four, on_one)
    masks = [make_masks(r.mse, r.ref, r.diff, r.map, CALIBRATION, NO_FILTERS) for r in (on_one, on_four)]
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
    same_image = [Slice(image, *place, image) for place in (("a", 1), ("a", 2), ("b", 1), ("a", 1))]
    settings = ForwardSettings(steps=5, d_reverse=False)  # noise at every step
    mse = _translate(toy_network(), mesh_of(1), same_image, settings=settings).mse
    np.testing.assert_allclose(mse[0], mse[3], rtol=1e-5)
    other_seed = _translate(toy_network(), mesh_of(1), same_image, seed=1, settings=settings).mse
    for different in (mse[1], mse[2], other_seed[0]):
        assert np.abs(different - mse[0]).max() > 1e-4


def test_the_batch_size_is_rounded_up_to_the_devices(toy_network, mesh_of):
    make = lambda n: SliceTranslator(toy_network(), METHOD, batch_size=n, seed=0, mesh=mesh_of(4))
    assert [make(n).batch_size for n in (1, 4, 5)] == [4, 4, 8]
    with pytest.raises(UserError, match=r"translation\.batch_size is 0"):
        make(0)


def test_the_next_batch_is_read_before_results_are_waited_for(toy_network, mesh_of):
    read = []
    slices = (read.append(i) or item for i, item in enumerate(_slices(6)))
    translator = SliceTranslator(toy_network(), METHOD, batch_size=2, seed=0, mesh=mesh_of(1))
    results = translator(slices)
    next(results)
    assert len(read) == 4  # not more than two batches, to limit memory


class _Crowded:
    """A device with memory for a number of slices. The error occurs at dispatch or when results are fetched."""

    def __init__(self, monkeypatch, room, late=False):
        self.sizes, self._room, self._late = [], room, late
        self._executable = SliceTranslator._executable
        monkeypatch.setattr(SliceTranslator, "_executable", lambda *arguments: self.limited(*arguments))

    def limited(self, translator, size, shape):
        run = self._executable(translator, size, shape)

        def call(*arguments):
            self.sizes.append(size)
            if size <= self._room:
                return run(*arguments)
            if self._late:
                return _Broken()
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 12 bytes")

        return call


class _Broken(tuple):
    def __iter__(self):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")


@pytest.mark.parametrize("late", [False, True])
def test_out_of_memory_makes_batches_smaller_and_is_said(toy_network, mesh_of, monkeypatch, on_message, late):
    expected = _translate(toy_network(), mesh_of(1), _slices(11), batch_size=4)
    said, crowded = [], _Crowded(monkeypatch, room=2, late=late)
    on_message(said.append)
    translator = SliceTranslator(toy_network(), METHOD, batch_size=8, seed=0, mesh=mesh_of(1))
    found = list(translator(iter(_slices(11))))
    assert [item.index for item, _ in found] == [item.index for item in _slices(11)]
    _assert_close(stacked(result for _, result in found), expected)
    assert translator.batch_size == 2
    assert [message.split(":")[0] for message in said] == [
        "out of memory with batches of 8 slices", "out of memory with batches of 4 slices"]
    assert crowded.sizes.count(8) == 2  # two batches had started; this size is not tried again


def test_no_room_for_a_single_slice(toy_network, mesh_of, monkeypatch):
    _Crowded(monkeypatch, room=0)
    translator = SliceTranslator(toy_network(), METHOD, batch_size=2, seed=0, mesh=mesh_of(1))
    with pytest.raises(UserError, match="one slice on each device does not fit"):
        list(translator(iter(_slices(3))))


def test_other_errors_of_the_device_are_not_hidden(toy_network, mesh_of, monkeypatch):
    def broken(self, size, shape):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(SliceTranslator, "_executable", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        _translate(toy_network(), mesh_of(1), _slices(3))


def test_the_batch_size_can_be_chosen_by_memory(toy_network, mesh_of, monkeypatch, on_message):
    monkeypatch.setattr(batched, "LARGEST_BATCH", 16)
    said = []
    on_message(said.append)

    def chosen(limit):
        translator = SliceTranslator(toy_network(), METHOD, batch_size=1, seed=0, mesh=mesh_of(2), max_memory_gb=limit)
        translator.prepare((8, 8, 4))
        return translator

    ample = chosen(1.0)
    assert ample.batch_size == 16
    needed = [ample._planned_gb(size, (8, 8, 4)) for size in (4, 16)]
    assert needed[0] < needed[1]
    tight = chosen(sum(needed) / 2)
    assert 4 <= tight.batch_size < 16
    assert tight._planned_gb(tight.batch_size, (8, 8, 4)) <= sum(needed) / 2
    assert f"batches of {tight.batch_size} slices" in said[-1]
    with pytest.raises(UserError, match="--max-memory 1e-06: a batch of 2 slices"):
        chosen(1e-6)
