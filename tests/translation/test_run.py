"""Whole runs on small cases: everything is written, calibrations are kept, one bad case spoils nothing."""

import csv
import json

import nibabel as nib
import numpy as np
import pytest

from hae_jax.data import phantom
from hae_jax.data.cases import find_cases
from hae_jax.errors import UserError
from hae_jax.evaluation import metrics
from hae_jax.translation import validation
from hae_jax.translation.masks import Masks
from hae_jax.translation.per_case import most_anomalous
from hae_jax.translation.plan import fingerprint, forward_setup
from hae_jax.translation.run import translate
from hae_jax.translation.tally import Tally
from hae_jax.translation.volume import read_slices

IDENTITY = {"path": "runs/a/1", "step": 1, "parameters": "params"}


@pytest.fixture
def run(config, toy_network, mesh_of, tmp_path):
    def call(source=None, seed=0, devices=1, overwrite=False):
        return translate(toy_network(seed), IDENTITY, config, mesh_of(devices), output=tmp_path / "out", source=source,
                         overwrite=overwrite)

    return call


def _json(path):
    return json.loads(path.read_text())


def test_a_run_writes_everything(run, config, prepared, tmp_path):
    config.evaluation.overlay_slices = 2
    report = run(devices=4)
    (name,) = _json(prepared / "store" / "manifest.json")["split"]["test"]
    written = {f"{name}_mask.nii.gz", f"{name}_map.nii.gz", f"{name}_overlay.png", "calibration.json", "cases.csv",
               "metrics.json", "manifest.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == written
    given = nib.load(prepared / "cases" / name / f"{name}_flair.nii.gz")
    mask, anomaly = (nib.load(tmp_path / "out" / f"{name}_{kind}.nii.gz") for kind in ("mask", "map"))
    for image, dtype in ((mask, np.uint8), (anomaly, np.float32)):
        np.testing.assert_array_equal(image.affine, given.affine)
        assert image.get_data_dtype() == dtype
        for field in ("dim", "pixdim", "qform_code", "sform_code", "xyzt_units"):
            np.testing.assert_array_equal(image.header[field], given.header[field])
        assert not np.asarray(image.dataobj)[..., [0, -1]].any()  # empty slices
    assert np.asarray(anomaly.dataobj)[..., 1:-1].any()

    with open(tmp_path / "out" / "cases.csv", newline="") as stream:
        (row,) = csv.DictReader(stream)
    assert row["case"] == name
    assert float(row["volume_ml"]) == pytest.approx(metrics.volume_ml(np.asarray(mask.dataobj), given.affine), rel=1e-4)
    found = _json(tmp_path / "out" / "metrics.json")
    for results in (found["results"], found["competitors"]["flair threshold"]):
        assert results["shares"] == {"slices": 7, "healthy": pytest.approx(4 / 7), "called_lesion": pytest.approx(
            results["shares"]["called_lesion"])}
        assert {"mixed", "unhealthy", "slice_level", "volumes"} <= results.keys()
    assert found["results"]["volumes"]["lesion_dice"] == pytest.approx(float(row["dice"]), rel=1e-4)
    assert found["competitors"]["flair threshold"]["volumes"]["lesion_dice"] > 0.8  # the ball is bright
    assert found["checkpoint"] == _json(tmp_path / "out" / "manifest.json")["checkpoint"] == IDENTITY | {
        "sha256": found["checkpoint"]["sha256"]}
    assert found["settings"]["guidance"] == 2.0
    assert "lesion dice" in report.table
    assert "PHANTOM" not in report.table
    assert report.pictures == [tmp_path / "out" / f"{name}_overlay.png"]
    assert not report.failed


def test_what_was_done_already_is_not_done_again(run, config, tmp_path):
    first = run()
    maps = next((tmp_path / "out").glob("*_map.nii.gz"))
    written = maps.stat().st_mtime_ns
    again = run()
    assert again.again
    assert maps.stat().st_mtime_ns == written
    assert (again.table, again.pictures, again.finished) == (first.table, first.pictures, first.finished)
    assert not run(overwrite=True).again
    config.translation.median = not config.translation.median  # other masks from the same curves
    assert not run().again
    maps.unlink()
    assert not run().again
    assert maps.exists()


def test_a_calibration_is_used_again_only_for_the_same(run, config, tmp_path, monkeypatch):
    made = []
    original = validation.calibrate
    monkeypatch.setattr(validation, "calibrate", lambda *a, **k: made.append(k["made_with"]) or original(*a, **k))
    run()
    first = (tmp_path / "out" / "calibration.json").read_bytes()
    maps = next((tmp_path / "out").glob("*_map.nii.gz"))
    before = np.asarray(nib.load(maps).dataobj).copy()
    config.translation.components = 0  # changes masks, no curves
    run()
    assert len(made) == 1
    assert (tmp_path / "out" / "calibration.json").read_bytes() == first
    np.testing.assert_array_equal(np.asarray(nib.load(maps).dataobj), before)
    config.translation.guidance = 3.0
    run()
    run(seed=1)  # other parameters under the same name
    assert [entry["settings"]["guidance"] for entry in made] == [2.0, 3.0, 3.0]
    assert made[1]["checkpoint"] != made[2]["checkpoint"]


def test_a_bad_case_is_named_and_the_others_go_on(run, tmp_path, case_writer):
    for i, name in enumerate(("a", "b", "c")):
        case_writer(tmp_path / "in", name, seed=i, lesion=name == "a", segmented=name != "c")
    (tmp_path / "in" / "b" / "b_t1.nii.gz").unlink()
    report = run(tmp_path / "in")
    assert report.finished == 2
    assert list(report.failed) == ["b"]
    assert "b_t1.nii.gz: missing" in report.failed["b"]
    assert any(line.startswith("failed b: ") for line in report.lines())
    assert _json(tmp_path / "out" / "manifest.json")["failed"] == report.failed
    assert {path.name for path in (tmp_path / "out").glob("c_*")} == {"c_mask.nii.gz", "c_map.nii.gz"}
    assert _json(tmp_path / "out" / "metrics.json")["results"]["shares"]["slices"] == 7  # of case a alone


def test_without_truth_there_are_volumes_but_no_metrics(run, tmp_path, case_writer):
    case_writer(tmp_path / "in", "a", seed=0, segmented=False)
    (tmp_path / "in" / phantom.MANIFEST).write_text("{}")
    report = run(tmp_path / "in" / "a")  # a single case's folder
    assert report.table is None
    assert _json(tmp_path / "out" / "metrics.json")["results"] == {}
    assert _json(tmp_path / "out" / "manifest.json")["phantom"]
    assert (tmp_path / "out" / "a_mask.nii.gz").exists()


def test_phantom_figures_are_called_so(run, tmp_path, case_writer):
    case_writer(tmp_path / "in", "a", seed=0)
    (tmp_path / "in" / phantom.MANIFEST).write_text("{}")
    assert run(tmp_path / "in").table.startswith("PHANTOM figures from 1 cases, 7 slices")


@pytest.mark.parametrize(("field", "value", "message"), [
    ("translation.forward_steps", 51, "forward_steps is 51: it must be in 1..50"),
    ("translation.modality", (0, 4), "only 4 channels"),
    ("translation.clipping", "hard", "clipping is 'hard'"),
    ("translation.batch_size", 0, "batch_size is 0"),
    ("model.image_size", 32, r"slices are \[16, 16, 4\]"),
    ("data.root", "nowhere", "no prepared dataset"),
])
def test_mistakes_are_named_before_anything_is_computed(run, config, field, value, message):
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=message):
        run()


