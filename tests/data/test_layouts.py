"""All layouts are recognised, with and without segmentations. Errors are one line."""

import json
import shutil

import nibabel as nib
import numpy as np
import pytest

from hae_jax.data.cases import MODALITIES, find_cases, read_case
from hae_jax.data.layouts import SYNONYMS
from hae_jax.errors import UserError

SHAPE = (6, 7, 3)
AFFINE = np.diag([-1.0, -1, 1, 1])
DECATHLON = {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"}
ATLAS = "{0}_ses-1_space-MNI152NLin2009aSym"
LESION = "label-L_desc-T1lesion_mask"


def save(path, value, volumes=None):
    """Writes a constant image: `value`, or one volume per entry of `volumes`. Its values identify the file."""
    data = np.full(SHAPE, value) if volumes is None else np.broadcast_to(np.array(volumes), (*SHAPE, len(volumes)))
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(data.astype(np.int16), AFFINE), path)


def describe(folder, **facts):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataset.json").write_text(json.dumps(facts))


def named(path, words, segmentation, first=0):
    """A layout with words in file names: `path` with case and word, the image words, the segmentation's word."""
    def write(root, case, value, label):
        for k, word in enumerate(words, first):
            save(root / path.format(case, word), value + k)
        if label:
            save(root / path.format(case, segmentation), label)

    write.__name__ = path  # for the names of tests
    return write


brats = named("{0}/{0}_{1}.nii.gz", MODALITIES, "seg")
later_brats = named("{0}/{0}-{1}.nii.gz", ("t2f", "t1n", "t1c", "t2w"), "seg")
side_by_side = named("{0}_{1}.nii", ("FLAIR", "T1", "T1Gd", "T2"), "seg")
words_alone = named("data/site/{0}/{1}.nii.gz", ("flair", "t1", "t1c", "t2"), "seg")
atlas = named(f"Training/R001/sub-{{0}}/ses-1/anat/sub-{ATLAS}_{{1}}.nii.gz", ("T1w",), LESION, first=1)
flat_atlas = named(f"sub-{ATLAS}_{{1}}.nii.gz", ("T1w",), LESION, first=1)
plain = named("{0}{1}.nii.gz", ("",), "_mask", first=1)
plain_folders = named("{0}/{0}{1}.nii", ("",), "_seg", first=1)


def decathlon(root, case, value, label):
    describe(root, modality=DECATHLON)
    save(root / ("imagesTr" if label else "imagesTs") / f"{case}.nii.gz", 0, value + np.arange(4))
    if label:
        save(root / "labelsTr" / f"{case}.nii.gz", label)


def shuffled_decathlon(root, case, value, label):
    describe(root, modality={"0": "T2", "1": "ADC", "2": "T1-Gd", "3": "T1", "4": "FLAIR"})
    save(root / "imagesTr" / f"{case}.nii.gz", 0, np.array([value + 3, 77, value + 2, value + 1, value]))
    if label:
        save(root / "labelsTr" / f"{case}.nii.gz", label)


def four_dimensional(root, case, value, label):
    save(root / f"{case}.nii.gz", 0, value + np.arange(4))
    if label:
        save(root / f"{case}_seg.nii.gz", label)


def nnunet(root, case, value, label):
    describe(root, channel_names={"0": "T1", "1": "T1ce", "2": "T2", "3": "Flair"})
    for k, offset in enumerate((1, 2, 3, 0)):
        save(root / ("imagesTr" if label else "imagesTs") / f"{case}_{k:04d}.nii.gz", value + offset)
    if label:
        save(root / "labelsTr" / f"{case}.nii.gz", label)


def bare_nnunet(root, case, value, label):
    describe(root, modality=DECATHLON)
    for k in range(4):
        save(root / f"{case}_{k:04d}.nii.gz", value + k)
    if label:
        save(root / f"{case}_mask.nii.gz", label)


def single_nnunet(root, case, value, label):
    save(root / "imagesTr" / f"{case}_0000.nii.gz", value + 1)
    if label:
        save(root / "labelsTr" / f"{case}.nii.gz", label)


FOUR = (brats, later_brats, side_by_side, words_alone, decathlon, shuffled_decathlon, four_dimensional, nnunet,
        bare_nnunet)
