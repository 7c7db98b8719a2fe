"""Whole runs on small cases: everything is written, calibrations are kept, one bad case spoils nothing."""

import csv
import dataclasses
import fcntl
import json
import shutil
import tempfile
import types
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from hae_jax.data import phantom
from hae_jax.errors import UserError
from hae_jax.evaluation import metrics
from hae_jax.translation import methods, per_case, records, validation
from hae_jax.translation.per_case import most_anomalous
from hae_jax.translation.plan import fingerprint
from hae_jax.translation.run import translate

IDENTITY = {"path": "runs/a/1", "step": 1, "parameters": "params"}


@pytest.fixture
def run(config, toy_network, mesh_of, tmp_path):
    def call(source=None, seed=0, devices=1, **options):
        options = {"output": tmp_path / "out"} | options
        return translate(toy_network(seed), IDENTITY, config, mesh_of(devices), source=source, **options)

    return call


def _json(path):
    return json.loads(path.read_text())


def _volume(path):
    return np.asarray(nib.load(path).dataobj).copy()


def test_a_run_writes_everything(run, config, prepared, tmp_path):
    config.evaluation.overlay_slices = 2
    report = run(devices=4)
    (name,) = _json(prepared / "store" / "manifest.json")["split"]["test"]
    written = {f"{name}_mask.nii.gz", f"{name}_map.nii.gz", f"{name}_overlay.png", "calibration.json",
               "calibration_threshold.json", "cases.csv", "metrics.json", "manifest.json", "records"}
    kept = {path.name for path in (tmp_path / "out").glob("*_????????????.json")}  # calibrations by what they are of
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
    found = _json(tmp_path / "out" / "metrics.json")
    for results in (found["results"], found["competitors"]["threshold"]):
        assert {name: results["shares"][name] for name in ("slices", "healthy")} == {
            "slices": 7, "healthy": pytest.approx(4 / 7)}
        assert {"mixed", "unhealthy", "slice_level", "volumes"} <= results.keys()
    assert found["results"]["shares"]["called_lesion"] == pytest.approx(int(row["lesion_slices"]) / 7)
    assert found["results"]["volumes"]["dice"]["mean"] == pytest.approx(float(row["dice"]), rel=1e-4)
    assert found["competitors"]["threshold"]["volumes"]["dice"]["mean"] > 0.8  # the ball is bright
    assert found["checkpoint"] == _json(tmp_path / "out" / "manifest.json")["checkpoint"] == IDENTITY | {
        "sha256": found["checkpoint"]["sha256"]}
    assert found["settings"]["guidance"] == 2.0
    assert "volumes dice" in report.table
    assert "PHANTOM" not in report.table
    assert report.pictures == [tmp_path / "out" / f"{name}_overlay.png"]
    assert not report.failed


@pytest.fixture
def three_cases(tmp_path, case_writer):
    for i, name in enumerate(("a", "b", "c")):
        case_writer(tmp_path / "in", name, seed=i, lesion=name == "a", segmented=name != "c")
    return tmp_path / "in"


def test_what_was_done_already_is_not_done_again(run, config, three_cases, tmp_path):
    first = run(three_cases)
    maps = tmp_path / "out" / "a_map.nii.gz"
    written = maps.stat().st_mtime_ns
    again = run(three_cases)
    assert (first.translated, again.translated, again.finished) == (3, 0, 3)
    assert maps.stat().st_mtime_ns == written
    assert (again.table, again.pictures, again.results) == (first.table, first.pictures, first.results)
    assert run(three_cases, overwrite=True).translated == 3
    config.translation.batch_size = 3  # without influence on results
    assert run(three_cases).translated == 0
    config.translation.median = not config.translation.median  # other masks from the same curves
    assert run(three_cases).translated == 3
    maps.unlink()
    assert run(three_cases).translated == 1
    assert maps.exists()
    (three_cases / "b" / "b_seg.nii.gz").unlink()  # a changed case is another one
    assert run(three_cases).translated == 1


