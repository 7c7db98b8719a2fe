"""Slices equal those of the published preparation, and can be put back into the volume."""

import dataclasses

import nibabel as nib
import numpy as np
import pytest

from hae_jax.data.cases import find_cases, read_case
from hae_jax.data.slices import (
    CaseSlices,
    SlicedCase,
    case_slices,
    from_model_range,
    head,
    intensity_scales,
    normalise_volumes,
    resize,
    sliced,
    slices_to_volume,
    to_model_range,
)
from hae_jax.errors import UserError


@pytest.fixture(scope="module")
def case(golden):
    return read_case(find_cases(golden / "brats_raw")[0])


def test_slices_equal_the_published_ones(golden, case):
    expected = np.load(golden / "brats_slices.npz")
    slices = case_slices(case, 128)
    np.testing.assert_array_equal(slices.index, expected["slice_index"])
    np.testing.assert_allclose(slices.images.transpose(0, 3, 1, 2), expected["x"], rtol=0, atol=5e-7)
    np.testing.assert_allclose(slices.masks[:, None], expected["y"], rtol=0, atol=5e-7)
    np.testing.assert_array_equal(slices.masks[:, None] > 0.5, expected["mask"])
    np.testing.assert_array_equal((slices.masks > 0.5).any((1, 2)), expected["label"])
    scaled = to_model_range(slices.images)
    np.testing.assert_allclose(scaled.transpose(0, 3, 1, 2), expected["model_input"], rtol=0, atol=1e-6)
    assert slices.images.dtype == slices.masks.dtype == scaled.dtype == np.float32
    assert slices.shape == case.volumes.shape[:3]


def test_resize_equals_pytorch(golden):
    expected = np.load(golden / "extras.npz")
    np.testing.assert_allclose(resize(expected["resize_in"], 128), expected["resize_out_128"], rtol=0, atol=1e-6)


def test_resize_keeps_leading_axes_and_treats_each_image_alone():
    images = np.random.default_rng(0).random((2, 3, 20, 31)).astype(np.float32)
    resized = resize(images, (9, 45))
    assert resized.shape == (2, 3, 9, 45)
    np.testing.assert_array_equal(resized[1, 2], resize(images[1, 2], (9, 45)))
    np.testing.assert_array_equal(resize(images, (20, 31)), images)
    np.testing.assert_allclose(resize(np.full((5, 7), 3.0), 16), 3.0)


def test_empty_middle_slice_is_kept_and_blank_ends_are_cut(case):
    volumes = case.volumes[:, :, [0, 1, 2, 0, 3, 0]]  # slice 0 of the case is blank
    slices = case_slices(dataclasses.replace(case, volumes=volumes, mask=None), 32)
    np.testing.assert_array_equal(slices.index, [1, 2, 3, 4])
    assert slices.masks is None
    assert not slices.images[2].any()


def test_blank_case_is_refused(case):
    specks = np.zeros((6, 6, 8, 4), np.float32)
    specks[3, 3, range(0, 8, 2), range(4)] = 700  # one voxel per modality, each in another slice
    with pytest.raises(UserError, match=f"{case.name}: no axial slice"):
        case_slices(dataclasses.replace(case, volumes=specks, mask=None))


def test_normalisation_ignores_scale_and_background(case):
    def normalised(volumes):
        return normalise_volumes(volumes, intensity_scales(volumes))

    expected = normalised(case.volumes)
    scaled = normalised(case.volumes * np.float32([1, 10, 0.5, 3]))
    np.testing.assert_allclose(scaled, expected, rtol=1e-6)
    padded = normalised(np.pad(case.volumes, ((0, 9), (0, 0), (3, 0), (0, 0))))
    np.testing.assert_array_equal(padded[:-9, :, 3:], expected)
    for channel in range(4):
        values = expected[..., channel]
        assert np.percentile(values[values > 0], 99) == pytest.approx(1, abs=1e-6)


def test_model_range_is_per_slice_and_channel():
    rng = np.random.default_rng(0)
    images = rng.random((3, 8, 8, 4)).astype(np.float32) * rng.uniform(1, 9, (3, 1, 1, 4)).astype(np.float32)
    scaled = to_model_range(images)
    np.testing.assert_allclose(scaled.min((1, 2)), -1, atol=1e-6)
    np.testing.assert_allclose(scaled.max((1, 2)), 1, atol=1e-3)
    np.testing.assert_array_equal(to_model_range(images[1:2, ..., 2:3]), scaled[1:2, ..., 2:3])
    np.testing.assert_array_equal(to_model_range(np.full((4, 4, 1), 5.0)), -1)


def test_model_range_of_a_volume_is_the_same_for_all_its_slices():
    images = np.random.default_rng(0).uniform(0, 1.4, (3, 8, 8, 4)).astype(np.float32)
    brighter = images.copy()
    brighter[0, 2, 3, 1] = 1.5
    scaled, other = to_model_range(images, "volume"), to_model_range(brighter, "volume")
    assert np.count_nonzero(scaled != other) == 1  # a lesion does not make its surroundings darker
    assert other[0, 2, 3, 1] == pytest.approx(1)
    np.testing.assert_array_equal(to_model_range(np.float32([[[0], [9]]]), "volume"), [[[-1], [1]]])
    np.testing.assert_allclose(from_model_range(scaled, images, "volume"), images, atol=1e-6)
    with pytest.raises(UserError, match=r"data\.scaling is 'case': choose slice or volume"):
        to_model_range(images, "case")


