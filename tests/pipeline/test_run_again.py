"""Use of results of earlier and simultaneous runs: finished cases, calibrations, shards, tables."""

import dataclasses
import fcntl
import json
import os
import shutil
import types

import nibabel as nib
import numpy as np
import pytest
from run_helpers import read_json, read_volume

from hae_jax.data.cases import find_cases
from hae_jax.errors import UserError
from hae_jax.localization import methods
from hae_jax.localization.calibration import PRESETS
from hae_jax.pipeline import calibrations, per_case
from hae_jax.pipeline.cache_key import case_key, digest, weights_hash
from hae_jax.pipeline.results_folder import RECORDS, ResultsFolder


def test_what_was_done_already_is_not_done_again(run, config, three_cases, tmp_path):
    first = run(three_cases)
    maps = tmp_path / "out" / "a_map.nii.gz"
    written = maps.stat().st_mtime_ns
    again = run(three_cases)
    assert (first.translated, again.translated, again.finished) == (3, 0, 3)
    assert maps.stat().st_mtime_ns == written
    assert (again.table, again.pictures, again.results) == (first.table, first.pictures, first.results)
    assert run(three_cases, overwrite=True).translated == 3
    config.translation.batch_size = 3  # does not affect results
    assert run(three_cases).translated == 0
    config.translation.median = not config.translation.median  # other masks from the same curves
    assert run(three_cases).translated == 3
    maps.unlink()
    assert run(three_cases).translated == 1
    assert maps.exists()
    (three_cases / "b" / "b_seg.nii.gz").unlink()  # the case has changed, so its key differs
    assert run(three_cases).translated == 1
    config.diffusion.schedule = "cosine"  # the same weights, imported once more with another schedule
    assert run(three_cases).translated == 3


def test_other_channels_of_the_same_file_are_another_case(run, three_cases, tmp_path):
    path = tmp_path / "set" / "imagesTs" / "a.nii.gz"
    path.parent.mkdir(parents=True)
    volumes = [nib.load(three_cases / "a" / f"a_{modality}.nii.gz") for modality in ("flair", "t1", "t1ce", "t2")]
    nib.save(nib.Nifti1Image(np.stack([np.asarray(v.dataobj) for v in volumes], -1), volumes[0].affine), path)
    assert run(tmp_path / "set").translated == 1  # taken as flair, t1, t1ce, t2
    (tmp_path / "set" / "dataset.json").write_text(json.dumps(
        {"modality": {"0": "T1w", "1": "FLAIR", "2": "t1gd", "3": "T2w"}}))
    assert run(tmp_path / "set").translated == 1
    assert run(tmp_path / "set").translated == 0


def test_masks_are_made_anew_for_a_calibration_that_came_later(run, config, three_cases, tmp_path):
    kept = tmp_path / "calibrations"
    run(three_cases, calibrations=kept)
    config.data.root = str(tmp_path / "gone")
    assert run(three_cases, calibrations=kept).translated == 3  # without the data, the stored calibration is used
    assert run(three_cases, calibrations=kept).translated == 0
    (path,) = kept.glob("hae_*.json")
    facts = read_json(path)
    (kept / "hae_newer.json").write_text(json.dumps(facts | {"threshold": facts["threshold"] - 0.01}))
    assert run(three_cases, calibrations=kept).translated == 3


def test_a_run_waits_for_another_in_the_same_folder(run, three_cases, tmp_path, on_message):
    (tmp_path / "out" / RECORDS).mkdir(parents=True)
    other = (tmp_path / "out" / RECORDS / ".0-of-1.lock").open("a")
    fcntl.flock(other, fcntl.LOCK_EX)
    said = []
    on_message(lambda message: said.append(message) or other.close())
    assert run(three_cases).finished == 3
    assert said[0] == f"{tmp_path / 'out'}: another run uses this folder; waiting until it ends"