def test_a_moved_source_says_what_to_do(run, prepared, config, tmp_path):
    store = tmp_path / "store"
    store.mkdir()
    for path in (prepared / "store").iterdir():
        (store / path.name).symlink_to(path)
    manifest = _json(store / "manifest.json") | {"source": "/gone"}
    (store / "manifest.json").unlink()
    (store / "manifest.json").write_text(json.dumps(manifest))
    config.data.root = str(store)
    with pytest.raises(UserError, match=r"prepared from are not there .*--input FOLDER"):
        run()


@pytest.mark.parametrize(("respacing", "forward_steps", "expected"), [
    ("", 30, 30), ("10", 30, 6), ("ddim10", 30, 6), ("10", 50, 10), ("10", 1, 1)])
def test_forward_steps_counts_original_steps(config, respacing, forward_steps, expected):
    config.translation.update({"respacing": respacing, "forward_steps": forward_steps})
    process, settings = forward_setup(config)
    assert settings.steps == expected
    assert process.schedule.timesteps[settings.steps - 1] < forward_steps
    assert all(process.schedule.timesteps[settings.steps:] >= forward_steps)


def test_fingerprint(toy_network):
    assert fingerprint(toy_network(0)) == fingerprint(toy_network(0)) != fingerprint(toy_network(1))


def test_most_anomalous():
    score = np.full(40, 1.0)
    score[[20, 21, 22, 5, 35]] = [0.1, 0.2, 0.3, 0.4, 0.5]
    assert most_anomalous(score, 3) == [5, 20, 35]  # 21 and 22 look like 20
    assert most_anomalous(np.array([0.3, 0.2]), 4) == [0, 1]


def test_tally_counts_cases_with_truth(prepared, tmp_path, case_writer):
    case_writer(tmp_path, "healthy", seed=9, lesion=False)
    case_writer(tmp_path, "unknown", seed=9, segmented=False)
    tally = Tally()
    for folder in (prepared / "cases" / "case_0", tmp_path / "healthy", tmp_path / "unknown"):
        case = read_slices(find_cases(folder)[0], 16)
        answers = {}
        for name in ("perfect", "nothing"):
            mask = np.zeros(case.inputs.shape[:3], bool)
            if name == "perfect" and case.truth is not None:
                mask = case.slice_truth
            answers[name] = Masks(mask.astype(np.float32), mask, mask, mask.any((1, 2)), np.ones(len(mask)))
        tally.add(case, answers)
    found = tally.results()
    assert (tally.cases, tally.slices) == (2, 14)
    assert found["perfect"]["mixed"]["dice"] == found["perfect"]["unhealthy"]["dice"] == 1
    assert found["nothing"]["mixed"]["dice"] == pytest.approx(11 / 14, abs=1e-6)
    assert found["perfect"]["shares"]["healthy"] == pytest.approx(11 / 14)
    volumes = found["perfect"]["volumes"]
    assert (volumes["lesion_cases"], volumes["healthy_cases"], volumes["healthy_ml"]) == (1, 1, 0.0)
    assert volumes["lesion_dice"] > 0.85  # what resizing to 16 px and back costs
    assert Tally().results() == {}