def test_slices_return_to_their_place(case):
    slices = case_slices(case, 128)
    back = slices_to_volume(slices.masks, slices.index, slices.shape) > 0.5
    kept = np.zeros_like(case.mask)
    kept[:, :, slices.index] = case.mask[:, :, slices.index]
    dice = 2 * (back & kept).sum() / (back.sum() + kept.sum())
    assert dice > 0.98
    outside = np.setdiff1d(np.arange(slices.shape[2]), slices.index)
    assert not back[:, :, outside].any()


def test_volume_of_smooth_image_survives_the_round_trip():
    x, y = np.meshgrid(np.linspace(0, 3, 60), np.linspace(0, 2, 48), indexing="ij")
    image = np.sin(x) + np.cos(y)
    volume = slices_to_volume(resize(image[None], 128), np.array([4]), (60, 48, 9))
    np.testing.assert_allclose(volume[:, :, 4], image, atol=0.02)


def test_a_healthy_counterpart_equal_to_the_input_is_the_input(tmp_path, case_writer):
    case_writer(tmp_path, "a", seed=0)
    case = sliced(read_case(find_cases(tmp_path)[0]), 24)
    back = case.healthy_volume(case.inputs[..., 3], 3)
    expected = case.volume(case.slices.images[..., 3] * case.slices.scales[3])
    np.testing.assert_allclose(back, expected, atol=1e-2)  # raw intensities, 50 to 250
    assert 50 < back[..., 1:-1].mean() < 150


def test_empty_slices_between_others_are_left_out(tmp_path, case_writer):
    case_writer(tmp_path, "a", seed=0)
    for path in (tmp_path / "a").glob("a_*.nii.gz"):
        image = nib.load(path)
        values = np.asarray(image.dataobj).copy()
        values[..., 4] = 0
        nib.save(nib.Nifti1Image(values, image.affine), path)
    case = sliced(read_case(find_cases(tmp_path)[0]), 16)
    assert list(case.slices.index) == [1, 2, 3, 5, 6, 7]
    assert len(case.inputs) == len(case.slice_truth) == 6


def test_nothing_is_found_where_nothing_is_shown(prepared):
    volumes = np.zeros((7, 8, 5, 2))
    volumes[1:6, 1:7, 1:4, 0] = 1
    volumes[3, 4, 2] = 0  # inside the head
    expected = np.zeros((7, 8, 5), bool)
    expected[1:6, 1:7, 1:4] = True
    np.testing.assert_array_equal(head(volumes), expected)
    assert head(volumes + 1).all()
    assert not head(volumes * 0).any()
    case = sliced(read_case(find_cases(prepared / "cases")[0]), 16)
    assert case.head[..., 1:-1].all()
    assert not case.head[..., [0, -1]].any()
    case.head[2:9, 3:5] = False
    everywhere = np.ones((7, 16, 16))
    np.testing.assert_array_equal(case.mask_volume(everywhere > 0), case.head)
    np.testing.assert_allclose(case.volume(everywhere), case.head, atol=1e-6)


def test_a_sliced_case_is_the_preparation_s(prepared):
    case = read_case(find_cases(prepared / "cases")[0])
    found, expected = sliced(case, 16), case_slices(case, 16)
    np.testing.assert_array_equal(found.slices.images, expected.images)
    np.testing.assert_array_equal(found.slice_truth, expected.masks > 0.5)
    np.testing.assert_array_equal(found.truth, case.mask)
    np.testing.assert_array_equal(found.slices.index, np.arange(1, 8))
    assert (found.inputs.min(), found.inputs.max()) == (-1, pytest.approx(1, abs=1e-4))


def test_a_case_without_segmentation_has_no_truth(tmp_path, case_writer):
    case_writer(tmp_path, "a", seed=0, segmented=False)
    found = sliced(read_case(find_cases(tmp_path)[0]), 16)
    assert found.truth is None
    assert found.slice_truth is None


def test_slices_go_back_where_they_came_from():
    slices = CaseSlices(np.zeros((2, 4, 4, 1), np.float32), None, np.array([1, 3]), (8, 8, 5))
    masks = np.zeros((2, 4, 4), bool)
    masks[0, 1, 2] = masks[1, 3, 3] = True
    case = SlicedCase("a", slices.images, slices, "slice", np.eye(4), None, np.ones((8, 8, 5), bool), None, ())
    volume = case.mask_volume(masks)
    expected = np.zeros((8, 8, 5), bool)
    expected[2:4, 4:6, 1] = expected[6:, 6:, 3] = True  # a pixel becomes 2 x 2 voxels
    np.testing.assert_array_equal(volume, expected)
    maps = case.volume(np.full((2, 4, 4), 0.25, np.float32))
    assert maps.dtype == np.float32
    np.testing.assert_array_equal(maps[..., [1, 3]], 0.25)
    assert not maps[..., [0, 2, 4]].any()
