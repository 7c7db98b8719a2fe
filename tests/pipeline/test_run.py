"""The files of a whole run on small cases with every method: masks, maps, reconstructions, tables, pictures."""

import csv
import json
import shutil
import threading
import time

import jax
import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from run_helpers import IDENTITY, read_json, read_volume

from hae_jax.data.prepare import prepare
from hae_jax.errors import UserError
from hae_jax.evaluation import metrics
from hae_jax.phantom import cohort as phantom
from hae_jax.pipeline import per_case
from hae_jax.pipeline.per_case import most_anomalous
from hae_jax.pipeline.translate import translate


def test_a_run_writes_everything(run, config, prepared, tmp_path):
    config.evaluation.overlay_slices, config.evaluation.report = 2, True
    report = run(devices=4)
    (name,) = read_json(prepared / "store" / "manifest.json")["split"]["test"]
    written = {f"{name}_mask.nii.gz", f"{name}_map.nii.gz", f"{name}_overlay.png", "slices", "calibration.json",
               "calibration_threshold.json", "cases.csv", "metrics.json", "manifest.json", "records",
               "report.html"}
    kept = {path.name for path in (tmp_path / "out").glob("*_????????????.json")}  # calibrations, named by keys
    assert {name.split("_")[0] for name in kept} == {"hae", "threshold"}
    assert {path.name for path in (tmp_path / "out").iterdir() if path.name[0] != "."} == written | kept
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
    found = read_json(tmp_path / "out" / "metrics.json")
    for results in (found["results"], found["baselines"]["threshold"]):
        assert {name: results["shares"][name] for name in ("slices", "healthy")} == {
            "slices": 7, "healthy": pytest.approx(4 / 7)}
        assert {"all_slices", "lesion_slices", "slice_level", "volumes"} <= results.keys()
    assert found["results"]["shares"]["called_lesion"] == pytest.approx(int(row["lesion_slices"]) / 7)
    assert found["results"]["volumes"]["dice"]["mean"] == pytest.approx(float(row["dice"]), rel=1e-4)
    assert found["baselines"]["threshold"]["volumes"]["dice"]["mean"] > 0.8  # the ball is bright
    assert found["checkpoint"] == read_json(tmp_path / "out" / "manifest.json")["checkpoint"] == IDENTITY | {
        "sha256": found["checkpoint"]["sha256"]}
    assert found["settings"]["guidance"] == 2.0
    manifest = read_json(tmp_path / "out" / "manifest.json")
    assert {"versions", "git_revision", "host", "command", "seed", "seconds", "config", "checkpoint", "devices",
            "cases"} <= manifest.keys()
    assert manifest["versions"]["jax"] == jax.__version__
    assert manifest["config"]["translation"]["guidance"] == 2.0
    assert (manifest["seed"], manifest["checkpoint"]["path"]) == (config.seed, IDENTITY["path"])
    assert 0 < float(row["seconds"]) < manifest["seconds"]
    assert "volume Dice" in report.table
    assert "PHANTOM" not in report.table
    assert report.pictures == [tmp_path / "out" / f"{name}_overlay.png"]
    assert not report.failed


def test_the_healthy_counterpart_is_written_in_the_input_s_intensities(run, config, three_cases, tmp_path):
    config.translation.save_healthy = True
    run(three_cases)
    for modality in ("flair", "t2"):
        given = nib.load(three_cases / "a" / f"a_{modality}.nii.gz")
        healthy = nib.load(tmp_path / "out" / f"a_healthy_{modality}.nii.gz")
        np.testing.assert_array_equal(healthy.affine, given.affine)
        values = np.asarray(healthy.dataobj)
        assert values.shape == given.shape
        assert 20 < values[..., 1:-1].mean() < 300  # raw intensities are 50 to 250
        assert not values[..., [0, -1]].any()


def _brats_2023(case, modality):
    return f"{case}/{case}-{ {'flair': 't2f', 't1': 't1n', 't1ce': 't1c', 't2': 't2w', 'seg': 'seg'}[modality]}.nii.gz"


def _nnunet(case, modality):
    channel = ("t2", "flair", "t1ce", "t1").index(modality) if modality != "seg" else None
    return f"labelsTr/{case}.nii.gz" if channel is None else f"imagesTr/{case}_{channel:04}.nii.gz"


@pytest.mark.parametrize("layout", [_brats_2023, _nnunet])
def test_other_layouts_give_the_same(run, three_cases, tmp_path, layout):
    run(three_cases)
    other = tmp_path / "other"
    for path in sorted(three_cases.rglob("*.nii.gz")):
        case, modality = path.name.removesuffix(".nii.gz").split("_")
        (other / layout(case, modality)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, other / layout(case, modality))
    if layout is _nnunet:
        (other / "dataset.json").write_text(json.dumps(
            {"channel_names": {"0": "T2", "1": "FLAIR", "2": "T1ce", "3": "T1"}}))
    assert run(other, output=tmp_path / "again").finished == 3
    for case in "abc":
        for kind in ("mask", "map"):
            np.testing.assert_array_equal(*(read_volume(tmp_path / folder / f"{case}_{kind}.nii.gz")
                                            for folder in ("out", "again")))


