"""Sums over cases without pixels in memory, and the records of cases."""

import pickle

import numpy as np
import pytest
from exact_metrics import slice_metrics

from hae_jax.data.cases import find_cases, read_case
from hae_jax.data.slices import sliced
from hae_jax.evaluation import metrics
from hae_jax.evaluation.report import case_result
from hae_jax.evaluation.volumes import VolumeMetrics
from hae_jax.localization.map_threshold import Masks
from hae_jax.pipeline.results_folder import ResultsFolder
from hae_jax.pipeline.summary import Answer, Measured, Tally


def _measured(case):
    """A case with a perfect and an empty mask, and the row of the perfect one."""
    answers = {}
    for name in ("perfect", "nothing"):
        mask = case.slice_truth if name == "perfect" else np.zeros(case.inputs.shape[:3], bool)
        masks = Masks(mask.astype(np.float32), mask, mask, mask.any((1, 2)), np.ones(len(mask)))
        row = case_result(case.name, case.mask_volume(mask), case.truth, case.affine, masks.lesion,
                          masks.score, 1.0, case.volume(masks.map))
        answers[name] = Answer(masks, row.measured)
    return Measured(case.slice_truth, metrics.foreground(case.inputs), answers), row


@pytest.fixture
def cases(prepared, tmp_path, case_writer):
    case_writer(tmp_path, "healthy", seed=9, lesion=False)
    folders = prepared / "cases" / "case_0", tmp_path / "healthy"
    return [sliced(read_case(find_cases(folder)[0]), 16) for folder in folders]


def test_tally_counts_cases_with_truth(cases):
    tally = Tally()
    for case in cases:
        tally.add(case.name, _measured(case)[0])
    tally.add("none", None)
    found = tally.results()
    assert (tally.cases, tally.slices) == (2, 14)
    assert found["perfect"]["all_slices"]["dice"] == {"mean": 1, "low": 1, "high": 1, "cases": 2}
    assert found["perfect"]["lesion_slices"]["dice"] == {"mean": 1, "low": None, "high": None, "cases": 1}
    nothing = found["nothing"]["all_slices"]["dice"]
    assert nothing["mean"] == pytest.approx(11 / 14, abs=1e-6)
    assert (nothing["low"], nothing["high"]) == (pytest.approx(4 / 7, abs=1e-6), 1)  # one patient twice, or the other
    assert found["perfect"]["shares"]["healthy"] == pytest.approx(11 / 14)
    volumes = found["perfect"]["volumes"]
    assert (volumes["lesion_cases"], volumes["healthy_cases"]) == (1, 1)
    assert volumes["healthy_volume_ml"]["mean"] == 0
    assert volumes["dice"]["mean"] > 0.85  # less than 1 because of resizing to 16 px and back
    assert Tally().results() == {}


def _drawn(seed, size, methods=("a", "b"), slices=6):
    """A case of random slices, the first two of them healthy."""
    rng = np.random.default_rng(seed)
    truth = rng.random((slices, size, size)) < 0.2
    truth[:2] = False
    answers = {}
    for name in methods:
        maps = (rng.random(truth.shape) + 0.2 * truth).astype(np.float32)
        mask, lesion = maps > 0.9, rng.random(slices) < 0.7
        answers[name] = Answer(Masks(maps, mask, mask & lesion[:, None, None], lesion, rng.random(slices)),
                                       VolumeMetrics(1.0, 1.0, 0.5, 0.4, None, 1, 1, 1, 0, None, None))
    return Measured(truth, rng.random(truth.shape) < 0.7, answers)


def test_case_by_case_is_as_all_slices_at_once():
    cases, tally = [_drawn(seed, 32) for seed in range(5)], Tally()
    for number, case in enumerate(cases):
        tally.add(str(number), case)
    truth, foreground = (np.concatenate([getattr(case, name) for case in cases]) for name in ("truth", "foreground"))
    for name, found in tally.results().items():
        masks = Masks(*map(np.concatenate, zip(*(case.answers[name].masks for case in cases), strict=True)))
        expected = slice_metrics(
            mask=masks.mask, mask_all=masks.mask_all, map=masks.map, lesion=masks.lesion, truth=truth,
            labels=truth.any((1, 2)), foreground=foreground)
        assert found.pop("volumes")["cases"] == 5
        assert found.pop("shares") == expected.pop("shares")
        assert found.pop("upper_bound")["lesion_slice_dice"] > 0
        assert found.keys() == expected.keys()
        for setting, figures in found.items():
            for name, value in figures.items():
                assert value["mean"] == pytest.approx(expected[setting][name], abs=1e-4), (setting, name)
                assert value["low"] < value["mean"] < value["high"]
                assert value["cases"] == 5


def test_only_methods_that_answered_for_every_case_are_measured():
    tally = Tally()
    for seed, methods in enumerate((("a", "b"), ("c", "a"), ("a", "b", "c"))):
        tally.add(str(seed), _drawn(seed, 16, methods))
    assert tally.results().keys() == {"a"}


def test_memory_does_not_grow_with_the_pixels():
    def held(cases, size):
        tally = Tally()
        for seed in range(cases):
            tally.add(str(seed), _drawn(seed, size))
        return len(pickle.dumps(tally))  # includes all its arrays

    few, more = held(2, 128), held(2, 256)
    assert more - few < 2 * 2 * 10_000  # of 2 cases and 2 methods; pixels would take 1.2 MB more
    assert held(12, 128) - few < 10 * 2 * 40_000  # a map has 0.4 MB


def test_a_record_keeps_what_it_was_given(prepared, cases, tmp_path):
    measured, row = _measured(cases[0])
    (files,) = find_cases(prepared / "cases" / "case_0")
    results = ResultsFolder(tmp_path, {"seed": 0}, [files])
    assert not results.finished(files)
    results.begin(files)
    results.commit("case_0", ["a.txt"], row, measured)
    assert not results.finished(files)  # a.txt is missing
    (tmp_path / "a.txt").touch()
    assert results.finished(files)
    assert not ResultsFolder(tmp_path, {"seed": 1}, [files]).finished(files)
    assert results.records()["case_0"].row == row
    found = results.measured("case_0")
    np.testing.assert_array_equal(found.truth, measured.truth)
    for name, answer in measured.answers.items():
        assert found.answers[name].volume == answer.volume
        for ours, theirs in zip(found.answers[name].masks, answer.masks, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    results.fail("case_0", "no brain")
    assert not results.finished(files)
    assert results.records()["case_0"].failed == "no brain"
    assert not (tmp_path / "a.txt").exists()  # belongs to earlier results
    assert results.measured("case_0") is None
