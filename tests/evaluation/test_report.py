"""The written results: readable by others, honest about what is not known."""

import csv
import json

import numpy as np

from hae_jax.evaluation import metrics, report


def _cube(side):
    mask = np.zeros((20, 20, 20), bool)
    mask[:side, :side, :side] = True
    return mask


def _result(truth):
    return report.case_result("a, b", _cube(10), truth, np.diag([2.0, 1, 1, 1]), np.array([True, False, True]),
                              np.array([0.9, 0.99, 0.7]), 1.25)


def test_case_result():
    found = _result(_cube(5))
    assert (found.volume_ml, found.true_volume_ml) == (2.0, 0.25)
    assert (found.slices, found.lesion_slices, found.lowest_similarity) == (3, 2, 0.7)
    np.testing.assert_allclose([found.dice, found.iou], [2 * 125 / 1125, 125 / 1000])
    unknown = _result(None)
    assert unknown.true_volume_ml is unknown.dice is unknown.iou is None
    empty = report.case_result("x", _cube(0), None, np.eye(4), np.array([], bool), np.array([]), 0.0)
    assert (empty.slices, empty.lesion_slices, empty.lowest_similarity) == (0, 0, None)


def test_write_cases(tmp_path):
    report.write_cases(tmp_path / "cases.csv", [_result(_cube(5)), _result(None)])
    with open(tmp_path / "cases.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["case"] for row in rows] == ["a, b", "a, b"]
    assert [row["dice"] for row in rows] == ["0.222222", ""]
    assert float(rows[0]["volume_ml"]) == 2
    assert rows[1]["true_volume_ml"] == ""
    assert [path.name for path in tmp_path.iterdir()] == ["cases.csv"]


def test_write_metrics(tmp_path):
    results = {"mixed": {"dice": 0.5, "auroc": None}}
    report.write_metrics(tmp_path / "metrics.json", results, calibration={"threshold": 0.9})
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert found["results"] == results
    assert found["calibration"] == {"threshold": 0.9}
    assert found["definitions"] == metrics.DEFINITIONS
    assert "Not a medical device" in found["made_by"]["notice"]


def test_metrics_table():
    table = report.metrics_table({
        "network": {"mixed": {"dice": 0.71234, "auroc": None}, "shares": {"slices": 12}},
        "flair": {"volume_dice": 0.7},
    })
    assert [line.split() for line in table.splitlines()] == [
        ["network", "flair"],
        ["mixed", "dice", "0.712", "-"],
        ["mixed", "auroc", "-", "-"],
        ["shares", "slices", "12", "-"],
        ["volume", "dice", "-", "0.700"],
    ]
    assert len({len(line) for line in table.splitlines()}) == 1
