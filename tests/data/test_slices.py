"""Slices against the published preparation, and the way back into the volume."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from hae_jax.data.cases import find_cases, read_case
from hae_jax.data.slices import (
    case_slices,
    from_model_range,
    intensity_scales,
    normalise_volumes,
    patient_of,
    resize,
    slices_to_volume,
    split_patients,
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
    assert np.count_nonzero(scaled != other) == 1  # a lesion does not darken what is around it
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


def test_split_equals_the_published_one(golden):
    expected = json.loads((golden / "brats_split.json").read_text())
    names = [f"BraTS2021_{i:05d}" for i in range(expected["n_patients"])]
    split = split_patients(names[::-1])
    position = {name: i for i, name in enumerate(names)}
    assert [position[name] for name in split["train"][:10]] == expected["train_first10"]
    assert [position[name] for name in split["val"]] == expected["val"]
    assert (len(split["train"]), len(split["val"])) == (expected["n_train"], expected["n_val"])
    assert sorted(itertools.chain(*split.values())) == names


@pytest.mark.parametrize("count", [2, 3, 7, 10, 12, 19])
def test_too_few_patients_name_a_fraction_that_suffices(count):
    names = [f"p{i}" for i in range(count)]
    with pytest.raises(UserError, match="--val-fraction to") as error:
        split_patients(names)
    needed = float(str(error.value).split("--val-fraction to ")[1].split()[0])
    split = split_patients(names, train_fraction=0.5, val_fraction=min(needed, 0.5))
    assert len(split["val"]) >= 1
    assert sorted(itertools.chain(*split.values())) == sorted(names)


def test_twenty_patients_keep_the_published_recipe():
    assert {k: len(v) for k, v in split_patients([str(i) for i in range(20)]).items()} == {
        "train": 15, "val": 1, "test": 4}


@pytest.mark.parametrize(("train", "val"), [(0.9, 0.2), (0, 0.5), (0.5, 0), (-1, 0.1), (float("nan"), 0.1)])
def test_impossible_fractions(train, val):
    with pytest.raises(UserError, match="fraction"):
        split_patients([str(i) for i in range(50)], train, val)


def test_visits_of_a_patient_stay_together():
    names = [f"BraTS-GLI-{i:05d}-{visit:03d}" for i in range(40) for visit in range(2)]
    split = split_patients(names)
    assert {name: len(cases) for name, cases in split.items()} == {"train": 60, "val": 4, "test": 16}
    for cases in split.values():
        assert {case[:-1] + "0" for case in cases} <= set(cases)
        assert {case[:-1] + "1" for case in cases} <= set(cases)
    assert patient_of("sub-01_ses-2_T1w") == patient_of("sub-01_ses-1_T1w") != patient_of("sub-02_ses-1_T1w")
    assert patient_of("BraTS2021_00000") == "BraTS2021_00000"
    assert patient_of("sub-01_run-1") == patient_of("sub-01_run-2") == "sub-01"
