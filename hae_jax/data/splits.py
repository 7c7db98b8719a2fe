"""The split into training, validation and test patients, and the patient of a case."""

import collections
import random
import re
from collections.abc import Mapping, Sequence

from hae_jax.errors import UserError

SPLITS = ("train", "val", "test")
_VISIT = re.compile(r"(?<=^BraTS-...-\d{5})-\d{3}$")
_SUBJECT = re.compile(r"sub-[^_]+")  # BIDS: session, run and kind of image follow


def split_patients(
    names: Sequence[str], train_fraction: float = 0.75, val_fraction: float = 0.05, seed: int = 10,
    patient: Mapping[str, str | None] | None = None,
) -> dict[str, list[str]]:
    """Splits patients as published: sorted names, shuffled, then int(train_fraction n), int(val_fraction n), the rest.

    All visits of a patient are in the same split. With the defaults, at least 20 patients are needed for one validation
    patient. With fewer, the error names the option to set.

    Args:
      names: names of the cases.
      train_fraction: share of training patients.
      val_fraction: share of validation patients.
      patient: the patient of each case; if missing or None, it is derived from the case's name (`patient_of`).

    Returns:
      {"train": [...], "val": [...], "test": [...]} in shuffled order, without overlap. `test` may be empty.

    Raises:
      UserError: a fraction is out of range, or leaves train or val without a patient.
    """
    if not (train_fraction > 0 and val_fraction > 0 and train_fraction + val_fraction <= 1 + 1e-9):
        raise UserError(f"train_fraction {train_fraction} and val_fraction {val_fraction}: both must be greater than 0 "
                        "and their sum at most 1")
    visits = collections.defaultdict(list)
    for name in sorted(names):
        visits[(patient or {}).get(name) or patient_of(name)].append(name)
    patients = sorted(visits)
    if len(patients) < 2:
        raise UserError(f"{len(patients)} case(s) cannot be split; at least one to train on and one to validate is "
                        "needed")
    n_train, n_val = int(train_fraction * len(patients)), int(val_fraction * len(patients))
    for split, count, fraction in (("train", n_train, train_fraction), ("val", n_val, val_fraction)):
        if count == 0:
            needed = int(1000 / len(patients) + 1) / 1000  # rounded up, so that it suffices as printed
            raise UserError(f"{len(patients)} cases with {split}_fraction {fraction} leave none in {split}; "
                            f"set --{split}-fraction to {needed:.3f} or more, or add cases")
    order = list(range(len(patients)))
    random.Random(seed).shuffle(order)
    bounds = {"train": order[:n_train], "val": order[n_train:n_train + n_val], "test": order[n_train + n_val:]}
    return {split: [name for i in chosen for name in visits[patients[i]]] for split, chosen in bounds.items()}


def patient_of(name: str) -> str:
    """The patient of a case. Visits of one patient are recognised in names of BraTS 2023 and BIDS."""
    subject = _SUBJECT.match(name)
    return subject.group() if subject else _VISIT.sub("", name)