def test_a_case_whose_files_change_meanwhile_has_failed(run, three_cases, monkeypatch):
    read = per_case.read_slices

    def still_being_copied(files, *rest):
        case = read(files, *rest)
        if files.name == "b":
            os.utime(files.paths[0], (1, 1))
        return case

    monkeypatch.setattr(per_case, "read_slices", still_being_copied)
    report = run(three_cases)
    assert (report.finished, report.translated) == (2, 2)
    assert report.failed == {"b": "its files were changed while it was translated; run the command again"}
    assert not any("finished before" in line or "belong to other shards" in line for line in report.lines())


def test_a_shard_answers_for_its_own_cases(run, three_cases):
    (three_cases / "b" / "b_t1.nii.gz").unlink()
    assert run(three_cases, num_shards=2, shard=1).failed_here
    other = run(three_cases, num_shards=2, shard=0)
    assert not other.failed_here
    assert any(line.startswith("failed b (of another shard): ") for line in other.lines())


def test_a_calibration_is_used_again_only_for_the_same(run, config, tmp_path, monkeypatch):
    made, folder = [], tmp_path / "calibrations"
    original = methods.Hae.calibrate
    monkeypatch.setattr(methods.Hae, "calibrate",
                        lambda self, results, with_: made.append(with_) or original(self, results, with_))
    run(calibrations=folder)
    (first,) = folder.glob("hae_*.json")
    before = first.read_bytes()
    config.translation.components = 0  # changes masks but no curves
    run(calibrations=folder, output=tmp_path / "elsewhere")
    assert len(made) == 1
    assert first.read_bytes() == before
    config.translation.guidance = 3.0
    run(calibrations=folder)
    run(calibrations=folder, seed=1)  # other parameters under the same name
    assert [entry["settings"]["guidance"] for entry in made] == [2.0, 3.0, 3.0]
    assert made[1]["checkpoint"] != made[2]["checkpoint"]
    assert read_json(tmp_path / "out" / "calibration.json")["made_with"] == made[2]


def test_a_calibrated_network_needs_its_data_no_more(run, config, three_cases, tmp_path):
    with_data = run(calibrations=tmp_path / "calibrations", source=three_cases)
    before = read_volume(tmp_path / "out" / "a_mask.nii.gz")
    config.data.root = str(tmp_path / "gone")
    without = run(three_cases, calibrations=tmp_path / "calibrations", output=tmp_path / "hospital")
    np.testing.assert_array_equal(read_volume(tmp_path / "hospital" / "a_mask.nii.gz"), before)
    assert with_data.results.keys() == {"hae", "threshold"}
    assert without.results.keys() == {"hae"}  # there are no slices to choose the threshold
    config.translation.guidance = 3.0
    with pytest.raises(UserError, match=r"a calibration is needed.*gone.* preset \(brats_600, brats_999\)"):
        run(three_cases, calibrations=tmp_path / "calibrations")
    config.translation.update({"method": "ddib", "ddib_steps": 5})  # has no presets
    with pytest.raises(UserError, match=r"give a calibration.json with --calibration"):
        run(three_cases, calibrations=tmp_path / "calibrations")


def test_a_preset_or_a_file_stands_in_for_a_calibration(run, config, three_cases, tmp_path, capsys):
    config.data.root = str(tmp_path / "gone")
    config.translation.calibration = "brats_600"
    assert run(three_cases).finished == 3
    assert "was made with forward_steps 600, but this run has 5" in capsys.readouterr().out
    config.translation.update({"respacing": "10", "reference": "null", "d_reverse": False, "clipping": "dynamic"})
    run(three_cases)
    said = capsys.readouterr().out
    for difference in ("respacing , but this run has 10", "reference healthy, but this run has null",
                       "d_reverse True, but this run has False", "clipping static, but this run has dynamic"):
        assert f"was made with {difference}" in said
    assert read_json(tmp_path / "out" / "calibration.json")["threshold"] == 0.99488
    config.translation.calibration = "atlas_600"
    with pytest.raises(UserError, match=r"atlas_600: was made for the modalities \(0,\)"):
        run(three_cases)
    (tmp_path / "half.json").write_text("{")
    for name in ("none", "half"):  # the message must not say to delete the user's file
        config.translation.calibration = str(tmp_path / f"{name}.json")
        with pytest.raises(UserError, match=rf"--calibration .*{name}\.json: .* or leave --calibration out") as error:
            run(three_cases)
        assert "delete" not in str(error.value)


