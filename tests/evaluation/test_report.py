"""The written results can be read by other programs, and unknown values are empty."""

import csv
import dataclasses
import json

import numpy as np
import pytest

from hae_jax.evaluation import metrics, report, running, volumes


def _cube(side):
    mask = np.zeros((20, 20, 20), bool)
    mask[:side, :side, :side] = True
    return mask


def _result(truth, anomaly=None):
    return report.case_result("a, b", _cube(10), truth, np.diag([2.0, 1, 1, 1]), np.array([True, False, True]),
                              np.array([0.9, 0.99, 0.7]), 1.25, anomaly)


def test_case_result():
    found = _result(_cube(5))
    assert (found.volume_ml, found.true_volume_ml) == (2.0, 0.25)
    assert (found.slices, found.lesion_slices, found.anomaly_score) == (3, 2, 0.99)
    np.testing.assert_allclose([found.dice, found.iou], [2 * 125 / 1125, 125 / 1000])
    unknown = _result(None, _cube(5) * 0.5)
    assert unknown.true_volume_ml is unknown.dice is unknown.iou is unknown.hd95_mm is unknown.best_dice is None
    assert unknown.lesions is unknown.lesions_found is unknown.false_lesions is unknown.measured is None
    assert unknown.lesions_predicted == 1
    empty = report.case_result("x", _cube(0), None, np.eye(4), np.array([], bool), np.array([]), 0.0)
    assert (empty.slices, empty.lesion_slices, empty.anomaly_score) == (0, 0, None)


def test_case_result_measures_the_volume():
    found = _result(_cube(5), _cube(5) * 0.5)
    assert found.measured == volumes.volume_metrics(_cube(10), _cube(5), np.diag([2.0, 1, 1, 1]), _cube(5) * 0.5)
    assert (found.lesions, found.lesions_found, found.lesions_predicted, found.false_lesions) == (1, 1, 1, 0)
    assert (found.best_dice, found.best_threshold) == (1, 0.5)
    assert found.hd95_mm > 5
    assert _result(_cube(5)).best_dice is None
    again = report.CaseResult(**json.loads(json.dumps(dataclasses.asdict(found))))
    assert again == found


