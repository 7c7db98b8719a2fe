"""The contents of a page, without a browser: data, limits, hidden names and missing files."""

import itertools
import json
import os
import pwd
import re
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from report_folders import SLICES, THRESHOLD, write_results, write_run
from run_helpers import SHAPE

from hae_jax.commands.report import main
from hae_jax.errors import UserError
from hae_jax.report import cases, kinds, sprites
from hae_jax.report.privacy import Privacy
from hae_jax.report.results import Thresholds
from hae_jax.report.write import write_report

SMALL = 0.5 + 1e-4  # megabytes: less than the pictures of one case need


@pytest.fixture
def results(tmp_path):
    return write_results(tmp_path)


def test_a_user_without_a_home_gets_a_page(results, monkeypatch):
    """This happens in containers whose user has only a number."""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", lambda number: {}[number])
    with pytest.raises(RuntimeError, match="home"):
        Path.home()
    assert write_report(results).is_file()


@pytest.mark.parametrize(("file", "known"), [
    ("manifest.json", kinds.MANIFEST), ("metrics.json", kinds.METRICS), ("calibration.json", kinds.CALIBRATION),
    ("slices/a.json", {}), ("records/a.json", {})])
def test_values_of_another_kind_are_left_out_and_said(results, file, known):
    """Each field in turn has a wrong value, as in an edited file."""
    path, others = results / file, itertools.cycle([{"x": [None]}, None, "x", {}, [1e9, "x"], -1])
    before = path.read_text()
    for name, other in zip(json.loads(before), others, strict=False):
        _edit(path, **{name: other})
        notes = _data(write_report(results))["notes"]
        bad = name in known and other is not None and not known[name](other)
        assert (f"{file}: {name} is not what translate.py writes, and left out" in notes) == bad
        path.write_text(before)


@pytest.mark.parametrize("file", ["manifest.json", "slices/a.json", "cases.csv"])
def test_a_pipe_in_place_of_a_file_is_not_waited_for(results, file):
    (results / file).unlink()
    os.mkfifo(results / file)
    assert "is no file" in json.dumps(_data(write_report(results)))


@pytest.mark.parametrize("limit", [0, float("inf"), float("nan")])
def test_a_limit_that_is_none_is_refused(results, limit):
    with pytest.raises(UserError, match="--max-mb is"):
        write_report(results, limit_mb=limit)


def _data(page):
    """The data for the page's code."""
    return json.loads(re.search(r'id="data">(.*?)</script>', page.read_text(), re.S)[1])


def _edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_page_says_what_ran_and_what_came_out(results):
    data = _data(write_report(results))
    facts = dict(data["facts"])
    assert facts["weights"] == "a/model.safetensors, step 8000, ema, SHA-256 000000000000"
    assert facts["method"] == "residual, rule healthy_fpr"
    assert facts["calibration"].startswith(
        "threshold 0.4, slice threshold 0.4, slice AUC 0.970 on validation slices, 3 healthy and 2 lesion slices")
    assert [entry["name"] for entry in data["cases"]] == ["a", "b"]
    assert data["cases"][0]["dice"] == 0.9
    assert data["cases"][0]["index"] == SLICES
    assert data["failed"] == [["z", "z_t1.nii.gz: missing, copy it again"]]
    (row,) = data["metrics"]["rows"]
    assert row["definition"] == "volume Dice, over the lesion cases"
    assert row["values"] == [[0.9, 0.8, 0.95, 1]] * 2
    assert data["metrics"]["methods"] == ["residual", "threshold"]
    assert data["phantom"]
    assert data["notes"] == []


def test_links_and_commands_lead_to_files(results, tmp_path):
    entry = _data(write_report(results))["cases"][0]
    assert [link["text"] for link in entry["files"]] == ["mask", "map", "pseudo-healthy flair"]
    assert all((results / link["href"]).is_file() for link in entry["files"])
    commands = {command["program"]: command["text"] for command in entry["commands"]}
    assert commands["ITK-SNAP"] == "itksnap -g ../in/a/a_flair.nii.gz -s a_mask.nii.gz -o a_map.nii.gz"
    assert "fsleyes ../in/a/a_flair.nii.gz" in commands["FSLeyes"]
    assert "loadSegmentation" in commands["3D Slicer"]


def test_a_case_elsewhere_is_called_by_its_file_name_alone(results, monkeypatch):
    monkeypatch.setattr(cases.os.path, "commonpath", lambda paths: "/")
    entry = _data(write_report(results))["cases"][0]
    assert entry["commands"][0]["text"].startswith("itksnap -g a_flair.nii.gz ")