def test_shards_share_a_folder(run, config, three_cases, tmp_path, monkeypatch):
    config.translation.batch_size = 7  # one case per batch, so that results with and without shards are equal
    whole = run(three_cases, output=tmp_path / "whole")
    first = run(three_cases, num_shards=2, shard=0)
    assert (first.translated, first.wanted) == (2, 3)
    assert "1 belong to other shards" in " ".join(first.lines())
    last = run(three_cases, num_shards=2, shard=1)
    assert (last.translated, last.finished) == (1, 3)
    assert last.results == whole.results
    assert len((tmp_path / "out" / "cases.csv").read_text().splitlines()) == 4
    for name in "abc":
        np.testing.assert_array_equal(read_volume(tmp_path / "out" / f"{name}_map.nii.gz"),
                                      read_volume(tmp_path / "whole" / f"{name}_map.nii.gz"))
    with pytest.raises(UserError, match="--shard 2 of --num-shards 2"):
        run(three_cases, num_shards=2, shard=2)
    read = ResultsFolder.measured
    monkeypatch.setattr(ResultsFolder, "measured", lambda self, case: (
        case == "a" and self.writing(case, ())) or read(self, case))  # as another shard with --overwrite does
    assert run(three_cases, num_shards=2, shard=1).finished == 2
    assert len((tmp_path / "out" / "cases.csv").read_text().splitlines()) == 3


@pytest.mark.parametrize("dies", [False, True])
def test_a_calibration_that_another_process_makes_is_waited_for(tmp_path, monkeypatch, on_message, dies):
    made = PRESETS["brats_600"]
    method = types.SimpleNamespace(name="toy", read_calibration=lambda fields: fields, calibrate=lambda *_: made)
    monkeypatch.setattr(calibrations, "validation_results", lambda *_: None)
    path = tmp_path / f"toy_{digest({})[:12]}.json"
    other = (tmp_path / f".{path.name}.lock").open("a")
    fcntl.flock(other, fcntl.LOCK_EX)
    said = []

    def other_ends(message):
        said.append(message)
        if not other.closed:
            if not dies:
                path.write_text('"the other\'s"')
            other.close()

    on_message(other_ends)
    assert calibrations.calibrated(None, method, None, tmp_path, {}) == (made if dies else "the other's")
    assert said[0].endswith("waiting for it")
    assert {file for file in tmp_path.iterdir() if file.name[0] != "."} == {path}


def test_a_run_that_is_stopped_leaves_no_tables_of_other_masks(run, config, three_cases, tmp_path, monkeypatch):
    run(three_cases)
    out, settings = tmp_path / "out", config.translation.median
    (out / "report.html").touch()
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
    assert not [name for name in ("metrics.json", "manifest.json", "report.html") if (out / name).exists()]
    assert (out / "cases.csv").read_text().count("\n") == 1  # the header
    monkeypatch.setattr(per_case, "write_volume", original)
    config.translation.median = settings  # the mask of b and the files of a are from the other settings
    assert run(three_cases).translated == written.index("b_mask.nii.gz") // 2 + 1
    assert (out / "cases.csv").read_text().count("\n") == 4


