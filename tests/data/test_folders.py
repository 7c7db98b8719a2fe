"""The walk through folders: links, folders without permission, and errors of single files or folders."""

import json
import os
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from hae_jax.data.cases import MODALITIES, find_cases, read_case
from hae_jax.data.layouts import looked_for
from hae_jax.errors import UserError


def save(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.ones((6, 7, 3), np.int16), np.diag([-1.0, -1, 1, 1])), path)


def brats(root, case, segmentation="seg"):
    for word in (*MODALITIES, *([segmentation] if segmentation else [])):
        save(root / case / f"{case}_{word}.nii.gz")


def describe(folder, **facts):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataset.json").write_text(json.dumps(facts))


def test_a_folder_under_two_names_is_walked_once(tmp_path):
    brats(tmp_path / "set" / "v2", "a")
    (tmp_path / "set" / "latest").symlink_to("v2", target_is_directory=True)
    brats(tmp_path / "set" / "x", "b")
    brats(tmp_path / "set" / "y", "c")
    (tmp_path / "set" / "x" / "y").symlink_to(tmp_path / "set" / "y", target_is_directory=True)
    (tmp_path / "set" / "y" / "x").symlink_to(tmp_path / "set" / "x", target_is_directory=True)
    (tmp_path / "link").symlink_to(tmp_path / "set", target_is_directory=True)
    for top in ("set", "link"):
        cases = find_cases(tmp_path / top)
        assert [(case.name, case.problem) for case in cases] == [("a", None), ("b", None), ("c", None)]
        assert [case.folder.parent.name for case in cases] == ["v2", "x", "y"]  # not the names of the links


def test_a_link_does_not_rename_what_lies_here(tmp_path):
    save(tmp_path / "z" / "P1" / "t1.nii.gz")
    (tmp_path / "all").symlink_to("z", target_is_directory=True)
    (tmp_path / "current").symlink_to(tmp_path / "z" / "P1", target_is_directory=True)
    (case,) = find_cases(tmp_path, ("t1",))
    assert (case.name, case.folder) == ("P1", tmp_path / "z" / "P1")


@pytest.fixture
def closed(monkeypatch):
    """Makes folders of these names inaccessible, as permissions do for users other than root."""
    names, listing, stat = set(), Path.iterdir, Path.stat

    def iterdir(path):
        if path.name in names:
            raise PermissionError(13, "Permission denied", str(path))
        return listing(path)

    def look(path, **how):
        if names & {parent.name for parent in Path(os.path.realpath(path)).parents}:
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, **how)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    monkeypatch.setattr(Path, "stat", look)
    return names


def test_a_closed_folder_does_not_end_the_others(tmp_path, capsys, closed):
    brats(tmp_path, "a")
    brats(tmp_path, "secret")
    (tmp_path / "out").symlink_to(tmp_path / "secret" / "deeper", target_is_directory=True)
    closed.add("secret")
    cases = {case.name: case for case in find_cases(tmp_path)}
    assert cases.keys() == {"a", "out", "secret"}
    assert cases["a"].problem is None
    for name in ("out", "secret"):  # they are reported, and the exit status is not 0
        with pytest.raises(UserError, match=rf"{name}: .*\(?Permission denied\)?"):
            read_case(cases[name])
    closed.add(tmp_path.name)
    with pytest.raises(UserError, match=r"cannot be looked into \(Permission denied\)"):
        find_cases(tmp_path)
    with pytest.raises(UserError, match=r"Permission denied"):
        find_cases(tmp_path / "secret" / "secret_t1.nii.gz")


def test_what_dead_links_lead_to_is_missed(tmp_path):
    for name in ("a", "b", "c", "e"):
        brats(tmp_path / "data", name)
    for path in ("b/b_seg", "c/c_t1"):
        (tmp_path / "data" / f"{path}.nii.gz").unlink()
        (tmp_path / "data" / f"{path}.nii.gz").symlink_to("/mnt/gone/file.nii.gz")
    (tmp_path / "data" / "d").symlink_to("/mnt/gone/d")
    (tmp_path / "data" / "e" / "e_seg.nii.gz").rename(tmp_path / "data" / "e" / ".e_seg.nii.gz.icloud")
    (tmp_path / "data" / "notes.txt").symlink_to("/mnt/gone/notes.txt")  # belongs to no case
    good, *lost = find_cases(tmp_path / "data")
    assert good.name == "a"
    read_case(good)
    assert [case.name for case in lost] == ["b", "c", "d", "e"]
    for case, says in zip(lost, ("b_seg.nii.gz: links to /mnt/gone", "c_t1.nii.gz: links to /mnt/gone",
                                 "d: links to /mnt/gone/d", "only its placeholder .e_seg.nii.gz.icloud"), strict=True):
        with pytest.raises(UserError, match=says):
            read_case(case)


def test_content_that_was_not_fetched_is_said(tmp_path):
    brats(tmp_path, "a")
    flair = tmp_path / "a" / "a_flair.nii.gz"
    content = flair.read_bytes()
    for text, says in ((b"", "is empty"), (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "git lfs pull"),
                       (b"/annex/objects/MD5E-s1--x.nii.gz\n", "datalad get")):
        flair.write_bytes(text)
        with pytest.raises(UserError, match=rf"a_flair\.nii\.gz: .*{says}"):
            read_case(find_cases(tmp_path)[0])
    flair.unlink()
    flair.symlink_to("../.git/annex/objects/x/y/z")
    with pytest.raises(UserError, match="datalad get"):
        read_case(find_cases(tmp_path)[0])
    flair.unlink()
    flair.write_bytes(content)
    read_case(find_cases(tmp_path)[0])


