"""Exported networks and datasets for nnU-Net can be read by this project and by other programs."""

import csv
import dataclasses
import shutil

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
from flax import nnx
from run_helpers import AFFINE, read_json, read_volume

from hae_jax import Localizer
from hae_jax.commands import export as command
from hae_jax.data.cases import MODALITIES
from hae_jax.errors import UserError
from hae_jax.files import write_json
from hae_jax.localization.calibration import MapThreshold
from hae_jax.model import UNet
from hae_jax.pipeline import export
from hae_jax.pipeline.cache_key import calibration_key, weights_hash
from hae_jax.pipeline.nnunet import ORDER, export_nnunet
from hae_jax.runs import TrainedRun, load_run
from hae_jax.training.state import network_config
from hae_jax.training.weights import SHIPPED


@pytest.fixture
def trained(one_level_config, tmp_path, monkeypatch):
    """A network as `load_run` returns it for a run folder, with its own calibration."""
    config = one_level_config
    model = UNet(network_config(config.to_dict()), nnx.Rngs(0))
    identity = {"path": "runs/a/7", "step": 7, "parameters": "ema 0.9", "sha256": weights_hash(model, config)}
    run = TrainedRun(model, config, identity, tmp_path / "runs" / "a")
    made = MapThreshold("residual", "healthy_fpr", "image labels", 0.25, 0.5, 0, 1.0, 3, 4,
                        made_with=calibration_key(config, None, run.method, identity))
    (run.folder / "calibrations").mkdir(parents=True)
    write_json(run.folder / "calibrations" / "residual_000000000000.json", dataclasses.asdict(made))
    monkeypatch.setattr(export, "load_run", lambda source: run)
    return run, made


def metrics_of(folder, sha256):
    """Writes metrics as translate.py does."""
    value = {"mean": 0.7512, "low": 0.7, "high": 0.8, "cases": 5}
    write_json(folder / "metrics.json", {
        "checkpoint": {"sha256": sha256}, "phantom": True, "cases": 5, "method": "residual", "rule": "healthy_fpr",
        "labels": "image labels", "results": {"lesion_slices": {"dice": value}, "volumes": {"hd95_mm": {
            "mean": 3.0, "low": None, "high": None, "cases": 1}}}})
    return folder


def test_the_folder_is_taken_as_it_is(trained, tmp_path, capsys):
    run, made = trained
    metrics_of(tmp_path, run.identity["sha256"])
    command.main(["--to", str(tmp_path / "shared"), "--license", "cc-by-4.0", "--results", str(tmp_path)])
    assert "complete its model card, README.md" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "shared").iterdir()) == [
        "README.md", "calibration.json", "config.json", "model.safetensors"]
    found = load_run(tmp_path / "shared")
    assert {**found.identity, "path": None} == {**run.identity, "path": None}  # exactly the same network
    assert Localizer.load(tmp_path / "shared").calibration.threshold == made.threshold
    card = (tmp_path / "shared" / "README.md").read_text()
    front = card.split("---")[1]
    for line in ("library_name: hae-jax", "license: cc-by-4.0", "pipeline_tag: image-segmentation"):
        assert line in front
    assert "| lesion-slice Dice | 0.751 | 0.700 to 0.800 | 5 |" in card
    assert "PHANTOM metrics" in card
    assert "| HD95, mm | 3.000 | - | 1 |" in card
    assert "Research use only" in card


def test_half_precision_leaves_the_calibration_out(trained, tmp_path):
    (said,) = export.export_network("a", tmp_path / "shared", half=True)
    assert "half precision changes the weights" in said
    found = load_run(tmp_path / "shared")
    assert found.calibration() is None
    assert found.identity["parameters"] == "ema 0.9, half precision"


def test_mistakes_leave_nothing(trained, tmp_path):
    with pytest.raises(UserError, match=r"metrics\.json: was made with another network"):
        export.export_network("a", tmp_path / "shared", results=metrics_of(tmp_path, "other"))
    with pytest.raises(UserError, match=r"metrics\.json: cannot be read"):
        export.export_network("a", tmp_path / "shared", results=tmp_path / "nowhere")
    assert not (tmp_path / "shared").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    with pytest.raises(UserError, match="is not empty"):
        export.export_network("a", tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine"]


@pytest.mark.parametrize("arguments", [["--to", "a", "--cases", "2"], ["--nnunet", "a", "--results", "b", "--half"]])
def test_options_of_the_other_target_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(arguments)
    assert stop.value.code == 2
    assert "leave" in capsys.readouterr().err


def test_exported_weights_can_be_exported_in_half_precision(trained, tmp_path, monkeypatch):
    export.export_network("a", tmp_path / "full")
    monkeypatch.setattr(export, "load_run", load_run)
    assert export.export_network(tmp_path / "full", tmp_path / "same") == []
    (said,) = export.export_network(tmp_path / "full", tmp_path / "half", half=True)
    assert "half precision changes the weights" in said
    full, same, half = ((tmp_path / name / "model.safetensors").stat().st_size for name in ("full", "same", "half"))
    assert same == full
    assert half < 0.6 * full


def test_calibrations_of_shipped_weights_are_beside_their_results(trained, tmp_path, monkeypatch):
    """translate.py writes them there."""
    run, made = trained
    monkeypatch.chdir(tmp_path)
    shipped = run._replace(folder=SHIPPED / "toy")
    assert shipped.calibration() is None
    shutil.copytree(run.folder / "calibrations", "results/toy/calibrations")
    assert shipped.calibration() == made


@pytest.mark.parametrize("half", [False, True])  # they are in half precision
def test_shipped_weights_are_copied(tmp_path, half):
    assert export.export_network("phantom", tmp_path / "shared", half=half) == []
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "shared" / name).read_bytes() == (SHIPPED / "phantom" / name).read_bytes()
    assert read_json(tmp_path / "shared" / "calibration.json") == read_json(SHIPPED / "phantom" / "calibration.json")