ONE = (atlas, flat_atlas, plain, plain_folders, single_nnunet)
NAMES = {atlas: ATLAS.format("sub-{0}"), flat_atlas: ATLAS.format("sub-{0}")}


def values(case):
    """The value of each channel."""
    assert case.volumes.shape[:3] == SHAPE
    return [int(np.unique(volume).item()) for volume in np.moveaxis(case.volumes, -1, 0)]


@pytest.mark.parametrize("write", [*FOUR, *ONE])
def test_every_layout(tmp_path, write):
    write(tmp_path / "data", "p2_x", 20, label=4)
    write(tmp_path / "data", "p1_x", 10, label=None)
    for folder in (tmp_path / "data").rglob("*"):
        if folder.is_dir():
            (folder / "._p1_x_flair.nii.gz").write_bytes(b"what macOS leaves behind")
            (folder / ".DS_Store").write_bytes(b"")
    modalities = ("t1",) if write in ONE else MODALITIES
    first, second = find_cases(tmp_path / "data", modalities)
    assert [first.name, second.name] == [NAMES.get(write, "{0}").format(name) for name in ("p1_x", "p2_x")]
    assert first.segmentation is None
    healthy, ill = read_case(first), read_case(second)
    assert healthy.mask is None
    assert ill.mask.all()
    offsets = [1] if write in ONE else [0, 1, 2, 3]
    assert values(healthy) == [10 + k for k in offsets]
    assert values(ill) == [20 + k for k in offsets]
    assert ill.grid.header.get_data_shape() == ill.grid.shape == SHAPE
    assert all(path.is_file() for path in second.paths)
    assert second.paths[-1] == second.segmentation
    assert first.folder.is_dir()


@pytest.mark.parametrize("write", [*FOUR, *ONE])
def test_a_single_file_stands_for_its_case(tmp_path, write):
    write(tmp_path, "p1_x", 10, label=2)
    write(tmp_path, "p2_x", 20, label=2)
    modalities = ("t1",) if write in ONE else MODALITIES
    for case in find_cases(tmp_path, modalities):
        assert find_cases(case.images[0].path, modalities) == [case]


@pytest.mark.parametrize("write", FOUR)
def test_some_channels_of_many_in_another_order(tmp_path, write):
    write(tmp_path, "a", 10, label=1)
    write(tmp_path, "b", 20, label=1)
    for wanted in (("t2", "flair"), ("t1ce",)):
        cases = find_cases(tmp_path, wanted)
        assert [image.modality for image in cases[0].images] == list(wanted)
        assert values(read_case(cases[1])) == [20 + MODALITIES.index(modality) for modality in wanted]


@pytest.mark.parametrize("write", [brats, decathlon, nnunet])
def test_one_case_alone(tmp_path, write):
    write(tmp_path / "p1", "p1", 10, label=2)
    (case,) = find_cases(tmp_path / "p1")
    (again,) = find_cases(case.folder)  # the case's own folder, or imagesTr, with dataset.json above it
    assert again.name == case.name == "p1"
    assert values(read_case(again)) == [10, 11, 12, 13]
    assert read_case(again).mask.all()


@pytest.mark.parametrize("modality", MODALITIES)
def test_synonyms_in_any_case(tmp_path, modality):
    for word in SYNONYMS[modality]:
        for k, written in enumerate((word, word.upper())):
            save(tmp_path / f"{word}{k}" / f"a_{written}.nii.gz", 9)
            describe(tmp_path / f"nn_{word}{k}", channel_names={"0": written})
            save(tmp_path / f"nn_{word}{k}" / "a_0000.nii.gz", 9)
    for folder in tmp_path.iterdir():
        assert values(read_case(find_cases(folder, (modality,))[0])) == [9]


def test_flair_with_other_files_beside_it(tmp_path):
    for name in ("FLAIR", "T1W", "T1WKS", "brainmask", "consensus_gt"):
        save(tmp_path / "patient01" / f"patient01_{name}.nii.gz", len(name))
    (case,) = find_cases(tmp_path, ("flair",))
    assert [path.name for path in case.paths] == ["patient01_FLAIR.nii.gz", "patient01_consensus_gt.nii.gz"]