def test_a_calibration_is_used_again_only_for_the_same(run, config, tmp_path, monkeypatch):
    made, folder = [], tmp_path / "calibrations"
    original = methods.Hae.calibrate
    monkeypatch.setattr(methods.Hae, "calibrate",
                        lambda self, results, with_: made.append(with_) or original(self, results, with_))
    run(calibrations=folder)
    (first,) = folder.glob("hae_*.json")
    before = first.read_bytes()
    config.translation.components = 0  # changes masks, no curves
    run(calibrations=folder, output=tmp_path / "elsewhere")
    assert len(made) == 1
    assert first.read_bytes() == before
    config.translation.guidance = 3.0
    run(calibrations=folder)
    run(calibrations=folder, seed=1)  # other parameters under the same name
    assert [entry["settings"]["guidance"] for entry in made] == [2.0, 3.0, 3.0]
    assert made[1]["checkpoint"] != made[2]["checkpoint"]
    assert _json(tmp_path / "out" / "calibration.json")["made_with"] == made[2]


def test_a_calibrated_network_needs_its_data_no_more(run, config, three_cases, tmp_path):
    with_data = run(calibrations=tmp_path / "calibrations", source=three_cases)
    before = _volume(tmp_path / "out" / "a_mask.nii.gz")
    config.data.root = str(tmp_path / "gone")
    without = run(three_cases, calibrations=tmp_path / "calibrations", output=tmp_path / "hospital")
    np.testing.assert_array_equal(_volume(tmp_path / "hospital" / "a_mask.nii.gz"), before)
    assert with_data.results.keys() == {"hae", "threshold"}
    assert without.results.keys() == {"hae"}  # the threshold has nothing to be chosen on
    config.translation.guidance = 3.0
    with pytest.raises(UserError, match=r"neither data.root .*gone.* nor .* preset \(brats_600, brats_999\)"):
        run(three_cases, calibrations=tmp_path / "calibrations")
    config.translation.update({"method": "ddib", "ddib_steps": 5})  # for which there are no presets
    with pytest.raises(UserError, match=r"name a calibration.json with --calibration"):
        run(three_cases, calibrations=tmp_path / "calibrations")


def test_a_preset_or_a_file_stands_in_for_a_calibration(run, config, three_cases, tmp_path, capsys):
    config.data.root = str(tmp_path / "gone")
    config.translation.calibration = "brats_600"
    assert run(three_cases).finished == 3
    assert "was made with forward_steps 600, this run has 5" in capsys.readouterr().out
    config.translation.update({"respacing": "10", "reference": "null", "d_reverse": False, "clipping": "dynamic"})
    run(three_cases)
    said = capsys.readouterr().out
    for difference in ("respacing , this run has 10", "reference healthy, this run has null",
                       "d_reverse True, this run has False", "clipping static, this run has dynamic"):
        assert f"was made with {difference}" in said
    assert _json(tmp_path / "out" / "calibration.json")["threshold"] == 0.99488
    config.translation.calibration = "atlas_600"
    with pytest.raises(UserError, match=r"atlas_600: made for the modalities \(0,\)"):
        run(three_cases)
    (tmp_path / "half.json").write_text("{")
    for name in ("none", "half"):  # the user's own file: nobody is told to delete it
        config.translation.calibration = str(tmp_path / f"{name}.json")
        with pytest.raises(UserError, match=rf"--calibration .*{name}\.json: .* or leave --calibration out") as error:
            run(three_cases)
        assert "delete" not in str(error.value)


def test_shards_share_a_folder(run, three_cases, tmp_path, monkeypatch):
    whole = run(three_cases, output=tmp_path / "whole")
    first = run(three_cases, num_shards=2, shard=0)
    assert (first.translated, first.wanted) == (2, 3)
    assert "1 are left to other shards" in " ".join(first.lines())
    last = run(three_cases, num_shards=2, shard=1)
    assert (last.translated, last.finished) == (1, 3)
    assert last.results == whole.results
    assert len((tmp_path / "out" / "cases.csv").read_text().splitlines()) == 4
    for name in "abc":
        np.testing.assert_array_equal(_volume(tmp_path / "out" / f"{name}_map.nii.gz"),
                                      _volume(tmp_path / "whole" / f"{name}_map.nii.gz"))
    with pytest.raises(UserError, match="--shard 2 of --num-shards 2"):
        run(three_cases, num_shards=2, shard=2)
    read = records.read_measured
    monkeypatch.setattr(records, "read_measured", lambda output, case: (
        case == "a" and records.begin(output, case, ())) or read(output, case))  # by another shard, with --overwrite
    assert run(three_cases, num_shards=2, shard=1).finished == 2
    assert len((tmp_path / "out" / "cases.csv").read_text().splitlines()) == 3