def test_masks_become_a_dataset_of_nnunet(run, config, three_cases, tmp_path):
    """SimpleITK, which nnU-Net uses, reads images and labels on one grid. Cases are in the order of sureness."""
    config.translation.update({"method": "residual", "save_probability": True})
    done = run(three_cases)
    folder = tmp_path / "nnUNet_raw" / "Dataset501_Lesion"
    command.main(["--nnunet", str(folder), "--results", str(done.output), "--cases", "2"])
    described = read_json(folder / "dataset.json")
    assert described["channel_names"] == {"0": "flair", "1": "t1", "2": "t1ce", "3": "t2"}
    assert described["labels"] == {"background": 0, "lesion": 1}
    assert (described["numTraining"], described["file_ending"]) == (2, ".nii.gz")
    with open(folder / ORDER, newline="") as stream:
        rows = list(csv.DictReader(stream))
    names = [row["case"] for row in rows]
    sureness = [float(row["sureness"]) for row in rows]
    assert sureness == sorted(sureness, reverse=True)
    assert all(0 <= value <= 1 for value in sureness)
    assert {path.name for path in (folder / "labelsTr").iterdir()} == {f"{name}.nii.gz" for name in names}
    assert len(list((folder / "imagesTr").iterdir())) == 8
    for name in names:
        label = SimpleITK.ReadImage(folder / "labelsTr" / f"{name}.nii.gz")
        mask = read_volume(done.output / f"{name}_mask.nii.gz")
        np.testing.assert_array_equal(read_volume(folder / "labelsTr" / f"{name}.nii.gz"), mask)
        for channel, modality in enumerate(("flair", "t1", "t1ce", "t2")):
            path = folder / "imagesTr" / f"{name}_{channel:04d}.nii.gz"
            original = three_cases / name / f"{name}_{modality}.nii.gz"
            np.testing.assert_array_equal(read_volume(path), read_volume(original))
            image = SimpleITK.ReadImage(path)
            for look in ("GetSize", "GetOrigin", "GetSpacing", "GetDirection"):
                assert getattr(image, look)() == getattr(label, look)()


def test_the_translated_files_are_exported(run, config, three_cases, tmp_path):
    """The names of cases come from a table, and one case has its affine in metres."""
    config.translation.update({"method": "residual", "save_probability": True})
    rows = [["case", "patient", *MODALITIES]]
    for name, unit, scale in (("mm", "mm", 1.0), ("metres", "meter", 1e-3)):
        paths = [tmp_path / f"{name}{i}.nii.gz" for i in range(4)]
        for path, modality in zip(paths, MODALITIES, strict=True):
            volume = read_volume(three_cases / "a" / f"a_{modality}.nii.gz")
            image = nib.Nifti1Image(volume, np.diag([scale, scale, scale, 1]) @ AFFINE)
            image.header.set_xyzt_units(unit)
            nib.save(image, path)
        rows.append([name, name, *map(str, paths)])
    (tmp_path / "cases.csv").write_text("".join(f"{','.join(row)}\n" for row in rows))
    done = run(tmp_path / "cases.csv")
    assert sorted(export_nnunet(done.output, tmp_path / "set")) == ["metres", "mm"]
    with open(tmp_path / "set" / ORDER, newline="") as stream:
        found = {row["case"]: row for row in csv.DictReader(stream)}
    # The noise of the two cases differs, and so do their masks a little.
    assert float(found["mm"]["sureness"]) == pytest.approx(float(found["metres"]["sureness"]), abs=0.1)
    assert 0 < float(found["mm"]["lesion_ml"]) == pytest.approx(float(found["metres"]["lesion_ml"]), rel=0.5)
    (tmp_path / "mm0.nii.gz").unlink()
    with pytest.raises(UserError, match=r"mm0\.nii\.gz: no longer exists, so mm cannot be exported"):
        export_nnunet(done.output, tmp_path / "set2")


def test_what_a_dataset_needs_is_said(run, config, three_cases, tmp_path):
    config.translation.method = "residual"
    done = run(three_cases)
    with pytest.raises(UserError, match=r"run translate\.py again with --save-probability"):
        export_nnunet(done.output, tmp_path / "set")
    with pytest.raises(UserError, match=r"manifest\.json: cannot be read"):
        export_nnunet(tmp_path, tmp_path / "set")
    assert not (tmp_path / "set").exists()
