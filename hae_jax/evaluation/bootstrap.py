"""A metric over patients and its interval by the bootstrap over patients.

`running.py` (metrics over slices) and `volumes.py` (metrics per patient) use it. Whole patients are drawn and not
slices, lesions or visits. Those of one patient are correlated, so drawing them would make the interval too narrow.
"""

import warnings
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

RESAMPLES = 5000
_INTERVAL = (0.025, 0.975)


def share_of_sums(
    part: npt.ArrayLike,  # of each case
    whole: npt.ArrayLike,  # of each case, the whole of which it is a part
    patients: Sequence[str],  # of each case
    seed: int = 0,
) -> dict[str, float | int | None]:
    """The sum of all parts divided by the sum of all wholes, as `with_interval` returns it, and "cases"."""
    drawn = [np.bincount(numbers(patients), weights=sample) for sample in (part, whole)]
    return with_interval(drawn, lambda part, whole, axis: share(part.sum(axis=axis), whole.sum(axis=axis)), seed) | {
        "cases": len(patients)}


def numbers(patients: Sequence[str]) -> np.ndarray:  # [cases] int
    """The patient number of each case. Patients are numbered by their first case."""
    order = {patient: number for number, patient in enumerate(dict.fromkeys(patients))}
    return np.array([order[patient] for patient in patients], int)


def with_interval(
    samples: Sequence[npt.ArrayLike],  # quantities, each with a value for every patient
    statistic: Callable[..., np.ndarray],  # function of such quantities and `axis`, the axis of patients
    seed: int = 0,
) -> dict[str, float | int | None]:
    """A statistic of the patients with its 95% interval by the percentile bootstrap, ready for JSON.

    Equal seeds draw equal patients, so that methods which were measured on the same patients in the same order are
    compared on the same resamples. Draws of which the statistic is NaN do not count.

    Returns:
      "mean" (None where the statistic is NaN), "low", "high" (None of fewer than two patients, too).
    """
    from scipy import stats  # slow to import, and needed only where there is ground truth

    values = [np.asarray(sample) for sample in samples]
    found = float(statistic(*values, axis=-1)) if len(values[0]) else np.nan
    low = high = np.nan
    if len(values[0]) > 1 and not np.isnan(found):
        with warnings.catch_warnings(action="ignore", category=stats.DegenerateDataWarning):  # patients may be equal
            drawn = stats.bootstrap(values, statistic, n_resamples=RESAMPLES, paired=True, vectorized=True, batch=500,
                                    method="percentile", rng=seed).bootstrap_distribution
        low, high = np.nanquantile(drawn, _INTERVAL)
    mean, low, high = (None if np.isnan(value) else float(value) for value in (found, low, high))
    return {"mean": mean, "low": low, "high": high}


def share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole; NaN where the whole is 0."""
    return np.where(whole > 0, part / np.where(whole > 0, whole, 1), np.nan)