@pytest.mark.parametrize("limit", [25, SMALL])
def test_no_path_of_the_machine_is_in_the_page(results, tmp_path, limit):
    _edit(results / "slices" / "a.json", warnings=[f"{tmp_path}/in/My Data/x.nii.gz: looks odd"])
    page = write_report(results, limit_mb=limit)
    written = page.read_text() + "".join(path.read_text() for path in (results / "report").glob("*.js"))
    assert str(tmp_path) not in written
    assert tmp_path.parent.name not in written
    assert "x.nii.gz: looks odd" in written


@pytest.mark.parametrize("limit", [25, SMALL])
def test_an_anonymous_page_does_not_tell_names(tmp_path, limit):
    results = write_results(tmp_path, ("Maria_Berg", "Otto"))
    _edit(results / "manifest.json", failed={"Maria_Berg_2": f"{tmp_path}/in/Maria_Berg_2/scan_berg.nii: missing"})
    page = write_report(results, anonymize=True, limit_mb=limit)
    assert page.name == "report_anonymous.html"
    beside = list((results / "report_anonymous").glob("*"))
    written = page.read_text() + "".join(path.name + path.read_text() for path in beside)
    assert len(beside) == (2 if limit == SMALL else 0)
    for private in ("Maria", "Otto", "berg", str(tmp_path)):
        assert private not in written
    data = _data(page)
    assert [entry["name"] for entry in data["cases"]] == ["case_001", "case_003"]
    assert data["failed"] == [["case_002", "a file: missing"]]


def test_beyond_the_limit_pictures_lie_beside_the_page_and_are_used_again(results):
    write_report(results)
    assert not (results / "report").exists()
    page = write_report(results, limit_mb=SMALL)
    first, second = (results / "report" / f"{name}.js" for name in "ab")
    assert _data(page)["outside"] == {"a": "report/a.js", "b": "report/b.js"}
    assert 'class="pictures"' not in page.read_text()
    before = first.read_text(), _data(page)
    first.write_text(first.read_text().replace('"warnings":[]', '"warnings":["from before"]'))
    _edit(results / "slices" / "b.json", warnings=["new"])
    again = {entry["name"]: entry["warnings"] for entry in _data(write_report(results, limit_mb=SMALL))["cases"]}
    assert again == {"a": ["from before"], "b": ["new"]}  # only b was made again
    (results / "report" / "notes.js").write_text("mine")
    _edit(results / "slices" / "b.json", warnings=[])
    first.write_text(before[0])
    assert _data(write_report(results))["cases"] == before[1]["cases"]
    assert not first.exists()
    assert not second.exists()
    assert (results / "report" / "notes.js").read_text() == "mine"


def test_moved_and_damaged_volumes_are_named(results, tmp_path):
    shutil.move(tmp_path / "in" / "a", tmp_path / "moved")
    mask = results / "b_mask.nii.gz"
    mask.write_bytes(mask.read_bytes()[:40])
    (results / "b_map.nii.gz").unlink()
    a, b = _data(write_report(results))["cases"]
    assert "the images are not shown: a_flair.nii.gz: missing" in a["warnings"][0]
    assert a["viewable"]  # map and mask exist
    assert any("not shown: " in warning and "b_mask.nii.gz" in warning for warning in b["warnings"])
    assert "b_map.nii.gz is missing" in b["warnings"]


def test_a_run_that_has_not_finished_shows_what_there_is(results):
    for name in ("manifest.json", "metrics.json", "cases.csv"):
        (results / name).unlink()
    (results / "calibration.json").write_text("{")
    (results / "records" / "b.json").write_text(json.dumps({"row": None, "failed": "no head"}))
    (results / "records" / "c.json").write_text(json.dumps({"row": None, "failed": None}))
    data = _data(write_report(results))
    assert [entry["name"] for entry in data["cases"]] == ["a"]
    assert [name for name, _ in data["failed"]] == ["b", "c"]
    notes = " ".join(data["notes"])
    for said in ("manifest.json is missing", "calibration.json is not JSON (line 1", "the run is not finished"):
        assert said in notes


def test_results_without_scores_are_shown_too(results):
    shutil.rmtree(results / "slices")
    entry = _data(write_report(results))["cases"][0]
    assert entry["score"] == []
    assert entry["threshold_sensitivity"] is None
    assert entry["warnings"] == ["a.json is missing"]


@pytest.mark.parametrize(("make", "said"), [
    (lambda folder: folder / "nothing", "no such folder"),
    (lambda folder: folder, "has neither results of translate.py"),
])
def test_a_folder_that_is_no_result_is_one_line(tmp_path, capsys, make, said):
    with pytest.raises(SystemExit) as caught:
        main([str(make(tmp_path))])
    (line,) = capsys.readouterr().err.splitlines()
    assert (caught.value.code, said in line) == (2, True)
    assert not list(tmp_path.iterdir())


def test_the_folder_above_results_says_where_they_are(tmp_path):
    write_results(tmp_path)
    with pytest.raises(UserError, match="for example out"):
        write_report(tmp_path)


