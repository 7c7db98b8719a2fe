"""Metrics summed patient by patient: counts are exact, and intervals are from draws of whole patients."""

import json

import numpy as np
import pytest
from exact_metrics import slice_metrics

from hae_jax.evaluation import metrics, running
from hae_jax.evaluation.bootstrap import with_interval


def _slices(seed, count, size=24, sick=0.5):
    rng = np.random.default_rng(seed)
    truth = rng.random((count, size, size)) < 0.1
    truth[rng.random(count) >= sick] = False
    maps = (rng.gamma(1, 0.05, truth.shape) + 0.1 * truth * rng.random(truth.shape)).astype(np.float32)
    lesion = rng.random(count) < 0.6
    mask = maps > 0.1
    return {"mask": mask & lesion[:, None, None], "mask_all": mask, "map": maps, "lesion": lesion, "truth": truth,
            "labels": truth.any((1, 2)).astype(int), "foreground": rng.random(truth.shape) < 0.6}


def _sums(cases, patients=None):
    """Sums over cases. By default, each case is of a different patient."""
    sums = running.SliceSums()
    for number, case in enumerate(cases):
        sums.add(str(number) if patients is None else patients[number], **case)
    return sums


def _together(patients):
    return {name: np.concatenate([patient[name] for patient in patients]) for name in patients[0]}


def test_patients_add_up_to_the_figures_of_all_slices_together():
    patients = [_slices(seed, count) for seed, count in enumerate((7, 1, 12, 4))]
    found, expected = _sums(patients).results(), slice_metrics(**_together(patients))
    assert found.pop("shares") == expected.pop("shares")
    bound, together = found.pop("upper_bound")["lesion_slice_dice"], _together(patients)
    rows = together["labels"] > 0
    maps, truth, inside = (together[name][rows] for name in ("map", "truth", "foreground"))
    tried = np.geomspace(0.005, 0.5, 2000)
    best = max(metrics.dice((maps >= level) & inside, truth).mean() for level in tried)
    assert bound == pytest.approx(best, abs=2e-3)
    assert found.keys() == expected.keys()
    for setting, figures in found.items():
        assert figures.keys() == expected[setting].keys()
        for name, value in figures.items():
            error = 1e-4 if name in ("auroc", "auprc") else 1e-12
            assert value["mean"] == pytest.approx(expected[setting][name], abs=error), (setting, name)


def test_intervals_are_of_draws_of_whole_patients():
    """The reference is draws made one by one and measured with the exact functions."""
    patients = [_slices(seed, 3 + seed, size=12, sick=0.2 * (seed % 5)) for seed in range(6)]
    found, rng = _sums(patients).results(), np.random.default_rng(1)
    drawn = [slice_metrics(**_together([patients[index] for index in rng.integers(0, 6, 6)]))
             for _ in range(400)]
    compared = [*(("all_slices", name) for name in ("dice", "precision", "auroc", "auprc")),
                ("slice_level", "accuracy"), ("slice_level", "recall")]
    for setting, name in compared:
        low, high = np.nanquantile(np.array([draw[setting][name] for draw in drawn], float), (0.025, 0.975))
        value = found[setting][name]
        spread = high - low
        assert value["cases"] == 6
        assert (value["low"], value["high"]) == (pytest.approx(low, abs=0.2 * spread),
                                                 pytest.approx(high, abs=0.2 * spread)), (setting, name)
        assert spread > 0


def test_healthy_patients_are_not_drawn_for_the_figures_of_lesion_slices():
    sick, healthy = [_slices(seed, 5, sick=1) for seed in range(3)], [_slices(seed, 5, sick=0) for seed in (3, 4)]
    alone, all_of_them = _sums(sick).results(), _sums(sick + healthy).results()
    assert all_of_them["lesion_slices"] == alone["lesion_slices"]
    assert all_of_them["lesion_slices"]["dice"]["cases"] == all_of_them["lesion_slices"]["auprc"]["cases"] == 3
    assert all_of_them["all_slices"]["dice"]["cases"] == 5
    empty = {name: value[:0] for name, value in sick[0].items()}  # a patient without slices
    assert _sums([*sick, empty]).results() == alone


@pytest.mark.filterwarnings("error")
def test_where_there_is_no_interval():
    alone = _sums([_slices(0, 6)]).results()
    undefined = {"mean": None, "low": None, "high": None}
    for setting in ("all_slices", "lesion_slices", "slice_level"):
        for value in alone[setting].values():
            assert value["mean"] is not None
            assert value == {**undefined, "mean": value["mean"], "cases": 1}
    healthy = _sums([_slices(seed, 4, sick=0) for seed in range(3)]).results()
    assert all(value == {**undefined, "cases": 0} for value in healthy["lesion_slices"].values())
    assert healthy["all_slices"]["auroc"] == healthy["slice_level"]["recall"] == {**undefined, "cases": 3}
    json.dumps([alone, healthy], allow_nan=False)


def test_equal_seeds_draw_equal_patients():
    patients = [_slices(seed, 6) for seed in range(5)]
    found = _sums(patients).results(seed=3)
    assert found == _sums(patients).results(seed=3) != _sums(patients).results(seed=4)
    shares = np.array([metrics.label_shares(np.stack([p["lesion"], p["labels"] > 0]))["accuracy"] for p in patients]).T
    own = with_interval(shares, lambda part, whole, axis: part.sum(axis=axis) / whole.sum(axis=axis), seed=3)
    assert found["slice_level"]["accuracy"] == own | {"cases": 5}


def test_visits_of_a_patient_are_drawn_together():
    cases = [_slices(seed, 6, sick=0.2 * (seed % 5)) for seed in range(6)]
    visits = _sums(cases, ["a", "b", "c", "a", "b", "c"]).results()
    together = _sums([_together(cases[k::3]) for k in range(3)]).results()
    assert visits.pop("shares") == together.pop("shares")
    assert visits.pop("upper_bound") == pytest.approx(together.pop("upper_bound"))
    for setting, figures in visits.items():
        for name, value in figures.items():
            for end in ("mean", "low", "high"):
                assert value[end] == pytest.approx(together[setting][name][end]), (setting, name)
    assert (visits["all_slices"]["dice"]["cases"], together["all_slices"]["dice"]["cases"]) == (6, 3)
    alone = _sums(cases, ["a"] * 6).results()["all_slices"]["dice"]
    assert (alone["low"], alone["high"], alone["cases"]) == (None, None, 6)


def test_a_method_is_above_another_by_pairs():
    """For two methods on the same patients, the interval of the difference is from paired draws."""
    cases = [_slices(seed, 8, sick=0.8) for seed in range(6)]
    better = [case | {"mask_all": case["mask_all"] | case["truth"]} for case in cases]
    found = _sums(better).paired_dice(_sums(cases))
    own, other = (_sums(of).results()["lesion_slices"]["dice"]["mean"] for of in (better, cases))
    assert found["mean"] == pytest.approx(own - other)
    assert 0 < found["low"] < found["mean"] < found["high"]
    same = _sums(cases).paired_dice(_sums(cases))
    assert (same["mean"], same["low"], same["high"]) == (0, 0, 0)


def test_a_soft_mask_is_refused():
    slices = _slices(0, 3)
    with pytest.raises(TypeError, match="threshold a soft mask"):
        running.SliceSums().add("a", **{**slices, "truth": slices["truth"].astype(float)})
