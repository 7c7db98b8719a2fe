"""Probability and uncertainty of a finished case as files: NIfTI on the case's grid, JSON that says what they mean."""

from typing import Any

import numpy as np

from hae_jax.data.slices import SlicedCase
from hae_jax.localization import probability
from hae_jax.localization.map_threshold import Masks

MEANINGS = {"probability": probability.PROBABILITY, "uncertainty": probability.UNCERTAINTY}


def probability_volumes(
    case: SlicedCase, method: Any, results: Any, masks: Masks, calibration: Any
) -> dict[str, tuple[np.ndarray, str]]:
    """Volumes to write and their descriptions, by the kind in their files' names; arguments of `probability.volumes`.

    Raises:
      UserError: the calibration cannot give probabilities.
    """
    found = probability.volumes(case, method, results, masks, calibration)._asdict()
    return {kind: (values, f"lesion {kind}") for kind, values in found.items() if values is not None}


def meaning_files(case: str, kinds: Any) -> dict[str, dict[str, Any]]:
    """JSON that lies beside the volumes of these kinds, by its file's name."""
    return {f"{case}_{kind}.json": {"Description": MEANINGS[kind], "Units": "arbitrary", "Range": [0, 1]}
            for kind in kinds if kind in MEANINGS}
