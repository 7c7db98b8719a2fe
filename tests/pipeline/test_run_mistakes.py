"""Wrong cases, folders and settings are named in errors and do not affect other cases."""

import csv
import dataclasses
import json
import os
import shutil
import tempfile
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from run_helpers import read_json

from hae_jax.errors import UserError
from hae_jax.pipeline import per_case, results_folder
from hae_jax.pipeline.checks import find_inputs


@pytest.mark.parametrize("damaged", ["a.json", "a.npz"])
def test_a_damaged_record_is_said_and_its_case_done_again(run, three_cases, tmp_path, capsys, damaged):
    run(three_cases)
    path = tmp_path / "out" / "records" / damaged
    path.write_bytes(path.read_bytes()[:-100])
    shutil.copy(path, path.with_name(f".777.partial.{damaged}"))  # a leftover of a killed process
    assert run(three_cases).translated == 1
    said = capsys.readouterr().out
    assert "a.json: is damaged" in said
    assert ".777." not in said
    assert run(three_cases).finished == 3


RECORD = {"key": "k", "run_key": "r", "folder": "/in/a", "patient": "a", "files": ["a_mask.nii.gz", "slices/a.json"],
          "made_by": {}, "failed": None, "volumes": {"residual": {}}}


@pytest.mark.parametrize("change", [
    {"files": ["../thesis.tex"]}, {"files": ["/etc/hosts"]}, {"files": [""]}, {"files": [3]}, {"key": None},
    {"patient": []}, {"made_by": 3}, {"failed": {}}, {"volumes": "x"}, {"volumes": {"residual": []}}])
def test_a_record_that_names_other_files_does_not_count(change):
    results_folder._check_record(RECORD)
    with pytest.raises(ValueError, match="not what this program writes"):
        results_folder._check_record(RECORD | change)


def test_a_record_s_damaged_bytes_are_said(run, three_cases, tmp_path, monkeypatch):
    run(three_cases)
    damage = zlib.error("invalid code lengths set")
    monkeypatch.setattr(results_folder.np, "load", lambda path: (_ for _ in ()).throw(damage))
    with pytest.raises(UserError, match=r"a.npz: is damaged .*; delete it and a.json beside it"):
        run(three_cases)


def test_warnings_that_differ_in_their_numbers_are_said_once(run, config, case_writer, tmp_path, capsys):
    config.translation.method = "threshold"
    for i, name in enumerate("abc"):
        case_writer(tmp_path / "in", name, seed=i, affine=np.diag([-4.0 - i, -1.2, 4, 1]))
    run(tmp_path / "in")
    said = [line for line in capsys.readouterr().out.splitlines() if "axial slices show" in line]
    assert [line.partition(" mm")[0] for line in said] == [
        "a: axial slices show 80 x 29", "2 more cases like a: axial slices show 80 x 29"]
    kept = [read_json(tmp_path / "out" / "slices" / f"{name}.json")["warnings"] for name in "abc"]
    assert [warnings[0].partition(" mm")[0] for warnings in kept] == [
        f"axial slices show {width} x 29" for width in (80, 100, 120)]


def test_a_case_too_large_for_memory_fails_alone(run, three_cases, monkeypatch):
    read = per_case.read_slices

    def memory_for_small_ones(files, *rest):
        if files.name == "b":
            raise MemoryError("Unable to allocate 3 TiB")
        return read(files, *rest)

    monkeypatch.setattr(per_case, "read_slices", memory_for_small_ones)
    report = run(three_cases)
    assert report.finished == 2
    assert report.failed["b"].startswith("does not fit in memory (Unable to allocate 3 TiB)")


def test_a_file_behind_a_closed_door_fails_its_case_alone(run, three_cases, monkeypatch):
    closed, stat = three_cases / "b" / "b_t1.nii.gz", Path.stat

    def refused(path, **options):
        if path == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", refused)
    isfile = os.path.isfile
    monkeypatch.setattr(os.path, "isfile", lambda path: Path(path) != closed and isfile(path))
    report = run(three_cases)
    assert (report.finished, report.failed.keys()) == (2, {"b"})


def test_results_of_another_patient_of_that_name_are_not_replaced(run, three_cases, tmp_path):
    run(three_cases)
    elsewhere = shutil.copytree(three_cases, tmp_path / "elsewhere")
    assert run(elsewhere).translated == 0  # the same files, moved
    (elsewhere / "a" / "a_seg.nii.gz").unlink()
    with pytest.raises(UserError, match=r"has results of another case a, from .*/in/a; give another folder"):
        run(elsewhere)
    assert run(elsewhere, overwrite=True).translated == 3