@pytest.mark.parametrize("dies", [False, True])
def test_a_calibration_that_another_process_makes_is_waited_for(tmp_path, monkeypatch, dies):
    made = types.SimpleNamespace(save=lambda path: path.write_text("own"))
    method = types.SimpleNamespace(name="toy", load_calibration=lambda path: path.read_text(),
                                   calibrate=lambda *_: made)
    monkeypatch.setattr(validation, "_results", lambda *_: None)
    path = tmp_path / f"toy_{records.digest({})[:12]}.json"
    other = (tmp_path / f".{path.name}.lock").open("a")
    fcntl.flock(other, fcntl.LOCK_EX)
    said = []

    def other_ends(line, flush=False):
        said.append(line)
        if not other.closed:
            if not dies:
                path.write_text("the other's")
            other.close()

    monkeypatch.setattr("builtins.print", other_ends)
    store = types.SimpleNamespace(split=lambda name: [0])
    assert validation.calibrated(None, method, store, tmp_path, {}) == (made if dies else "the other's")
    assert said[0].endswith("waiting for it")
    assert {file for file in tmp_path.iterdir() if file.name[0] != "."} == {path}


def test_a_run_that_is_stopped_leaves_no_tables_of_other_masks(run, config, three_cases, tmp_path, monkeypatch):
    run(three_cases)
    out, settings = tmp_path / "out", config.translation.median
    written, original = [], per_case.write_volume

    def killed(path, *arguments):
        original(path, *arguments)
        written.append(path.name)
        if path.name == "b_mask.nii.gz":
            raise KeyboardInterrupt

    monkeypatch.setattr(per_case, "write_volume", killed)
    config.translation.median = not settings
    with pytest.raises(KeyboardInterrupt):
        run(three_cases)
    assert not [name for name in ("metrics.json", "manifest.json") if (out / name).exists()]
    assert (out / "cases.csv").read_text().count("\n") == 1  # the header
    monkeypatch.setattr(per_case, "write_volume", original)
    config.translation.median = settings  # b's mask is of the other settings, and so are a's files
    assert run(three_cases).translated == written.index("b_mask.nii.gz") // 2 + 1
    assert (out / "cases.csv").read_text().count("\n") == 4


@pytest.mark.parametrize("damaged", ["a.json", "a.npz"])
def test_a_damaged_record_is_said_and_its_case_done_again(run, three_cases, tmp_path, capsys, damaged):
    run(three_cases)
    path = tmp_path / "out" / "records" / damaged
    path.write_bytes(path.read_bytes()[:-100])
    shutil.copy(path, path.with_name(f".777.partial.{damaged}"))  # of a process that was killed
    assert run(three_cases).translated == 1
    said = capsys.readouterr().out
    assert "a.json: is damaged" in said
    assert ".777." not in said
    assert run(three_cases).finished == 3


def test_results_of_another_patient_of_that_name_are_not_replaced(run, three_cases, tmp_path):
    run(three_cases)
    elsewhere = shutil.copytree(three_cases, tmp_path / "elsewhere")
    assert run(elsewhere).translated == 0  # the same files, moved
    (elsewhere / "a" / "a_seg.nii.gz").unlink()
    with pytest.raises(UserError, match=r"holds results of another case a, from .*/in/a; give another folder"):
        run(elsewhere)
    assert run(elsewhere, overwrite=True).translated == 3


def test_cases_from_elsewhere_are_added_to_the_tables(run, config, three_cases, tmp_path):
    run(three_cases / "a")
    report = run(three_cases / "b")
    assert (report.finished, report.translated) == (2, 1)
    assert len((tmp_path / "out" / "cases.csv").read_text().splitlines()) == 3
    manifest = (tmp_path / "out" / "manifest.json").read_bytes()
    assert run(three_cases / "b").translated == 0
    assert (tmp_path / "out" / "manifest.json").read_bytes() == manifest  # it tells of the run that did the work
    assert {"host", "created", "git_revision"} <= json.loads(manifest)["cases"]["a"]["made_by"].keys()
    tables = [tmp_path / "out" / name for name in ("calibration.json", "calibration_threshold.json", "cases.csv")]
    before = [path.read_text() for path in tables]
    (tmp_path / "out" / "calibration_mine.json").write_text("the user's")
    config.translation.method = "threshold"
    assert run(three_cases / "c").finished == 1
    assert [path.exists() for path in tables] == [True, False, True]
    config.translation.method = "hae"
    assert run(three_cases / "b").translated == 0  # nothing to do, but the tables are this run's again
    assert [path.read_text() for path in tables] == before
    assert (tmp_path / "out" / "calibration_mine.json").exists()