def test_cases_from_elsewhere_are_added_to_the_tables(run, config, three_cases, tmp_path):
    run(three_cases / "a")
    report = run(three_cases / "b")
    assert (report.finished, report.translated) == (2, 1)
    assert len((tmp_path / "out" / "cases.csv").read_text().splitlines()) == 3
    manifest = (tmp_path / "out" / "manifest.json").read_bytes()
    assert run(three_cases / "b").translated == 0
    assert (tmp_path / "out" / "manifest.json").read_bytes() == manifest  # that of the run that processed the cases
    assert {"host", "created", "git_revision"} <= json.loads(manifest)["cases"]["a"]["made_by"].keys()
    tables = [tmp_path / "out" / name for name in ("calibration.json", "calibration_threshold.json", "cases.csv")]
    before = [path.read_text() for path in tables]
    (tmp_path / "out" / "calibration_mine.json").write_text("the user's")
    config.translation.method = "threshold"
    assert run(three_cases / "c").finished == 1
    assert [path.exists() for path in tables] == [True, False, True]
    config.translation.method = "hae"
    assert run(three_cases / "b").translated == 0  # no case to process, but the tables are from this run again
    assert [path.read_text() for path in tables] == before
    assert (tmp_path / "out" / "calibration_mine.json").exists()


def test_results_that_no_longer_hold_are_taken_away(run, config, three_cases, tmp_path):
    config.translation.save_healthy = True
    run(three_cases)
    config.translation.save_healthy = False
    (three_cases / "b" / "b_t1.nii.gz").unlink()
    run(three_cases)
    left = {path.name for path in (tmp_path / "out").glob("?_*.nii.gz")}
    assert left == {"a_mask.nii.gz", "a_map.nii.gz", "c_mask.nii.gz", "c_map.nii.gz"}


def test_a_case_of_another_patient_is_another_case(three_cases):
    (case,) = find_cases(three_cases / "a")
    assert case_key({}, case) == case_key({}, case) != case_key({}, dataclasses.replace(case, patient="another"))


def test_weights_hash(toy_network, config):
    assert weights_hash(toy_network(0), config) == weights_hash(toy_network(0), config)
    assert weights_hash(toy_network(0), config) != weights_hash(toy_network(1), config)
    before = weights_hash(toy_network(0), config)
    config.model.attention, config.model.convolution = "cudnn", "xla"  # forms are not part of the key
    assert weights_hash(toy_network(0), config) == before
    config.model.num_heads = 2
    assert weights_hash(toy_network(0), config) != before


def test_a_calibration_that_came_with_the_weights_is_used(run, config, prepared, three_cases, tmp_path, capsys):
    """It is used without prepared data, but only for the network, method and settings that it was made for."""
    config.translation.update({"method": "residual", "weights": (1.0, 0.0, 0.0, 0.0), "across_mm": 0.0,
                               "rule": "healthy_fpr", "healthy_fpr": 0.01})
    run(three_cases, output=tmp_path / "first")
    shutil.copy(tmp_path / "first" / "calibration.json", tmp_path / "calibration.json")
    capsys.readouterr()
    run(three_cases, output=tmp_path / "second", shipped=tmp_path / "calibration.json")
    assert f"calibration: using {tmp_path / 'calibration.json'}, which came with" in capsys.readouterr().out
    config.data.root = str(tmp_path / "gone")
    report = run(three_cases, output=tmp_path / "third", shipped=tmp_path / "calibration.json")
    assert report.finished == 3
    for name in ("a_mask.nii.gz", "b_map.nii.gz"):
        volumes = [read_volume(tmp_path / folder / name) for folder in ("first", "second", "third")]
        np.testing.assert_array_equal(volumes[0], volumes[1])
        np.testing.assert_array_equal(volumes[0], volumes[2])
    for changes in ({"guidance": 1.0}, {"method": "hae"}):
        config.translation.update(changes)
        with pytest.raises(UserError, match="a calibration is needed"):
            run(three_cases, output=tmp_path / "other", shipped=tmp_path / "calibration.json")
    config.translation.update({"method": "residual", "guidance": 2.0})
    with pytest.raises(UserError, match="a calibration is needed"):
        run(three_cases, output=tmp_path / "other", seed=1, shipped=tmp_path / "calibration.json")