def test_a_brain_mask_is_no_lesion(tmp_path):
    brats(tmp_path, "a", 10, label=None)
    save(tmp_path / "a" / "a_brain_mask.nii.gz", 1)
    assert find_cases(tmp_path)[0].segmentation is None


def test_cases_side_by_side_do_not_lend_each_other_masks(tmp_path):
    plain(tmp_path / "flat", "a", 10, label=1)
    plain(tmp_path / "flat", "b", 10, label=None)
    side_by_side(tmp_path / "words", "a", 10, label=1)
    side_by_side(tmp_path / "words", "b", 10, label=None)
    assert [case.segmentation is None for case in find_cases(tmp_path / "flat", ("t1",))] == [False, True]
    assert [case.segmentation is None for case in find_cases(tmp_path / "words")] == [False, True]


def test_sessions_of_a_subject_are_cases(tmp_path):
    for session in ("ses-1", "ses-2"):
        for word in ("T1w", "T2w", "FLAIR"):
            save(tmp_path / "sub-1" / session / "anat" / f"sub-1_{session}_{word}.nii.gz", 3)
    save(tmp_path / "sub-1" / "ses-2" / "anat" / "sub-1_ses-2_acq-gd_T1gd.nii.gz", 3)
    assert [case.name for case in find_cases(tmp_path, ("t1", "t2"))] == ["sub-1_ses-1", "sub-1_ses-2"]
    assert values(read_case(find_cases(tmp_path)[1])) == [3, 3, 3, 3]


def test_results_and_strays_are_no_cases(tmp_path):
    plain(tmp_path, "a", 10, label=None)
    save(tmp_path / "results" / "results.nii.gz", 5)
    (tmp_path / "results" / "cases.csv").write_text("case")
    (tmp_path / "results" / "records").mkdir()
    save(tmp_path / "templates" / "mni.nii.gz", 5)
    (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)
    assert [case.name for case in find_cases(tmp_path, ("t1",))] == ["a"]


def test_one_bad_name_does_not_end_the_others(tmp_path):
    twice(tmp_path)
    brats(tmp_path / "one", "b", 20, label=2)
    save(tmp_path / "one" / "b" / "b_seg.nii", 1)
    brats(tmp_path / "two", "c", 30, label=2)
    assert [(case.name, case.problem is None) for case in find_cases(tmp_path)] == [
        ("a", False), ("b", False), ("c", True)]
    chosen = find_cases(tmp_path / "one" / "b" / "b_seg.nii")  # the given file is used
    assert (chosen[0].segmentation.name, chosen[0].problem) == ("b_seg.nii", None)


def test_one_case_is_called_like_its_folder_or_its_files(tmp_path):
    for name in ("P1", "P2"):
        for k, word in enumerate(MODALITIES):
            save(tmp_path / "by_file" / name / "scan" / f"{name}_{word}.nii.gz", k + 1)
            save(tmp_path / "by_folder" / name / f"brain_{word}.nii.gz", k + 1)
            save(tmp_path / "by_neither" / name / "Scans" / f"{word}.nii.gz", k + 1)
    assert [case.name for case in find_cases(tmp_path / "by_file")] == ["P1", "P2"]
    assert [case.name for case in find_cases(tmp_path / "by_folder")] == ["P1", "P2"]
    for given in ("by_file/P1", "by_file/P1/scan", "by_folder/P1", "by_folder/P1/brain_t1.nii.gz"):  # as beside others
        assert [case.name for case in find_cases(tmp_path / given)] == ["P1"]
    (clash,) = find_cases(tmp_path / "by_neither")
    assert "2 cases with the name Scans" in clash.problem
    (tmp_path / "by_folder" / "P1" / "brain_t1.nii.gz").unlink()
    with pytest.raises(UserError, match=r"P1/brain_t1.nii.gz: missing"):
        read_case(find_cases(tmp_path / "by_folder")[0])