def test_results_do_not_go_among_the_cases(run, three_cases, tmp_path):
    with pytest.raises(UserError, match="is the folder of the cases themselves"):
        run(three_cases, output=three_cases)
    run(three_cases, output=three_cases / "results")
    assert run(three_cases, output=tmp_path / "again").wanted == 3  # results are not taken for cases
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be made or written to"):
        run(three_cases, output=tmp_path / "file" / "out")


def _read_only(monkeypatch, folder):
    """Makes a folder refuse new files, as it does not for root."""
    original = tempfile.TemporaryFile

    def refusing(*args, dir=None, **kwargs):
        if Path(dir) == folder:
            raise PermissionError(13, "Permission denied", str(folder))
        return original(*args, dir=dir, **kwargs)

    monkeypatch.setattr(tempfile, "TemporaryFile", refusing)


def test_a_folder_that_cannot_be_written_to(run, three_cases, tmp_path, monkeypatch):
    (tmp_path / "shelf").mkdir()
    _read_only(monkeypatch, tmp_path / "shelf")
    with pytest.raises(UserError, match=r"shelf: cannot be made or written to \(Permission denied.*--output"):
        run(three_cases, output=tmp_path / "shelf")


def test_calibrations_in_a_read_only_place_are_used(run, config, three_cases, tmp_path, monkeypatch):
    run(three_cases, calibrations=tmp_path / "calibrations")
    config.data.root = str(tmp_path / "gone")
    _read_only(monkeypatch, tmp_path / "calibrations")
    before = sorted(path.name for path in (tmp_path / "calibrations").iterdir())
    assert run(three_cases, calibrations=tmp_path / "calibrations", output=tmp_path / "hospital").finished == 3
    assert sorted(path.name for path in (tmp_path / "calibrations").iterdir()) == before
    assert list((tmp_path / "hospital").glob("hae_????????????.json"))


def test_results_that_no_longer_hold_are_taken_away(run, config, three_cases, tmp_path):
    config.translation.save_healthy = True
    run(three_cases)
    config.translation.save_healthy = False
    (three_cases / "b" / "b_t1.nii.gz").unlink()
    run(three_cases)
    left = {path.name for path in (tmp_path / "out").glob("?_*.nii.gz")}
    assert left == {"a_mask.nii.gz", "a_map.nii.gz", "c_mask.nii.gz", "c_map.nii.gz"}


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
    before = _volume(tmp_path / "out" / "a_map.nii.gz")
    config.translation.filter_dimensions = 3
    assert run(three_cases).translated == 3
    assert not np.array_equal(_volume(tmp_path / "out" / "a_map.nii.gz"), before)
    assert len(list((tmp_path / "out").glob("hae_????????????.json"))) == 1  # curves know no filters
    # The ball has fewer pixels in each slice, but more voxels.
    config.translation.update({"method": "threshold", "components": 40, "filter_dimensions": 2})
    for dimensions, voxels in ((2, 0), (3, 100)):
        config.translation.filter_dimensions = dimensions
        run(three_cases)
        found = _volume(tmp_path / "out" / "a_mask.nii.gz").sum()
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
    healthy = _volume(tmp_path / "out" / "a_healthy_flair.nii.gz")
    assert not healthy[:4].any()
    assert healthy[4:, :, 1:-1].all()


def test_a_method_without_counterparts_says_so(run, config, three_cases, capsys):
    config.translation.update({"method": "threshold", "save_healthy": True})
    run(three_cases)
    assert "save_healthy: the method threshold makes no healthy counterparts" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["ddib", "anoddpm-simplex", "anoddpm-gaussian", "threshold"])
def test_other_methods_have_the_same_door(run, config, three_cases, tmp_path, method):
    config.translation.update({"method": method, "ddib_steps": 5, "anoddpm_steps": 5})
    report = run(three_cases)
    assert report.finished == 3
    assert report.results.keys() == {method} | ({"threshold"} if method != "threshold" else set())
    assert _volume(tmp_path / "out" / "a_mask.nii.gz").shape == (20, 24, 9)
    assert _json(tmp_path / "out" / "metrics.json")["method"] == method
    with open(tmp_path / "out" / "cases.csv", newline="") as stream:
        assert {row["lowest_similarity"] for row in csv.DictReader(stream)} == {""}  # their scores are none
    assert run(three_cases).translated == 0


