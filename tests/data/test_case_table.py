"""Tables of cases replace the search by names. Each error is one line that names the row."""

import os

import nibabel as nib
import numpy as np
import pytest

from hae_jax.commands.prepare_data import main
from hae_jax.data.cases import find_cases, read_case
from hae_jax.data.store import open_store
from hae_jax.errors import UserError

SHAPE = (8, 8, 3)


def save(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = np.zeros(SHAPE, np.int16)
    data[1:-1, 1:-1] = 5
    data[3, 3] = value
    nib.save(nib.Nifti1Image(data, np.eye(4)), path)


@pytest.fixture
def scans(tmp_path):
    """Files with misleading names."""
    for k in range(4):
        save(tmp_path / "x" / f"scan {k}.nii.gz", 10 + k)
        save(tmp_path / "x" / f"other_{k}_t1.nii.gz", 20 + k)
        data = np.zeros(SHAPE, np.uint8)
        data[3, 3, 1] = 1
        nib.save(nib.Nifti1Image(data, np.eye(4)), tmp_path / "x" / f"roi{k}.nii.gz")
    return tmp_path


def table(folder, text, encoding="utf-8"):
    (folder / "cases.csv").write_text(text, encoding=encoding)
    return folder / "cases.csv"


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1"])
def test_a_table_overrides_every_guess(scans, separator, encoding):
    text = ("Segmentation,T1W,case,flair,patient\nx/roi1.nii.gz,x/scan 1.nii.gz,Müller_2,x/other_1_t1.nii.gz,M\n\n"
            f"{scans}/x/roi0.nii.gz,x/scan 0.nii.gz,Müller_1,x/other_0_t1.nii.gz,M\n,x/scan 2.nii.gz,b,"
            "x/other_2_t1.nii.gz,\n")
    path = table(scans, text.replace(",", separator), encoding)
    cases = find_cases(path, ("flair", "t1"))
    assert [(case.name, case.patient, case.problem) for case in cases] == [
        ("Müller_1", "M", None), ("Müller_2", "M", None), ("b", "b", None)]
    read = [read_case(case) for case in cases]
    assert [[int(case.volumes[..., c].max()) for c in range(2)] for case in read] == [[20, 10], [21, 11], [22, 12]]
    assert [case.mask is None for case in read] == [False, False, True]


@pytest.mark.parametrize(("text", "says"), [
    ("", r"column case is missing"),
    ("case,t1\n", "no cases below its first row"),
    ("case,t1,age\na,b,5\n", r"row 1: column age is not known; columns are case, patient, flair, t1"),
    ("case,t1,t1w\na,b,c\n", r"row 1: column t1 is there twice"),
    ("case,flair\na,b\n", r"row 1: column t1 is missing; its columns are case, flair"),
    ('case,t1\n"a,b\n', r"is no CSV .* check its quotes"),
    ("case,t1\0\n", r"is no text"),
])
def test_mistakes_of_the_table(tmp_path, text, says):
    with pytest.raises(UserError, match=rf"cases\.csv.*{says}") as error:
        find_cases(table(tmp_path, text), ("t1",))
    assert "\n" not in str(error.value)


def test_a_pipe_in_place_of_the_table_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "cases.csv")
    with pytest.raises(UserError, match=r"cases\.csv: is no file"):
        find_cases(tmp_path / "cases.csv", ("t1",))


@pytest.mark.parametrize(("row", "says"), [
    ("a,x/absent.nii.gz,", r"row 3: t1 .*x/absent\.nii\.gz: no such file"),
    ("a,x,", r"row 3: t1 .*x: ends in none of"),
    ("a,,", r"row 3: column t1 is empty"),
    ("a", r"row 3: has 2 cells less than row 1"),
    ("a,b,c,d", r"row 3: has 1 cell more than row 1"),
    (",x/scan 0.nii.gz,", r"row 3: case '' has no name"),
    ("../a,x/scan 0.nii.gz,", r"row 3: case '../a' cannot be the name of files"),
    ("a,x/scan 0.nii.gz,x/scan 0.nii.gz", r"row 3: columns t1 and segmentation name one file"),
    ("a,x/scan 0.nii.gz,x/lost.nii.gz", r"row 3: segmentation .*x/lost\.nii\.gz: no such file"),
    ("a,x/scan 0.nii.gz,x/dead.nii.gz", r"row 3: segmentation .*x/dead\.nii\.gz: links to /mnt/gone"),
    ("good,x/scan 0.nii.gz,", r"2 rows have the case good"),
])
def test_a_mistake_in_a_row_is_that_case_s(scans, row, says):
    (scans / "x" / "dead.nii.gz").symlink_to("/mnt/gone")
    path = table(scans, f"case,t1,segmentation\ngood,x/scan 1.nii.gz,\n{row}\nother,x/scan 2.nii.gz,\n")
    cases = find_cases(path, ("t1",))
    (bad,) = [case for case in cases if case.problem]
    assert {case.name for case in cases if not case.problem} >= {"other"}
    with pytest.raises(UserError, match=rf"cases\.csv.*{says}") as error:
        read_case(bad)
    assert "\n" not in str(error.value)


def test_visits_of_a_patient_stay_in_one_part_of_the_split(scans, capsys):
    rows = "".join(f"v{k},{'A' if k < 3 else 'B'},x/scan {k}.nii.gz,x/roi{k}.nii.gz\n" for k in range(4))
    path = table(scans, f"case,patient,t1,segmentation\n{rows}")
    main(["--cases", str(path), "--output", str(scans / "store"), "--modalities", "t1", "--image-size", "8",
          "--train-fraction", "0.5", "--val-fraction", "0.5", "--workers", "1"])
    store = open_store(scans / "store")
    assert sorted(map(sorted, store.manifest["split"].values())) == [[], ["v0", "v1", "v2"], ["v3"]]
    assert {case["name"]: case["patient"] for case in store.cases} == {"v0": "A", "v1": "A", "v2": "A", "v3": "B"}
    for flags in (["--source", str(scans)], []):
        with pytest.raises(SystemExit) as stop:
            main(["--cases", str(path.with_suffix(".txt")), *flags, "--output", str(scans / "other")])
        assert stop.value.code == 2
    assert "must be a CSV file" in capsys.readouterr().err