def test_files_of_no_layout_are_named(tmp_path, capsys):
    brats(tmp_path, "a", 10, label=2)
    for name in ("a_registered", "brainmask", "a_old_mask", "a_consensus_gt"):
        save(tmp_path / "a" / f"{name}.nii.gz", 1)
    find_cases(tmp_path)
    find_cases(tmp_path, ("t1",))
    assert capsys.readouterr().err == ""
    for k in range(4):
        save(tmp_path / "b" / f"series_{k}.nii.gz", 1)
    save(tmp_path / "MNI152.nii.gz", 1)  # a template beside folders of cases
    for word in ("flair", "t1", "seg"):
        save(tmp_path / "a" / f"a_followup_{word}.nii.gz", 1)
    for modalities, said in (
            (MODALITIES, "8 NIfTI files in no known layout: a_followup_flair.nii.gz, a_followup_seg.nii.gz, "),
            (("t2",), "6 NIfTI files in no known layout: a_followup_seg.nii.gz, series_0.nii.gz, ")):
        assert [case.name for case in find_cases(tmp_path, modalities)] == ["a"]
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line


def test_an_assumed_order_of_volumes_is_said(tmp_path):
    four_dimensional(tmp_path / "alone", "a", 10, label=2)
    decathlon(tmp_path / "told", "a", 10, label=2)
    assert ["flair, t1, t1ce, t2, in this order" in " ".join(read_case(find_cases(tmp_path / name)[0]).warnings)
            for name in ("alone", "told")] == [True, False]


def test_linked_case_folders_are_followed(tmp_path):
    brats(tmp_path / "archive", "a", 10, label=2)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a").symlink_to(tmp_path / "archive" / "a", target_is_directory=True)
    assert values(read_case(find_cases(tmp_path / "data")[0])) == [10, 11, 12, 13]


def test_a_link_has_its_own_name(tmp_path):
    decathlon(tmp_path / "set", "a", 10, label=2)
    (tmp_path / "set" / "imagesTr").rename(tmp_path / "abc")
    (tmp_path / "set" / "imagesTr").symlink_to(tmp_path / "abc", target_is_directory=True)
    for given in ("set", "set/imagesTr"):
        (case,) = find_cases(tmp_path / given)
        assert (case.name, values(read_case(case)), read_case(case).mask.all()) == ("a", [10, 11, 12, 13], True)
    for k in (1, 2):
        save(tmp_path / f"s{k}" / "0001" / "t1.nii.gz", k)
        (tmp_path / "subset").mkdir(exist_ok=True)
        (tmp_path / "subset" / f"P{k}").symlink_to(tmp_path / f"s{k}" / "0001", target_is_directory=True)
    assert [case.name for case in find_cases(tmp_path / "subset", ("t1",))] == ["P1", "P2"]


@pytest.mark.parametrize("write", [brats, side_by_side, decathlon, nnunet, plain_folders])
def test_endings_in_capitals(tmp_path, capsys, write):
    write(tmp_path, "a", 10, label=2)
    for path in list(tmp_path.rglob("*.nii*")):
        name = path.name.replace(".nii", ".NII").replace(".gz", ".GZ")
        path.rename(path.with_name(name))
    modalities = ("t1",) if write in ONE else MODALITIES
    (case,) = find_cases(tmp_path, modalities)
    assert read_case(case).mask.all()
    assert find_cases(case.images[0].path, modalities) == [case]
    assert capsys.readouterr().err == ""


def test_numbers_of_patients_are_no_channels(tmp_path, capsys):
    for k in (1, 2):
        save(tmp_path / f"patient_{k:04d}.nii.gz", 10 * k)
    assert [case.name for case in find_cases(tmp_path, ("t1",))] == ["patient_0001", "patient_0002"]
    for folder in ("imagesTr", "deeper/site"):
        describe((tmp_path / "set" / folder).parent, modality={"0": "T1"})
        for k in range(3):
            save(tmp_path / "set" / folder / f"subj_{k:04d}.nii.gz", 10 * k + 1)
    cases = find_cases(tmp_path / "set", ("t1",))
    assert [(case.name, *values(read_case(case))) for case in cases] == [
        ("subj_0000", 1), ("subj_0001", 11), ("subj_0002", 21)]
    assert "3 NIfTI files in no known layout: subj_0000" in capsys.readouterr().err


def twice(root):
    brats(root / "one", "a", 10, label=2)
    brats(root / "two", "a", 10, label=2)


def twice_in_a_folder(root):
    save(root / "a.nii", 1)
    save(root / "a.nii.gz", 1)


def nnunet_without_json(root):
    nnunet(root, "a", 10, label=2)
    (root / "dataset.json").unlink()