def test_write_cases(tmp_path):
    report.write_cases(tmp_path / "cases.csv", [_result(_cube(5)), _result(None)])
    with open(tmp_path / "cases.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["case"] for row in rows] == ["a, b", "a, b"]
    assert [row["dice"] for row in rows] == ["0.222222", ""]
    assert float(rows[0]["volume_ml"]) == 2
    assert rows[1]["true_volume_ml"] == rows[1]["hd95_mm"] == rows[0]["best_dice"] == ""
    assert rows[0]["lesions_found"] == "1"
    assert list(rows[0])[:9] == ["case", "volume_ml", "true_volume_ml", "dice", "iou", "slices", "lesion_slices",
                                 "anomaly_score", "seconds"]  # existing columns keep their position
    assert [path.name for path in tmp_path.iterdir()] == ["cases.csv"]


def test_write_metrics(tmp_path):
    results = {"all_slices": {"dice": 0.5, "auroc": None}}
    report.write_metrics(tmp_path / "metrics.json", results, calibration={"threshold": 0.9})
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert found["results"] == results
    assert found["calibration"] == {"threshold": 0.9}
    assert found["definitions"] == {**metrics.DEFINITIONS, "volumes": volumes.DEFINITIONS}
    assert "Not a medical device" in found["made_by"]["notice"]


def test_metrics_table():
    table = report.metrics_table({
        "network": {"all_slices": {"dice": 0.71234, "auroc": None}, "shares": {"slices": 12}},
        "flair": {"volume_dice": 0.7},
    })
    assert [line.split() for line in table.splitlines()] == [
        ["network", "flair"],
        ["all-slice", "Dice", "0.712", "-"],
        ["all-slice", "AUROC", "-", "-"],
        ["shares", "slices", "12", "-"],
        ["volume", "Dice", "-", "0.700"],
    ]
    assert len({len(line) for line in table.splitlines()}) == 1


def test_metrics_table_shows_intervals_in_one_line():
    table = report.metrics_table({
        "a": {"volumes": {"dice": {"mean": 0.5, "low": -0.25, "high": 0.75, "cases": 9}, "cases": 9}},
        "b": {"volumes": {"dice": {"mean": 0.5, "low": None, "high": None, "cases": 1}}},
        "c": {"volumes": {"dice": {"mean": None, "low": None, "high": None, "cases": 0}}},
        "d": {"volumes": {"dice": {"mean": -0.0001, "low": None, "high": None, "cases": 1}}},
    })
    assert [line.split() for line in table.splitlines()[1:]] == [
        ["volume", "Dice", "0.500", "[-0.250,", "0.750]", "0.500", "-", "0.000"],
        ["volume", "cases", "9", "-", "-", "-"]]


def _compared(dice, slices=40):
    patients = [volumes.VolumeMetrics(2.0, 1.0, dice + step, dice, 4.0 + step, 1, 1, 1, 0, dice + step, 0.1)
                for step in (-0.1, 0, 0.1)]
    figures = {
        "all_slices": {"dice": dice, "iou": dice / 2, "auroc": 0.9, "auprc": 0.8}, "lesion_slices": {"dice": dice / 4},
        "slice_level": {"accuracy": 0.75}}
    return {setting: {name: {"mean": mean, "low": mean - 0.01, "high": mean + 0.01, "cases": 3}
                      for name, mean in values.items()} for setting, values in figures.items()} | {
        "shares": {"slices": slices, "healthy": 0.375}, "volumes": volumes.summarise(patients)}


@pytest.fixture
def compared():
    return [report.ComparedMethod("HAE", "w = 2, |x0|", _compared(0.6), 0.25), ("threshold", "", _compared(0.4), None)]


def test_comparison_reads_back_from_csv(tmp_path, compared):
    report.write_comparison(tmp_path / "new", compared, phantom=False)
    with open(tmp_path / "new" / "comparison.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["method"], row["settings"]) for row in rows] == [("HAE", "w = 2, |x0|"), ("threshold", "")]
    for row, (_, _, results, *_) in zip(rows, compared, strict=True):
        found = {
            "all_slices_dice": results["all_slices"]["dice"]["mean"],
            "all_slices_iou": results["all_slices"]["iou"]["mean"],
            "all_slices_auprc": 0.8, "all_slices_auprc_low": 0.79, "all_slices_auprc_high": 0.81,
            "lesion_slices_dice": results["lesion_slices"]["dice"]["mean"],
            "slice_accuracy": 0.75, "healthy_share": 0.375,
            "volume_dice": results["volumes"]["dice"]["mean"], "volume_dice_low": results["volumes"]["dice"]["low"],
            "volume_dice_high": results["volumes"]["dice"]["high"], "hd95_mm": 4, "lesion_f1": 1, "slices": 40,
            "cases": 3}
        assert {name: float(row[name]) for name in found} == pytest.approx(found, abs=1e-6)
        assert row["lesion_slices_iou"] == row["healthy_volume_ml"] == ""  # missing in the results; no healthy case
        assert row["phantom"] == "False"
    assert [row["seconds_per_slice"] for row in rows] == ["0.25", ""]


def _places(results, *above):
    """The place of each metric in results; with an interval, those of its mean and both ends."""
    for name, value in results.items():
        if isinstance(value, dict):
            yield from _places(value, *above, name)
        elif not ({"mean", "cases"} <= results.keys() and name == "cases"):
            yield *above, name


def test_every_figure_has_a_column(tmp_path):
    """For each metric: if only this metric is a number, the table must contain it."""
    truth = np.zeros((2, 8, 8), bool)
    truth[0, 2:5, 2:5] = True
    sums = running.SliceSums()
    sums.add("a", mask=truth, mask_all=truth, map=truth.astype(float), lesion=np.array([True, False]), truth=truth,
             labels=np.array([1, 0]), foreground=np.ones_like(truth))
    places = list(_places(sums.results() | {"volumes": _compared(0.6)["volumes"]}))
    assert len(places) > 70
    for place in places:
        alone = 12345
        for key in reversed(place):
            alone = {key: alone}
        report.write_comparison(tmp_path, [("HAE", "", alone, None)], phantom=False)
        assert "12345" in (tmp_path / "comparison.csv").read_text(), place


def test_comparison_reads_back_from_markdown(tmp_path, compared):
    report.write_comparison(tmp_path, compared, phantom=True)
    page = (tmp_path / "comparison.md").read_text()
    assert page.startswith("# PHANTOM metrics of 3 cases, 40 slices, 38% of them healthy\n")
    assert "an empty mask without a lesion scores 1" in page
    assert "Research use only" in page
    table = [line.replace("\\|", "/").strip("| ").split(" | ") for line in page.splitlines() if line.startswith("|")]
    header, _, *rows = table
    assert {len(row) for row in table} == {len(header)}
    first = dict(zip(header, rows[0], strict=True))
    assert first["settings"] == "w = 2, /x0/"
    assert (first["all-slice Dice"], first["lesion-slice Dice"], first["seconds per slice"]) == (
        "0.600 [0.590, 0.610]", "0.150 [0.140, 0.160]", "0.250")
    ends = compared[0].results["volumes"]["dice"]
    assert first["volume Dice"] == f"0.600 [{ends['low']:.3f}, {ends['high']:.3f}]"
    assert rows[1][-1] == "-"


def test_comparison_of_different_slices_shows(tmp_path, compared):
    report.write_comparison(tmp_path, [*compared, ("DDIB", "", _compared(0.5, slices=39), 1.0)], phantom=False)
    assert (tmp_path / "comparison.md").read_text().startswith("# Metrics of 3 cases, 40 or 39 slices, 38%")
    report.write_comparison(tmp_path, [("DDIB", "", {}, 1.0)], phantom=False)
    assert (tmp_path / "comparison.md").read_text().startswith("# Metrics of ? cases")