def test_whose_results_they_are_is_known_without_the_manifest_and_by_any_path(run, three_cases, config, tmp_path,
                                                                              monkeypatch):
    run(three_cases)
    (tmp_path / "out" / "manifest.json").unlink()  # as after a killed run
    config.translation.components = 7
    (tmp_path / "link").symlink_to(three_cases)
    assert run(tmp_path / "link").translated == 3
    monkeypatch.chdir(three_cases.parent)
    config.translation.components = 8
    assert run(Path(three_cases.name)).translated == 3  # the same cases with another path
    (tmp_path / "out" / "manifest.json").unlink()
    other = shutil.copytree(three_cases, tmp_path / "other" / three_cases.name)
    (other / "a" / "a_seg.nii.gz").unlink()
    monkeypatch.chdir(other.parent)
    with pytest.raises(UserError, match="has results of another case a"):
        run(Path(other.name))


def test_a_name_that_is_no_text_fails_its_case_alone(run, three_cases, tmp_path):
    (three_cases / "b").rename(three_cases / os.fsdecode(b"M\xfcller"))
    for path in (three_cases / os.fsdecode(b"M\xfcller")).iterdir():
        path.rename(path.with_name(path.name.replace("b_", os.fsdecode(b"M\xfcller_"), 1)))
    report = run(three_cases)
    assert report.finished == 2
    assert report.failed == {"M\\xfcller": "M\\xfcller: its name is not UTF-8; rename its folder or files"}


def test_results_do_not_go_among_the_cases(run, three_cases, tmp_path):
    with pytest.raises(UserError, match="is the folder of the cases; give another"):
        run(three_cases, output=three_cases)
    run(three_cases, output=three_cases / "results")
    assert run(three_cases, output=tmp_path / "again").wanted == 3  # results do not count as cases
    with pytest.raises(UserError, match=r"has results of translate\.py"):
        run(three_cases / "results", output=tmp_path / "other")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be made or written to"):
        run(three_cases, output=tmp_path / "file" / "out")


def _read_only(monkeypatch, folder):
    """Makes a folder refuse new files. Permissions would have no effect for root."""
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


def test_a_bad_case_is_named_and_the_others_go_on(run, tmp_path, three_cases, monkeypatch):
    (three_cases / "b" / "b_t1.nii.gz").rename(three_cases / "b" / "kept")
    report = run(three_cases)
    assert (report.finished, report.translated) == (2, 2)
    assert list(report.failed) == ["b"]
    assert "b_t1.nii.gz: missing" in report.failed["b"]
    assert any(line.startswith("failed b: ") for line in report.lines())
    assert read_json(tmp_path / "out" / "manifest.json")["failed"] == report.failed
    assert {path.name for path in (tmp_path / "out").glob("c_*")} == {"c_mask.nii.gz", "c_map.nii.gz"}
    assert read_json(tmp_path / "out" / "metrics.json")["results"]["shares"]["slices"] == 7  # of case a only
    (three_cases / "b" / "kept").rename(three_cases / "b" / "b_t1.nii.gz")
    again = three_cases / "elsewhere" / "b"
    shutil.copytree(three_cases / "b", again)
    report = run(three_cases)
    assert (report.finished, report.failed.keys()) == (2, {"b"})  # two cases have this name
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
    with pytest.raises(OSError, match="No space left"):  # at once, not once for each case
        run(three_cases, output=tmp_path / "other")
    monkeypatch.undo()
    assert run(three_cases, output=tmp_path / "other").finished == 3


def test_a_case_that_shows_nothing_at_the_network_s_size_is_named(run, three_cases):
    for path in (three_cases / "b").glob("b_*.nii.gz"):
        image = nib.load(path)
        values = np.zeros((64, 64, 5), np.int16)
        values[0, 0, 2] = 100  # is lost in slices of 16 px
        nib.save(nib.Nifti1Image(values, image.affine), path)
    report = run(three_cases)
    assert (report.finished, report.translated, report.wanted, list(report.failed)) == (2, 2, 3, ["b"])
    assert "is lost when its slices are made 16 x 16 px" in report.failed["b"]


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
    (store / "manifest.json").write_text(json.dumps(read_json(store / "manifest.json") | {"source": "/gone"}))
    config.data.root = str(store)
    with pytest.raises(UserError, match=r"prepared from were not found .*--input FOLDER"):
        run()


def test_prepared_data_that_do_not_fit_are_not_used_for_other_cases(config, three_cases):
    config.model.image_size = 32
    store, cases, _ = find_inputs(config, three_cases)
    assert store is None
    assert len(cases) == 3
    with pytest.raises(UserError, match="but the network needs"):
        find_inputs(config, None)