def test_the_command_prints_the_page(results, tmp_path, capsys):
    main([str(results), "--output", str(tmp_path / "page.html")])
    assert capsys.readouterr().out == f"{tmp_path / 'page.html'}\n"
    for arguments in (["--output", "page.pdf"], ["--max-mb", "0"], ["--output", ""]):
        with pytest.raises(SystemExit):
            main([str(results), *arguments])
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_threshold_sensitivity_is_what_lies_between_looser_and_stricter_thresholds():
    class Grid:
        affine = np.diag([10.0, 10, 10, 1])  # 1 ml

    anomaly = np.zeros((4, 4, 2), np.float32)
    anomaly[0, :3], anomaly[1, :2], anomaly[2] = 0.6, 0.42, 0.31  # 3, 2 and 4 voxels in each slice
    case = cases.ReadCase({"slice": [0, 1], "anomaly_score": [0.9, 0.45]}, Grid(), map=anomaly)
    # Lower thresholds: above 0.32 in both slices, 10 ml. Higher thresholds: above 0.5 in the first slice only, 3 ml.
    measure = cases.threshold_sensitivity
    assert measure(case, Thresholds(0.4, 0.4)) == pytest.approx((10 - 3) / (10 + 3 + 1))
    assert measure(case, Thresholds(0.4, 0.4, gated=False)) == pytest.approx((10 - 6) / (10 + 6 + 1))
    assert measure(case, Thresholds(None, 0.4)) is None
    assert measure(cases.ReadCase(case.facts, Grid(), map=np.zeros((4, 4, 2))), Thresholds(0.4, 0.4)) == 0


def test_sheets_hold_every_slice_once(monkeypatch):
    monkeypatch.setattr(sprites, "_SHEET", 32)
    volume = np.random.default_rng(0).integers(0, 256, (9, 13, 10), np.uint8)
    drawn, (tile, columns, per_sheet) = sprites.sheets(volume, exact=True), sprites.layout(volume.shape)
    assert (tile, columns, per_sheet, len(drawn)) == ((16, 16), 2, 4, 3)


def test_names_of_files_that_are_no_text(results):
    """Such a case fails, and the page shows its name with an escape."""
    _edit(results / "manifest.json", failed={"caf\udce9": "/in/caf\udce9.nii: its name is no text"})
    assert _data(write_report(results))["failed"] == [["caf\\udce9", "caf\\udce9.nii: its name is no text"]]


@pytest.mark.parametrize(("message", "clean"), [
    ("/home/me/x.nii.gz: bad", "x.nii.gz: bad"),
    ("see ~/x/y, ../a/b.nii and ./c", "see y, b.nii and c"),
    ("/secret dir/p/x.nii: bad (/secret dir/p)", "x.nii: bad (the folder)"),
    ("13 of 20 mm/s, and/or 1/2", "13 of 20 mm/s, and/or 1/2"),
    ("--input=/data/p", "--input=p"),
])
def test_paths_become_file_names(message, clean):
    assert Privacy(["/secret dir/p"], [], anonymous=False).text(message) == clean


def test_a_run_is_shown_while_it_goes_on(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "samples" / "step_0000009.png").write_bytes(b"half")
    data = _data(write_report(run))
    assert data["progress"] == [6, 100]
    assert data["columns"]["localization_dice"] == [[2, 0.2], [4, 0.4], [6, 0.6]]
    assert [step for step, _ in data["samples"]] == [1, 2]
    assert data["notes"] == [note for note in data["notes"] if "step_0000009.png is damaged" in note]
    assert str(tmp_path) not in (run / "report.html").read_text()


def test_a_long_log_is_thinned_out_to_means(tmp_path, monkeypatch):
    monkeypatch.setattr("hae_jax.report.training_run._POINTS", 3)
    run = write_run(tmp_path / "run", steps=6, samples=0)
    assert _data(write_report(run))["columns"]["images_per_second"] == [[2, 9.0], [4, 9.0], [6, 9.0]]
    assert _data(write_report(run))["columns"]["loss"][0] == [2, 0.75]


def test_the_volumes_of_the_page_are_those_of_the_files(results):
    case = cases.read(results, "a")
    mask = nib.load(results / "a_mask.nii.gz")
    assert case.mask.shape == SHAPE
    np.testing.assert_array_equal(case.grid.restore(case.mask), np.asarray(mask.dataobj) > 0)
    drawn = cases.volumes(case, Thresholds(THRESHOLD, THRESHOLD))
    assert drawn["spacing"] == pytest.approx(np.linalg.norm(mask.affine[:3, :3], axis=0), abs=1e-4)
    assert [image["name"] for image in drawn["images"]] == ["flair", "t1", "t1ce", "t2"]
    assert [image["healthy"] is not None for image in drawn["images"]] == [True, False, False, False]
    assert drawn["map"]["high"] == pytest.approx(2 * THRESHOLD)
