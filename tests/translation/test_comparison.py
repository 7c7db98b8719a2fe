"""Several methods and several numbers of steps on the same cases: the tables say what the runs found."""

import csv
import json

import pytest

from hae_jax.errors import UserError
from hae_jax.translation.comparison import Network, compare, compare_steps, method_entries


@pytest.fixture
def network(toy_network, tmp_path):
    return Network(toy_network(0), {"path": "runs/a/1", "step": 1, "parameters": "params"}, tmp_path / "calibrations")


@pytest.fixture
def short(config):
    config.translation.update({"ddib_steps": 5, "anoddpm_steps": 5, "batch_size": 8})
    return config


def _rows(path):
    with open(path, newline="") as stream:
        return list(csv.DictReader(stream))


def test_methods_side_by_side(network, toy_network, short, mesh_of, tmp_path):
    twin = Network(toy_network(1), {"path": "runs/b/1", "step": 1, "parameters": "params"}, tmp_path / "twin")
    entries = method_entries(["hae", "anoddpm-gaussian", "threshold"], network, twin)
    written = compare(entries, short, mesh_of(1), output=tmp_path / "out")
    assert {path.name for path in written} == {"comparison.csv", "comparison.md", "comparison.json", "comparison.png"}
    assert all(path.stat().st_size > 100 for path in written)
    rows = _rows(tmp_path / "out" / "comparison.csv")
    assert [row["method"] for row in rows] == ["hae", "anoddpm-gaussian", "threshold"]
    for row in rows:
        own = json.loads((tmp_path / "out" / row["method"] / "metrics.json").read_text())["results"]
        assert float(row["mixed_dice"]) == pytest.approx(own["mixed"]["dice"], rel=1e-4)
        assert float(row["volume_dice"] or -1) == pytest.approx(own["volumes"]["dice"]["mean"], rel=1e-4)
    manifest = json.loads((tmp_path / "out" / "anoddpm-gaussian" / "manifest.json").read_text())
    assert manifest["checkpoint"]["path"] == "runs/b/1"


def test_quality_against_steps(network, short, mesh_of, tmp_path):
    short.translation.forward_steps = 30
    written = compare_steps([5, 10], network, short, mesh_of(1), output=tmp_path)
    assert {path.name for path in written} == {"steps.csv", "steps.md", "steps.json", "steps.png"}
    assert [row["settings"] for row in _rows(tmp_path / "steps.csv")] == ["respacing=5", "respacing=10"]
    assert "healthy" in (tmp_path / "steps.md").read_text().splitlines()[0]


def test_a_comparison_needs_truth_and_all_cases(network, short, mesh_of, tmp_path, case_writer):
    case_writer(tmp_path / "in", "a", seed=0, segmented=False)
    entries = method_entries(["hae"], network)
    with pytest.raises(UserError, match="no case has a segmentation"):
        compare(entries, short, mesh_of(1), output=tmp_path / "out", source=tmp_path / "in")
    case_writer(tmp_path / "in", "b", seed=1)
    (tmp_path / "in" / "b" / "b_t2.nii.gz").write_bytes(b"")
    with pytest.raises(UserError, match=r"1 cases failed, the first, b: .*b_t2"):
        compare(entries, short, mesh_of(1), output=tmp_path / "out", source=tmp_path / "in")