def nnunet_with(**facts):
    def write(root):
        nnunet(root, "a", 10, label=2)
        describe(root, **facts)
    return write


@pytest.mark.parametrize(("write", "says"), [
    (nnunet_without_json, "need a dataset.json"),
    (nnunet_with(channel_names={"0": "T1", "1": "T2", "2": "FLAIR"}), "no channels are t1ce.* wanted are flair, t1"),
    (nnunet_with(channel_names={"0": "T1", "1": "T1w", "2": "FLAIR", "3": "T2", "4": "t1gd"}), "2 channels are t1,"),
    (nnunet_with(channel_names={"0": "T1", "2": "FLAIR"}), "count from 0"),
    (nnunet_with(labels={}), 'give "channel_names"'),
    (nnunet_with(channel_names=["T1"]), 'give "channel_names"'),
    (lambda root: (root / "dataset.json").write_text("{") and save(root / "a_0000.nii.gz", 1), "dataset.json"),
    (lambda root: (root / "readme.txt").write_text(""), "no cases found"),
    (lambda root: save(root / "p1" / "scan.nii.gz", 1), r"no cases found.* \(1 NIfTI file in no known layout: scan\."),
])
def test_mistakes_of_a_folder(tmp_path, write, says):
    write(tmp_path)
    with pytest.raises(UserError, match=says) as error:
        find_cases(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("write", "modalities", "says"), [
    (lambda root: save(root / "a.nii.gz", 1), MODALITIES, 
     r"a.nii.gz: has shape \(6, 7, 3\); expected 4 volumes .* or a file for each .*wanted: flair, t1, t1ce, t2\)"),
    (twice, MODALITIES, r"one/a/a_flair.* and .*two/a/a_flair.*: 2 cases with the name a;"),
    (twice_in_a_folder, MODALITIES, r"a.nii.gz and a.nii: two files"),
    (lambda root: save(root / "a.nii.gz", 1) or shutil.copy(root / "a.nii.gz", root / "a.NII.GZ"), MODALITIES,
     r"a.nii.gz and a.NII.GZ: two files"),
    (lambda root: decathlon(root, "a", 1, 1) or save(root / "labelsTr" / "a.nii", 1), MODALITIES, r"a.nii: two files"),
    (lambda root: save(root / "a.nii.gz", 0, [1, 2, 3]), ("t1",), r"\(6, 7, 3, 3\); expected 4 volumes"),
    (lambda root: save(root / "a_t1.nii.gz", 0, [1, 2]), ("t1",), r"\(6, 7, 3, 2\); expected one 3-D volume"),
    (lambda root: save(root / "a_flair.nii.gz", 1), ("t1",), 
     r"t1.nii.gz: missing.*t1 image \(wanted: t1; in the folder: a_flair.nii.gz\)"),
    (lambda root: later_brats(root, "a", 1, 1) or (root / "a" / "a-t1c.nii.gz").unlink(), MODALITIES,
     r"a-t1c.nii.gz: missing"),
    (lambda root: nnunet(root, "a", 1, 1) or (root / "imagesTr" / "a_0002.nii.gz").unlink(), MODALITIES,
     r"a_0002.nii.gz: missing"),
    (lambda root: save(root / "a.nii.gz", 0, [0, 0, 0, 5]), ("t1",), r"a.nii.gz: no voxel is positive"),
])
def test_mistakes_of_a_case(tmp_path, write, modalities, says):
    write(tmp_path)
    (case,) = find_cases(tmp_path, modalities)
    with pytest.raises(UserError, match=says) as error:
        read_case(case)
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_image_of_what_is_wanted(tmp_path):
    save(tmp_path / "a_flair.nii.gz", 1)
    (tmp_path / "notes.txt").write_text("")
    for name in ("a_flair.nii.gz", "notes.txt"):
        with pytest.raises(UserError, match=f"{name}: not a NIfTI image of t1"):
            find_cases(tmp_path / name, ("t1",))


@pytest.mark.parametrize("modalities", [(), ("pd",), ("t1", "t1"), "t1"])
def test_modalities_that_cannot_be(tmp_path, modalities):
    with pytest.raises(UserError, match="give one or several of flair, t1, t1ce, t2"):
        find_cases(tmp_path, modalities)
