"""Checks of lesion masks: values, labels, and the share of the head that the mask covers."""

import nibabel as nib
import numpy as np
import pytest

from hae_jax.data.lesion_mask import lesion_mask, refuse_head_mask
from hae_jax.data.prepare import prepare
from hae_jax.errors import UserError

HEAD = np.zeros((10, 10, 6, 1), np.float32)
HEAD[1:9, 1:9, 1:5] = 100
SPOT = np.zeros((10, 10, 6), np.float32)
SPOT[4:6, 4:6, 2] = 1


@pytest.mark.parametrize("label", [1, 2, 255, 7])
def test_any_number_marks_a_lesion(label):
    mask, doubts = lesion_mask("a", SPOT * label, HEAD)
    np.testing.assert_array_equal(mask, SPOT > 0)
    assert doubts == ()


def test_an_empty_mask_is_a_healthy_case():
    mask, doubts = lesion_mask("a", 0 * SPOT, HEAD)
    assert not mask.any()
    assert doubts == ()


@pytest.mark.parametrize(("factor", "says"), [
    (-1, r"a: holds -1, and 0.67 % of its voxels are below 0"), (0.4, r"a: its largest value is 0.4")])
def test_numbers_that_mark_nothing_are_refused(factor, says):
    with pytest.raises(UserError, match=says):
        lesion_mask("a", SPOT * factor, HEAD)


def labelled(*labels):
    values = SPOT.copy()
    values[4, 4, 1:1 + len(labels)] = labels
    return values


@pytest.mark.parametrize(("values", "says"), [
    (labelled(1, 2, 4), None),
    (labelled(1, 3), None),
    (labelled(2, 41, 77), r"a: has 4 labels \(1, 2, 41, 77\), which is no known convention"),
    (labelled(0.2, 0.8), r"a: 0.33 % of its voxels are no whole numbers"),
    ((HEAD[..., 0] > 0) * 1.0 * (np.arange(10) < 6)[:, None, None], r"a: covers 62 % of the head"),
    (np.repeat(SPOT[:, :, 2:3], 6, -1), r"a: marks a lesion in all 4 slices \(100 %\), 6 % of the head"),
])
def test_doubts(values, says):
    _, doubts = lesion_mask("a", values.astype(np.float32), HEAD)
    assert len(doubts) == (says is not None)
    if says:
        with pytest.raises(AssertionError, match=says):
            raise AssertionError(doubts[0])


def test_nothing_is_learnt_from_a_mask_of_the_head():
    refuse_head_mask("a", SPOT > 0, HEAD)
    with pytest.raises(UserError, match="a: covers 100 % of the head, so it is a mask of the brain"):
        refuse_head_mask("a", HEAD[..., 0] > 0, HEAD)


@pytest.mark.parametrize(("lesions", "says"), [(0, "warning: train and 2 more: none (0 %) of its slices"), (1, None)])
def test_one_class_alone_is_said_at_preparation(tmp_path, lesions, says):
    for i in range(3):
        for name, values in ((f"c{i}", HEAD[..., 0]), (f"c{i}_seg", SPOT * lesions)):
            nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / f"{name}.nii.gz")
    report = prepare(tmp_path, tmp_path / "out" / "store", modalities=("t1",), image_size=10, train_fraction=0.6,
                     val_fraction=0.4)
    said = [line for line in report.lines() if line.startswith("warning: train")]
    assert len(said) == (says is not None)
    assert says is None or says in said[0]
