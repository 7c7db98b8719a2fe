"""BIDS derivatives of a run, checked with the BIDS validator, and the BIDS App."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from run_helpers import read_json, read_volume

from hae_jax.commands import bids as command
from hae_jax.data.cases import MODALITIES
from hae_jax.errors import UserError
from hae_jax.pipeline import bids
from hae_jax.pipeline.bids import GROUP_TABLE, RESULTS, write_derivatives, write_group_table

_NAMES = {"flair": "FLAIR", "t1": "T1w", "t1ce": "ce-gadolinium_T1w", "t2": "T2w"}


@pytest.fixture
def dataset(tmp_path, case_writer):
    """A BIDS dataset of two subjects, one with two sessions, and derivatives of another program."""
    root = tmp_path / "raw"
    for seed, name in enumerate(("sub-01_ses-1", "sub-01_ses-2", "sub-02")):
        case_writer(tmp_path / "made", name, seed, lesion=seed != 2, segmented=False)
        folder = root.joinpath(*name.split("_"), "anat")
        folder.mkdir(parents=True)
        for modality in MODALITIES:
            shutil.move(tmp_path / "made" / name / f"{name}_{modality}.nii.gz",
                        folder / f"{name}_{_NAMES[modality]}.nii.gz")
    (root / "dataset_description.json").write_text(json.dumps({"Name": "test", "BIDSVersion": "1.10.0"}))
    other = root / "derivatives" / "other" / "sub-01" / "anat"
    other.mkdir(parents=True)
    shutil.copy(root / "sub-02" / "anat" / "sub-02_T1w.nii.gz", other / "sub-01_desc-other_T1w.nii.gz")
    return root


@pytest.fixture
def app(run, config, monkeypatch):
    """`hae-bids` with the toy network as the loaded network."""
    config.translation.update({"method": "residual", "save_probability": True, "save_healthy": True, "draws": 2})

    def translate(argv):
        source, output = argv[argv.index("--input") + 1], argv[argv.index("--output") + 1]
        sys.exit(bool(run(Path(source), output=Path(output)).failed))

    monkeypatch.setattr("hae_jax.commands.translate.main", translate)

    def call(*argv):
        with pytest.raises(SystemExit) as ended:
            command.main(list(map(str, argv)))
        return ended.value.code

    return call


def validated(folder):
    """The issues of the BIDS validator, by severity."""
    program = Path(sys.executable).with_name("bids-validator-deno")
    done = subprocess.run([program, folder, "--json"], capture_output=True, text=True, timeout=300)
    issues = json.loads(done.stdout)["issues"]["issues"]
    return {severity: [issue for issue in issues if issue["severity"] == severity] for severity in ("error", "warning")}


def test_derivatives_of_a_dataset(app, dataset, tmp_path):
    output = dataset / "derivatives" / "hae"
    assert app(dataset, output, "participant") == 0
    stem = output / "sub-01" / "ses-1" / "anat" / "sub-01_ses-1_space-orig"
    mask = Path(f"{stem}_label-L_desc-hae_mask.nii.gz")
    plain = output / RESULTS / "sub-01_ses-1_mask.nii.gz"
    assert mask.samefile(plain)
    facts = read_json(Path(f"{stem}_label-L_desc-hae_mask.json"))
    assert facts["Type"] == "Lesion"
    assert "bids:raw:sub-01/ses-1/anat/sub-01_ses-1_ce-gadolinium_T1w.nii.gz" in facts["Sources"]
    described = read_json(output / "dataset_description.json")
    assert described["DatasetType"] == "derivative"
    assert described["GeneratedBy"][0]["Name"] == "HAE-JAX"
    assert described["SourceDatasets"] == [{"URL": dataset.resolve().as_uri()}]
    assert (output / described["DatasetLinks"]["raw"]).resolve() == dataset.resolve()
    probability = read_volume(Path(f"{stem}_label-L_desc-hae_probseg.nii.gz"))
    assert 0 <= probability.min() <= probability.max() <= 1
    assert Path(f"{stem}_desc-pseudohealthy_FLAIR.nii.gz").exists()
    assert (output / "sub-02" / "anat" / "sub-02_space-orig_label-L_desc-hae_mask.nii.gz").exists()
    found = validated(output)
    assert [(issue["code"], issue.get("subCode"), issue.get("location")) for issue in found["error"]] == []
    assert {issue["code"] for issue in found["warning"]} <= {"TOO_FEW_AUTHORS"}  # of our description

    assert app(dataset, output, "participant") == 0
    assert not [path for path in output.rglob(".*") if path.name != ".bidsignore" and RESULTS.name not in path.parts]

    command.main([str(dataset), str(output), "group"])
    with open(output / GROUP_TABLE, newline="") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    assert [(row["participant_id"], row["session_id"]) for row in rows] == [
        ("sub-01", "ses-1"), ("sub-01", "ses-2"), ("sub-02", "n/a")]
    assert all(float(row["volume_ml"]) >= 0 for row in rows)


def test_one_subject_has_results_of_its_own(app, dataset, tmp_path):
    assert app(dataset, tmp_path / "out", "participant", "--participant-label", "sub-02") == 0
    assert (tmp_path / "out" / RESULTS / "sub-02" / "manifest.json").exists()
    assert not (tmp_path / "out" / "sub-01").exists()


def test_mistakes_are_one_line(app, dataset, tmp_path, capsys):
    assert app(tmp_path, tmp_path / "out", "participant") == 2
    assert "has no dataset_description.json" in capsys.readouterr().err
    assert app(dataset, tmp_path / "out", "participant", "--participant-label", "07") == 2
    assert "has no sub-07; check --participant-label" in capsys.readouterr().err
    assert app(dataset, tmp_path / "out", "group") == 2
    assert "run the level participant first" in capsys.readouterr().err
    assert app(dataset, tmp_path / "out", "participant", "--layout=bids") == 2
    assert "--layout=bids: is set by this command; leave it out" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    described = (dataset / "dataset_description.json").read_bytes()
    for folder in (dataset, dataset.parent / "raw" / "derivatives" / ".."):
        assert app(dataset, folder, "participant") == 2
        assert "holds raw data; give another folder for the derivatives" in capsys.readouterr().err
    assert (dataset / "dataset_description.json").read_bytes() == described


@pytest.mark.parametrize(("name", "stem"), [
    ("sub-r001s001_ses-1_space-MNI152NLin2009aSym", "sub-r001s001_ses-1_space-MNI152NLin2009aSym"),
    ("sub-01_space-T1w_desc-brain", "sub-01_space-T1w"),
    ("sub-02_run-2", "sub-02_run-2_space-orig"), ("BraTS-GLI-00005-001", "sub-BraTSGLI00005_ses-001_space-orig"),
    ("patient 7_a", "sub-patient7a_space-orig")])
def test_names(name, stem):
    assert bids._stems([name]) == {name: stem}


def test_names_that_meet_are_an_error():
    with pytest.raises(UserError, match="would both be sub-a1_space-orig"):
        bids._stems(["a-1", "a_1"])


def made_by_hand(folder, cases):
    folder.mkdir(parents=True)
    facts = {}
    for name, kinds in cases.items():
        files = [f"{name}_{kind}.nii.gz" for kind in kinds]
        for file in files:
            (folder / file).write_bytes(b"nifti")
        facts[name] = {"folder": str(folder / "nowhere"), "files": files}
    (folder / "manifest.json").write_text(json.dumps({"cases": facts, "config": {"data": {"modalities": ["t1"]}}}))


def test_what_other_settings_left_goes_away(tmp_path):
    made_by_hand(tmp_path / "a", {"p1": ["mask", "map", "probability"], "failed": []})
    made_by_hand(tmp_path / "b", {"p1": ["mask", "map"]})
    for results in ("a", "b"):
        (mask,) = write_derivatives(tmp_path / results, tmp_path / "out")
    assert sorted(path.name for path in mask.parent.iterdir()) == [
        f"sub-p1_space-orig_{rest}" for rest in ("desc-hae_anomalymap.json", "desc-hae_anomalymap.nii.gz",
                                                 "label-L_desc-hae_mask.json", "label-L_desc-hae_mask.nii.gz")]


def test_derivatives_of_a_run_without_finished_cases(tmp_path):
    (tmp_path / "a").mkdir()
    manifest = {"cases": {}, "config": {"data": {"modalities": ["t1"]}}}
    (tmp_path / "a" / "manifest.json").write_text(json.dumps(manifest))
    assert write_derivatives(tmp_path / "a", tmp_path / "out") == []
    assert read_json(tmp_path / "out" / "dataset_description.json")["SourceDatasets"] == []


def test_no_run_no_derivatives(tmp_path):
    with pytest.raises(UserError, match=r"manifest\.json: cannot be read"):
        write_derivatives(tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match="has no finished case"):
        write_group_table(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_damaged_table_is_named(tmp_path):
    table = tmp_path / RESULTS / "run" / "cases.csv"
    table.parent.mkdir(parents=True)
    table.write_text("case,slices\np1\n")
    with pytest.raises(UserError, match=r"cases\.csv: is damaged; run the level participant again"):
        write_group_table(tmp_path)
    assert not (tmp_path / GROUP_TABLE).exists()