def test_a_dead_dataset_json_or_labels_folder_is_said(tmp_path):
    for name in ("one", "two"):
        save(tmp_path / name / "imagesTr" / "a_0000.nii.gz")
    (tmp_path / "one" / "dataset.json").symlink_to("/mnt/gone/dataset.json")
    (tmp_path / "two" / "labelsTr").symlink_to("/mnt/gone/labelsTr")
    for name, file in (("one", "dataset.json"), ("two", "labelsTr")):
        with pytest.raises(UserError, match=rf"{file}: links to /mnt/gone/{file}"):
            find_cases(tmp_path / name, ("t1",))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "latin-1", "utf-16"])
def test_encodings_of_dataset_json(tmp_path, encoding):
    save(tmp_path / "imagesTr" / "a_0000.nii.gz")
    text = json.dumps({"name": "Läsionen", "channel_names": {"0": "T1"}}, ensure_ascii=False)
    (tmp_path / "dataset.json").write_text(text, encoding=encoding)
    assert [case.name for case in find_cases(tmp_path, ("t1",))] == ["a"]


@pytest.mark.parametrize(("word", "taken"), [
    ("seg", True), ("tumor_seg", True), ("t1_lesion_mask", True), ("t1_brain_seg", False), ("pve_seg", False),
    ("brain_mask", False), ("t1_tissue_label", False)])
def test_segmentations_of_tissue_are_not_taken_for_lesions(tmp_path, word, taken):
    brats(tmp_path, "a", segmentation=word)
    (case,) = find_cases(tmp_path)
    assert (case.segmentation is not None) == taken
    if not taken:
        assert f"there: a_{word}.nii.gz" in looked_for(case)
        assert "a_seg.nii.gz" in looked_for(case)


def test_closed_labels_are_not_taken_for_none(tmp_path, closed):
    for folder in ("imagesTr", "labelsTr"):
        save(tmp_path / "one" / folder / "a.nii.gz")
    brats(tmp_path / "two", "b")
    closed.add("labelsTr")
    good, failed = find_cases(tmp_path)
    assert (good.name, good.problem, failed.name) == ("b", None, "one_imagesTr")
    assert "labelsTr: cannot be looked into (Permission denied)" in failed.problem


@pytest.mark.parametrize("facts", [None, {"channel_names": {"0": "T1", "1": "T2"}}, {"labels": {}}])
def test_a_folder_that_cannot_be_told_apart_fails_alone(tmp_path, facts):
    brats(tmp_path, "a")
    for name in ("x", "y"):
        for k in range(4):
            save(tmp_path / name / "imagesTr" / f"p_{k:04d}.nii.gz")
        if facts is not None:
            describe(tmp_path / name, **facts)
    good, *failed = find_cases(tmp_path)
    assert (good.name, good.problem) == ("a", None)
    assert [case.name for case in failed] == ["x_imagesTr", "y_imagesTr"]
    for case in failed:
        with pytest.raises(UserError, match=r"dataset\.json"):
            read_case(case)


@pytest.mark.parametrize("word", ["label", "labels", "lesion", "lesion_mask", "LABEL", "seg", "mask"])
@pytest.mark.parametrize("folder", [".", "{0}", "imagesTr"])
def test_segmentations_beside_one_file_per_case(tmp_path, capsys, folder, word):
    for case in ("p1", "p2"):
        for name in (case, f"{case}_{word}"):
            save(tmp_path / folder.format(case) / f"{name}.nii.gz")
    cases = find_cases(tmp_path, ("t1",))
    assert [case.name for case in cases] == ["p1", "p2"]
    assert all(read_case(case).mask.all() for case in cases)
    assert capsys.readouterr().err == ""


def test_labels_of_something_else_are_no_lesions(tmp_path):
    brats(tmp_path, "a", segmentation=None)
    save(tmp_path / "a" / "a_tissue_labels.nii.gz")
    assert find_cases(tmp_path)[0].segmentation is None


def test_what_is_made_from_a_patient_is_no_patient(tmp_path, capsys):
    patients = ["p1", "p1_2", "p1_b", "p1_post", "p1_ses-02", "p2", "q_brain"]
    for name in (*patients, "p1_label", "p1_lesion", "p1_brain", "p1_2_registered", "p2_brainmask"):
        save(tmp_path / f"{name}.nii.gz")
    cases = find_cases(tmp_path, ("t1",))
    assert [case.name for case in cases] == patients
    assert cases[0].segmentation.name == "p1_lesion.nii.gz"
    (line,) = capsys.readouterr().err.splitlines()
    assert "3 NIfTI files in no known layout: p1_2_registered.nii.gz, p1_brain.nii.gz, p2_brainmask.nii.gz (" in line
    (chosen,) = find_cases(tmp_path / "p1_brain.nii.gz", ("t1",))  # the given file is used
    assert chosen.name == "p1_brain"


def test_every_image_that_a_dataset_json_describes_is_a_case(tmp_path):
    describe(tmp_path, modality={"0": "T1"})
    for name in ("a", "a_maria"):
        save(tmp_path / "imagesTr" / f"{name}.nii.gz")
    assert [case.name for case in find_cases(tmp_path, ("t1",))] == ["a", "a_maria"]


def test_endings_that_are_not_read_are_named(tmp_path, capsys):
    save(tmp_path / "a.nii.gz")
    shutil.copy(tmp_path / "a.nii.gz", tmp_path / "b.Nii.Gz")
    assert [case.name for case in find_cases(tmp_path, ("t1",))] == ["a"]
    assert "1 file to rename, since only .nii.gz, .nii, .NII.GZ and .NII are read: b.Nii.Gz" in capsys.readouterr().err
    (tmp_path / "a.nii.gz").unlink()
    with pytest.raises(UserError, match=r"no cases found.*1 file to rename.*b\.Nii\.Gz"):
        find_cases(tmp_path, ("t1",))
