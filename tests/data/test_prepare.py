"""Preparation of source folders with the command: split, broken cases, overwriting, the PyTorch layout."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from hae_jax.commands.prepare_data import main
from hae_jax.data import prepare as prepare_module
from hae_jax.data.prepare import prepare
from hae_jax.data.store import MANIFEST, open_store, verify_store
from hae_jax.errors import UserError

NAME = "BraTS2021_00000"
HALF = {"train_fraction": 0.5, "val_fraction": 0.25}


@pytest.fixture
def source(golden, tmp_path):
    """Four copies of the golden case: p0 .. p3. With the default seed, train is p2 and p0, val p3, test p1."""
    for i in range(4):
        folder = shutil.copytree(golden / "brats_raw" / NAME, tmp_path / "raw" / f"p{i}")
        for path in list(folder.iterdir()):
            path.rename(folder / path.name.replace(NAME, folder.name))
    return tmp_path / "raw"


def snapshot(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_prepared_slices_are_the_golden_ones(source, golden, tmp_path):
    report = prepare(source, tmp_path / "store", **HALF)
    assert report.cases == {"train": 2, "val": 1, "test": 1}
    assert report.skipped == {}
    expected = np.load(golden / "brats_slices.npz")
    store = open_store(tmp_path / "store")
    for split in ("val", "test"):
        rows = store.split(split).read(range(4))
        np.testing.assert_allclose(rows["image"].transpose(0, 3, 1, 2), expected["x"], rtol=0, atol=5e-7)
        np.testing.assert_array_equal(rows["mask"][:, None], expected["mask"])
        np.testing.assert_array_equal(rows["label"], expected["label"])
        np.testing.assert_array_equal(rows["slice"], expected["slice_index"])


def test_manifest_says_how_it_was_made(source, tmp_path):
    prepare(source, tmp_path / "store", image_size=32, seed=4, **HALF)
    manifest = open_store(tmp_path / "store").manifest
    assert manifest["source"] == str(source)
    assert {"image_size": 32, "split_seed": 4, **HALF}.items() <= manifest["settings"].items()
    assert "tensorstore" in manifest["provenance"]["versions"]
    assert manifest["slice_shape"] == [32, 32, 4]
    assert manifest["modalities"] == ["flair", "t1", "t1ce", "t2"]
    image = nib.load(source / "p1" / "p1_t1.nii.gz")
    for case in manifest["cases"]:
        assert case["name"] in manifest["split"][case["split"]]
        assert tuple(case["shape"]) == image.shape
        np.testing.assert_array_equal(case["affine"], image.affine)


def test_two_processes_write_the_same_bytes(source, tmp_path):
    prepare(source, tmp_path / "one", **HALF)
    prepare(source, tmp_path / "two", workers=2, **HALF)
    one, two = snapshot(tmp_path / "one"), snapshot(tmp_path / "two")
    del one[Path(MANIFEST)], two[Path(MANIFEST)]
    assert one == two


def test_broken_cases_are_named_and_the_rest_is_kept(source, tmp_path, capsys):
    intact = prepare(source, tmp_path / "intact", **HALF)
    truncated = source / "p0" / "p0_t2.nii.gz"
    truncated.write_bytes(truncated.read_bytes()[:300])
    (source / "p1" / "p1_seg.nii.gz").unlink()
    with pytest.raises(SystemExit) as stop:
        main(["--source", str(source), "--output", str(tmp_path / "store"), "--workers", "1",
              "--train-fraction", "0.5", "--val-fraction", "0.25"])
    assert stop.value.code == 1
    printed = capsys.readouterr().out
    assert f"skipped p0: {truncated}: cannot be read" in printed
    assert "skipped p1" in printed
    assert "no segmentation" in printed
    manifest = open_store(tmp_path / "store").manifest
    assert set(manifest["skipped"]) == {"p0", "p1"}
    before = open_store(intact.output).manifest["split"]
    assert manifest["split"] == {split: [n for n in names if n not in ("p0", "p1")] for split, names in before.items()}
    assert verify_store(tmp_path / "store") == []


def test_nothing_usable_writes_nothing(source, tmp_path):
    for path in source.glob("*/*_seg.nii.gz"):
        path.unlink()
    with pytest.raises(UserError, match="none of 4 cases can be used"):
        prepare(source, tmp_path / "store", **HALF)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw"]


def test_too_few_cases_for_the_published_fractions(source, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--source", str(source), "--output", str(tmp_path / "store")])
    assert stop.value.code == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("error: 4 cases")
    assert "set --val-fraction to 0.251" in message
    assert "\n" not in message
    assert not (tmp_path / "store").exists()


def test_existing_output_is_replaced_only_on_request_and_only_by_a_complete_one(source, tmp_path, monkeypatch):
    output = tmp_path / "store"
    prepare(source, output, **HALF)
    before = snapshot(output)
    with pytest.raises(UserError, match="--overwrite"):
        prepare(source, output, **HALF)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module.StoreWriter, "finish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(source, output, image_size=32, overwrite=True, **HALF)
    assert snapshot(output) == before
    prepare(source, output, image_size=32, overwrite=True, **HALF)
    assert open_store(output).manifest["slice_shape"] == [32, 32, 4]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw", "store"]


def test_the_dataset_that_a_killed_run_was_to_replace_is_back(source, tmp_path, capsys):
    output = tmp_path / "store"
    prepare(source, output, **HALF)
    before = snapshot(output)
    output.rename(tmp_path / ".7-a.replaced.store")  # killed between its two renames
    (tmp_path / ".7-b.partial.store").mkdir()
    with pytest.raises(UserError, match="store: exists; give --overwrite"):
        prepare(source, output, image_size=32, **HALF)
    assert snapshot(output) == before
    assert "store: restored; the run that was replacing it was killed" in capsys.readouterr().out
    prepare(source, output, image_size=32, overwrite=True, **HALF)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw", "store"]


@pytest.mark.parametrize(("source", "output", "says"), [
    ("loop", "store", "loop: links to loop, which cannot be reached"), ("raw", "loop", "loop: exists and is not"),
    ("raw", "gone", "gone: exists and is not"), ("", "store", "--source is empty"), ("raw", "", "--output is empty"),
])
def test_paths_that_lead_nowhere_are_said_before_anything_is_read(tmp_path, monkeypatch, source, output, says):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "gone").symlink_to("nowhere")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare_module, "read_case", None)
    with pytest.raises(UserError, match=says):
        prepare(source, output, **HALF)


def test_a_folder_that_is_no_dataset_is_never_replaced(source, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("...")
    with pytest.raises(UserError, match="not a prepared dataset"):
        prepare(source, tmp_path / "thesis", overwrite=True, **HALF)
    assert (tmp_path / "thesis" / "chapter1.tex").exists()


def test_some_modalities_in_another_order(source, tmp_path):
    prepare(source, tmp_path / "all", image_size=32, **HALF)
    main(["--source", str(source), "--output", str(tmp_path / "two"), "--modalities", "t2", "flair", "--workers", "1",
          "--image-size", "32", "--train-fraction", "0.5", "--val-fraction", "0.25"])
    every, two = open_store(tmp_path / "all"), open_store(tmp_path / "two")
    assert two.modalities == ("t2", "flair")
    assert two.manifest["slice_shape"] == [32, 32, 2]
    np.testing.assert_array_equal(two.split("val").read(2)["image"], every.split("val").read(2)["image"][..., [3, 0]])


def write_t1(path, shape, spacing=(1, 1, 1), lesion=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = np.random.default_rng(0).integers(50, 99, shape).astype(np.int16)
    if lesion:
        image[:] = 0
        image[2:4, 2:4, 1] = 1
    nib.save(nib.Nifti1Image(image, np.diag([*spacing, 1])), path)


def test_unsegmented_test_images_take_no_place_in_the_split(tmp_path):
    for i in range(4):
        write_t1(tmp_path / "raw" / "imagesTr" / f"c{i}_0000.nii.gz", (9, 9, 3))
        write_t1(tmp_path / "raw" / "labelsTr" / f"c{i}.nii.gz", (9, 9, 3), lesion=True)
        write_t1(tmp_path / "raw" / "imagesTs" / f"d{i}_0000.nii.gz", (9, 9, 3))
    report = prepare(tmp_path / "raw", tmp_path / "store", modalities=("t1",), image_size=16, **HALF)
    assert report.cases == {"train": 2, "val": 1, "test": 1}
    assert report.skipped == {}


def test_one_warning_for_all_cases_that_it_is_about(tmp_path):
    for i in range(4):
        write_t1(tmp_path / "raw" / f"c{i}.nii.gz", (9, 9, 3), spacing=(1 + i, 1, 1))
        write_t1(tmp_path / "raw" / f"c{i}_seg.nii.gz", (9, 9, 3), (1 + i, 1, 1), lesion=True)
    report = prepare(tmp_path / "raw", tmp_path / "store", modalities=("t1",), image_size=16, workers=2, **HALF)
    (texts,) = report.warnings.values()
    assert {name: text.partition(" and")[0] for name, text in texts.items()} == {
        f"c{i}": f"axial slices show {9 * (1 + i)} x 9 mm" for i in (1, 2, 3)}
    assert open_store(tmp_path / "store").manifest["warnings"] == {name: [text] for name, text in texts.items()}
    (line,) = [line for line in report.lines() if line.startswith("warning: ")]
    assert re.match(r"warning: c[123] and 2 more: axial slices show", line)


@pytest.fixture
def npz_source(golden, tmp_path):
    """The golden slices in the published PyTorch layout. Slice 10 of patient 7 must be sorted after slice 9."""
    slices = np.load(golden / "brats_slices.npz")
    for split, name, positions in (("train", "00007", (9, 10)), ("train", "00001", (3,)), ("val", "00002", (1, 2)),
                                   ("test", "00003", (5,))):
        folder = tmp_path / "npz" / f"npy_{split}" / f"patient_{name}"
        folder.mkdir(parents=True)
        for i, k in enumerate(positions):
            np.savez(folder / f"slice_{k}.npz", x=slices["x"][2 + i][None], y=slices["y"][2 + i][None])
    return tmp_path / "npz"


def test_pytorch_layout_is_imported_as_is(npz_source, golden, tmp_path):
    report = prepare(npz_source, tmp_path / "store")
    assert report.cases == {"train": 2, "val": 1, "test": 1}
    store = open_store(tmp_path / "store")
    assert store.manifest["split"] == {"train": ["00001", "00007"], "val": ["00002"], "test": ["00003"]}
    assert store.cases[1] == {"name": "00007", "split": "train", "shape": None, "affine": None, "slices": 2,
                              "lesion_slices": 2}
    rows = store.split("train").read([1, 2])
    expected = np.load(golden / "brats_slices.npz")
    np.testing.assert_array_equal(rows["image"].transpose(0, 3, 1, 2), expected["x"][2:4])
    np.testing.assert_array_equal(rows["mask"][:, None], expected["mask"][2:4])
    np.testing.assert_array_equal(rows["slice"], [9, 10])


def test_broken_pytorch_slices(npz_source, tmp_path):
    with pytest.raises(UserError, match="set --image-size"):
        prepare(npz_source, tmp_path / "store", image_size=64)
    with pytest.raises(UserError, match=r"4 channels, not 1 \(t1\); say with --modalities"):
        prepare(npz_source, tmp_path / "store", modalities=("t1",))
    damaged = npz_source / "npy_val" / "patient_00002" / "slice_2.npz"
    damaged.write_bytes(damaged.read_bytes()[:500])
    assert "slice_2.npz" in prepare(npz_source, tmp_path / "store").skipped["00002"]
    shutil.copytree(npz_source / "npy_train" / "patient_00001", npz_source / "npy_test" / "patient_00001")
    with pytest.raises(UserError, match="00001 is in more than one split"):
        prepare(npz_source, tmp_path / "other")


def test_slices_behind_dead_links_are_said(npz_source, tmp_path):
    (npz_source / "npy_train" / "patient_00001" / "slice_4.npz").symlink_to("/mnt/gone/slice_4.npz")
    (npz_source / "npy_test" / "patient_00009").symlink_to("/mnt/gone/patient_00009")
    report = prepare(npz_source, tmp_path / "store")
    assert report.skipped.keys() == {"00001", "00009"}
    assert all("links to /mnt/gone/" in reason for reason in report.skipped.values())
    shutil.rmtree(npz_source / "npy_val")
    (npz_source / "npy_val").symlink_to("/mnt/gone/npy_val")
    with pytest.raises(UserError, match="npy_val: links to /mnt/gone/npy_val"):
        prepare(npz_source, tmp_path / "other")
    (tmp_path / "lost").symlink_to("/mnt/gone/store")
    with pytest.raises(UserError, match="lost: links to /mnt/gone/store"):
        open_store(tmp_path / "lost")


def test_command_from_another_folder_and_verify(source, tmp_path, capsys):
    script = Path(__file__).resolve().parents[2] / "tools" / "prepare_data.py"
    output = tmp_path / "a folder" / "store"
    command = [sys.executable, script, "--source", source, "--output", output, "--train-fraction", "0.5",
               "--val-fraction", "0.25"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "4 cases" in done.stdout
    assert "100%" in done.stderr  # the progress bar
    main(["--verify", str(output)])
    (output / "val/cases/c.0").write_bytes(b"")
    with pytest.raises(SystemExit) as stop:
        main(["--verify", str(output)])
    assert stop.value.code == 1
    assert "val/cases/c.0: changed" in capsys.readouterr().out
    assert json.loads((output / MANIFEST).read_text())["provenance"]["command"][0].endswith("prepare_data.py")


@pytest.mark.parametrize("flags", [[], ["--source", "a"], ["--verify", "a", "--output", "b"]])
def test_flags_that_do_not_go_together(flags):
    with pytest.raises(SystemExit) as stop:
        main(flags)
    assert stop.value.code == 2