def test_the_next_cases_are_read_while_one_is_finished(run, three_cases, monkeypatch, capsys):
    begun, waited, read, write = threading.Event(), [], per_case.read_slices, per_case.write_volume
    monkeypatch.setattr(per_case, "read_slices", lambda files, *rest: (
        files.name == "c" and begun.set()) or read(files, *rest))
    monkeypatch.setattr(per_case, "write_volume", lambda *arguments: (
        waited.append(begun.wait(10))) or write(*arguments))
    assert run(three_cases).finished == 3
    assert all(waited)
    assert "3.0/3 cases [" in capsys.readouterr().err  # the bar, which each slice advances


def test_a_second_reader_finds_results_of_an_oblique_scaled_4d_file_on_its_grid(run, config, tmp_path):
    affine = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.3, -0.2, 0.4) @ np.diag([-0.9, 1.25, 3]), [7, -80, 11])
    values = np.random.default_rng(0).integers(50, 100, (20, 24, 9, 4)).astype(np.int16)
    values[:5] = -2  # with slope and intercept: 0
    image = nib.Nifti1Image(values, affine)
    image.header.set_slope_inter(0.5, 1)
    path = tmp_path / "set" / "imagesTs" / "BRATS 001.nii.gz"
    path.parent.mkdir(parents=True)
    nib.save(image, path)
    (tmp_path / "set" / "dataset.json").write_text(json.dumps(
        {"modality": {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"}}))
    config.translation.save_healthy = True
    assert not run(tmp_path / "set").failed
    given = sitk.ReadImage(str(path))[..., 0]
    for kind, pixels in (("mask", "8-bit unsigned integer"), ("map", "32-bit float"), ("healthy_t2", "32-bit float")):
        ours = sitk.ReadImage(str(tmp_path / "out" / f"BRATS 001_{kind}.nii.gz"))
        assert ours.GetSize() == given.GetSize() == (20, 24, 9)
        assert ours.GetPixelIDTypeAsString() == pixels
        for attribute in ("GetSpacing", "GetOrigin", "GetDirection"):
            np.testing.assert_array_equal(getattr(ours, attribute)(), getattr(given, attribute)(), err_msg=attribute)
        assert not sitk.GetArrayFromImage(ours)[:, :, :5].any()  # outside the head
    assert sitk.GetArrayFromImage(ours)[:, :, 5:].all()


def test_filters_in_3d(run, config, three_cases, tmp_path):
    run(three_cases)
    before = read_volume(tmp_path / "out" / "a_map.nii.gz")
    config.translation.filter_dimensions = 3
    assert run(three_cases).translated == 3
    assert not np.array_equal(read_volume(tmp_path / "out" / "a_map.nii.gz"), before)
    assert len(list((tmp_path / "out").glob("hae_????????????.json"))) == 1  # curves do not depend on filters
    # The ball has fewer pixels in each slice, but more voxels.
    config.translation.update({"method": "threshold", "components": 40, "filter_dimensions": 2})
    for dimensions, voxels in ((2, 0), (3, 100)):
        config.translation.filter_dimensions = dimensions
        run(three_cases)
        found = read_volume(tmp_path / "out" / "a_mask.nii.gz").sum()
        assert found >= voxels if voxels else found == 0


def test_the_healthy_counterpart_ends_at_the_head(run, config, case_writer, tmp_path):
    case_writer(tmp_path / "in", "a", seed=0)
    for path in (tmp_path / "in" / "a").glob("a_*.nii.gz"):
        image = nib.load(path)
        values = np.asarray(image.dataobj).copy()
        values[:4] = 0
        nib.save(nib.Nifti1Image(values, image.affine, image.header), path)
    config.translation.save_healthy = True
    run(tmp_path / "in")
    healthy = read_volume(tmp_path / "out" / "a_healthy_flair.nii.gz")
    assert not healthy[:4].any()
    assert healthy[4:, :, 1:-1].all()


def test_a_method_without_counterparts_says_so(run, config, three_cases, capsys):
    config.translation.update({"method": "threshold", "save_healthy": True})
    run(three_cases)
    assert "save_healthy: the method threshold makes no pseudo-healthy reconstructions" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["residual", "ddib", "anoddpm-simplex", "anoddpm-gaussian", "threshold"])
def test_other_methods_have_the_same_door(run, config, three_cases, tmp_path, method):
    config.translation.update({"method": method, "ddib_steps": 5, "anoddpm_steps": 5})
    report = run(three_cases)
    assert report.finished == 3
    assert report.results.keys() == {method} | ({"threshold"} if method != "threshold" else set())
    assert read_volume(tmp_path / "out" / "a_mask.nii.gz").shape == (20, 24, 9)
    assert read_json(tmp_path / "out" / "metrics.json")["method"] == method
    with open(tmp_path / "out" / "cases.csv", newline="") as stream:
        scores = {row["case"]: float(row["anomaly_score"]) for row in csv.DictReader(stream)}
    assert scores["a"] > scores["b"] or method.startswith("anoddpm")  # only a has a lesion; the toy ignores noise
    assert run(three_cases).translated == 0


def test_classifier_guidance_has_the_same_door(config, toy_network, mesh_of, three_cases, tmp_path):
    class Guided(type(toy_network(0))):
        def classifier(self, x, t):
            return x.mean((1, 2)) @ self.kernel[...][:, :2]

    config.translation.update({"method": "classifier", "classifier_steps": 3})
    report = translate(Guided(0), IDENTITY, config, mesh_of(1), output=tmp_path / "out", source=three_cases)
    assert report.results.keys() == {"classifier", "threshold"}
    with pytest.raises(UserError, match="give its run with --classifier"):
        translate(toy_network(0), IDENTITY, config, mesh_of(1), output=tmp_path / "out", source=three_cases)


@pytest.mark.parametrize("method", ["residual", "hae", "ddib", "threshold"])
def test_one_channel_in_atlas_s_folders(run, config, prepared, tmp_path, method):
    source = tmp_path / "ATLAS_2" / "Training"
    for i in range(4):
        to = source / "R001" / f"sub-r001s00{i}" / "ses-1" / "anat" / f"sub-r001s00{i}_ses-1_space-MNI152NLin2009aSym"
        to.parent.mkdir(parents=True)
        for kind, name in (("t1", "T1w"), ("seg", "label-L_desc-T1lesion_mask")):
            shutil.copy(prepared / "cases" / f"case_{i}" / f"case_{i}_{kind}.nii.gz", f"{to}_{name}.nii.gz")
    config.data.modalities, config.model.in_channels, config.translation.modality = ("t1",), 1, (0,)
    config.data.root = str(tmp_path / "store")
    prepare(source, tmp_path / "store", modalities=("t1",), image_size=16, train_fraction=0.5, val_fraction=0.25)
    config.evaluation.overlay_slices = 1
    config.translation.update({"method": method, "ddib_steps": 5, "save_healthy": method != "threshold",
                               "weights": (1.0,)})  # the ball is bright
    report = run(source)
    assert (report.finished, report.failed) == (4, {})
    (mask,) = (tmp_path / "out").glob("*s000*_mask.nii.gz")
    case = mask.name.removesuffix("_mask.nii.gz")
    written = {path.name.removeprefix(f"{case}_") for path in mask.parent.glob(f"{case}_*")}
    assert written == {"mask.nii.gz", "map.nii.gz", "overlay.png"} | (
        {"healthy_t1.nii.gz"} if config.translation.save_healthy else set())
    assert read_volume(tmp_path / "out" / f"{case}_map.nii.gz")[..., 1:-1].any()
    results = read_json(tmp_path / "out" / "metrics.json")["results"]
    assert results["shares"]["slices"] == 4 * 7
    if method == "threshold":
        assert results["volumes"]["dice"]["mean"] > 0.8  # the ball is bright


def test_without_truth_there_are_volumes_but_no_metrics(run, tmp_path, case_writer):
    case_writer(tmp_path / "in", "a", seed=0, segmented=False)
    (tmp_path / "in" / phantom.MANIFEST).write_text("{}")
    report = run(tmp_path / "in" / "a")  # a single case's folder
    assert report.table is None
    assert read_json(tmp_path / "out" / "metrics.json")["results"] == {}
    assert read_json(tmp_path / "out" / "manifest.json")["phantom"]
    assert (tmp_path / "out" / "a_mask.nii.gz").exists()


def test_the_cases_times_add_up_to_the_run_s(run, three_cases, tmp_path, monkeypatch):
    written = per_case.write_volume
    monkeypatch.setattr(per_case, "write_volume", lambda *a: time.sleep(0.2) or written(*a))
    report = run(three_cases)
    with open(tmp_path / "out" / "cases.csv", newline="") as stream:
        seconds = [float(row["seconds"]) for row in csv.DictReader(stream)]
    assert min(seconds) > 0.4  # writing mask and map is part of the time
    assert sum(seconds) < report.seconds


def test_one_case_of_a_phantom_makes_them_phantom_figures(run, tmp_path, three_cases, case_writer, monkeypatch):
    case_writer(tmp_path / "phantom", "z", seed=0)
    (tmp_path / "phantom" / phantom.MANIFEST).write_text("{}")
    monkeypatch.chdir(tmp_path / "phantom" / "z")
    one = run(".", output=tmp_path / "one")
    assert one.phantom
    assert one.table.startswith("PHANTOM metrics from 1 case, 7 slices of 16 x 16 px, 57% of them healthy")
    (three_cases / "z").symlink_to(tmp_path / "phantom" / "z")
    assert run(three_cases).table.startswith("PHANTOM")
    (three_cases / "z").unlink()
    assert run(three_cases).phantom  # its results still exist
    assert not run(three_cases, output=tmp_path / "other").phantom


def test_most_anomalous():
    score = np.zeros(40)
    score[[20, 21, 22, 5, 35]] = [0.9, 0.8, 0.7, 0.6, 0.5]
    assert most_anomalous(score, 3) == [5, 20, 35]  # 21 and 22 are too close to 20
    assert most_anomalous(np.array([0.7, 0.8]), 4) == [0, 1]
