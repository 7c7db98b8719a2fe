"""Splits equal the published one. All cases of a patient are in the same split."""

import itertools
import json

import pytest

from hae_jax.data.splits import patient_of, split_patients
from hae_jax.errors import UserError


def test_split_equals_the_published_one(golden):
    expected = json.loads((golden / "brats_split.json").read_text())
    names = [f"BraTS2021_{i:05d}" for i in range(expected["n_patients"])]
    split = split_patients(names[::-1])
    position = {name: i for i, name in enumerate(names)}
    assert [position[name] for name in split["train"][:10]] == expected["train_first10"]
    assert [position[name] for name in split["val"]] == expected["val"]
    assert (len(split["train"]), len(split["val"])) == (expected["n_train"], expected["n_val"])
    assert sorted(itertools.chain(*split.values())) == names


@pytest.mark.parametrize("count", [2, 3, 7, 10, 12, 19])
def test_too_few_patients_name_a_fraction_that_suffices(count):
    names = [f"p{i}" for i in range(count)]
    with pytest.raises(UserError, match="--val-fraction to") as error:
        split_patients(names)
    needed = float(str(error.value).split("--val-fraction to ")[1].split()[0])
    split = split_patients(names, train_fraction=0.5, val_fraction=min(needed, 0.5))
    assert len(split["val"]) >= 1
    assert sorted(itertools.chain(*split.values())) == sorted(names)


def test_twenty_patients_keep_the_published_recipe():
    assert {k: len(v) for k, v in split_patients([str(i) for i in range(20)]).items()} == {
        "train": 15, "val": 1, "test": 4}


@pytest.mark.parametrize(("train", "val"), [(0.9, 0.2), (0, 0.5), (0.5, 0), (-1, 0.1), (float("nan"), 0.1)])
def test_impossible_fractions(train, val):
    with pytest.raises(UserError, match="fraction"):
        split_patients([str(i) for i in range(50)], train, val)


def test_visits_of_a_patient_stay_together():
    names = [f"BraTS-GLI-{i:05d}-{visit:03d}" for i in range(40) for visit in range(2)]
    split = split_patients(names)
    assert {name: len(cases) for name, cases in split.items()} == {"train": 60, "val": 4, "test": 16}
    for cases in split.values():
        assert {case[:-1] + "0" for case in cases} <= set(cases)
        assert {case[:-1] + "1" for case in cases} <= set(cases)
    assert patient_of("sub-01_ses-2_T1w") == patient_of("sub-01_ses-1_T1w") != patient_of("sub-02_ses-1_T1w")
    assert patient_of("BraTS2021_00000") == "BraTS2021_00000"
    assert patient_of("sub-01_run-1") == patient_of("sub-01_run-2") == "sub-01"