def test_a_bad_case_is_named_and_the_others_go_on(run, tmp_path, three_cases, monkeypatch):
    (three_cases / "b" / "b_t1.nii.gz").rename(three_cases / "b" / "kept")
    report = run(three_cases)
    assert (report.finished, report.translated) == (2, 2)
    assert list(report.failed) == ["b"]
    assert "b_t1.nii.gz: missing" in report.failed["b"]
    assert any(line.startswith("failed b: ") for line in report.lines())
    assert _json(tmp_path / "out" / "manifest.json")["failed"] == report.failed
    assert {path.name for path in (tmp_path / "out").glob("c_*")} == {"c_mask.nii.gz", "c_map.nii.gz"}
    assert _json(tmp_path / "out" / "metrics.json")["results"]["shares"]["slices"] == 7  # of case a alone
    (three_cases / "b" / "kept").rename(three_cases / "b" / "b_t1.nii.gz")
    again = three_cases / "elsewhere" / "b"
    shutil.copytree(three_cases / "b", again)
    report = run(three_cases)
    assert (report.finished, report.failed.keys()) == (2, {"b"})  # two have this name
    shutil.rmtree(again)
    report = run(three_cases)
    assert (report.finished, report.translated, report.failed) == (3, 1, {})
    without = [row["case"] for row in csv.DictReader((tmp_path / "out" / "cases.csv").open())
               if row["lesion_slices"] == "0"]
    assert report.unflagged == tuple(without)
    assert any("2 of 3 cases: no slice was called a lesion slice" in line and "(a, b)" in line
               for line in dataclasses.replace(report, unflagged=("a", "b")).lines())

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(per_case, "write_volume", full_disk)
    report = run(three_cases, output=tmp_path / "other")
    assert report.finished == 0
    assert "No space left" in report.failed["a"]
    monkeypatch.setattr(records, "write_json", full_disk)  # the reason itself cannot be written
    report = run(three_cases, output=tmp_path / "third")
    assert (report.finished, report.failed.keys()) == (0, set("abc"))
    assert "No space left" in report.failed["c"]


def test_a_case_that_shows_nothing_at_the_network_s_size_is_named(run, three_cases):
    for path in (three_cases / "b").glob("b_*.nii.gz"):
        image = nib.load(path)
        values = np.zeros((64, 64, 5), np.int16)
        values[0, 0, 2] = 100  # falls between the pixels of a 16 px slice
        nib.save(nib.Nifti1Image(values, image.affine), path)
    report = run(three_cases)
    assert (report.finished, report.translated, report.wanted, list(report.failed)) == (2, 2, 3, ["b"])
    assert "is lost when its slices are made 16 x 16 px" in report.failed["b"]


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
    table = run(tmp_path / "in").table
    assert table.startswith("PHANTOM figures from 1 cases, 7 slices of 16 x 16 px, 57% of them healthy")


@pytest.mark.parametrize(("field", "value", "message"), [
    ("translation.forward_steps", 51, "forward_steps is 51: it must be in 1..50"),
    ("translation.modality", (0, 4), "the network has 4 channels, from 0 to 3"),
    ("translation.clipping", "hard", "clipping is 'hard'"),
    ("translation.batch_size", 0, "batch_size is 0"),
    ("translation.max_memory_gb", float("nan"), "--max-memory nan"),
    ("translation.components", -5, "components is -5"),
    ("translation.filter_dimensions", 4, "filter_dimensions is 4"),
    ("evaluation.overlay_slices", -1, "overlay_slices is -1"),
    ("model.image_size", 32, r"slices are \[16, 16, 4\]"),
    ("data.root", "nowhere", "no prepared dataset"),
])
def test_mistakes_are_named_before_anything_is_computed(run, config, field, value, message):
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=message):
        run()


def test_a_moved_source_says_what_to_do(run, prepared, config, tmp_path):
    store = shutil.copytree(prepared / "store", tmp_path / "store")
    (store / "manifest.json").write_text(json.dumps(_json(store / "manifest.json") | {"source": "/gone"}))
    config.data.root = str(store)
    with pytest.raises(UserError, match=r"prepared from are not there .*--input FOLDER"):
        run()


def test_fingerprint(toy_network):
    assert fingerprint(toy_network(0)) == fingerprint(toy_network(0)) != fingerprint(toy_network(1))


def test_most_anomalous():
    score = np.full(40, 1.0)
    score[[20, 21, 22, 5, 35]] = [0.1, 0.2, 0.3, 0.4, 0.5]
    assert most_anomalous(score, 3) == [5, 20, 35]  # 21 and 22 look like 20
    assert most_anomalous(np.array([0.3, 0.2]), 4) == [0, 1]
