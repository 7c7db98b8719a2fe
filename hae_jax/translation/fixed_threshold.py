"""One threshold for all maps: how it is chosen on validation data, kept, and applied.

For methods whose maps have a scale that slices share. Unlike `calibration.py` it looks at the validation masks, not
only at labels: what is compared with is given more than the forward process is.

One rule serves all of them: the best mean Dice of the lesion slices. Over all slices, in which an empty mask of a
healthy slice scores 1, the best is easily one that no pixel reaches.
"""

import dataclasses
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np

from hae_jax import files
from hae_jax.errors import UserError
from hae_jax.evaluation.metrics import FIXED_THRESHOLDS, dice
from hae_jax.translation import calibration
from hae_jax.translation.masks import Masks, median_filtered, remove_small_components


@dataclasses.dataclass(frozen=True)
class FixedThreshold:
    """A method's threshold.

    Attributes:
      method: the method's name.
      threshold: a pixel belongs to the mask where the map is at least this.
      validation_dice: its mean Dice over the slices it was chosen on, the lesion slices.
      slices: number of these slices.
      made_with: what it belongs to (checkpoint identity, settings, data, ...), ready for JSON.

    Raises:
      ValueError: if a number is not finite.
    """

    method: str
    threshold: float
    validation_dice: float
    slices: int
    made_with: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if not (math.isfinite(self.threshold) and math.isfinite(self.validation_dice)):
            raise ValueError("threshold and validation_dice must be finite")

    def save(self, path: str | os.PathLike) -> None:
        """Writes it as JSON, whole or not at all."""
        files.write_json(path, dataclasses.asdict(self))

    @classmethod
    def load(cls, path: str | os.PathLike) -> "FixedThreshold":
        """Reads what `save` wrote.

        Raises:
          UserError: if there is no such file, it is not JSON, or a field is missing, unknown or of a wrong kind.
        """
        return calibration.loaded(cls, path, _KINDS, "calibrate first")


_KINDS = {  # what each field looks like in JSON
    "method": lambda value: isinstance(value, str),
    "threshold": calibration.is_number,
    "validation_dice": calibration.is_number,
    "slices": lambda value: calibration.is_whole(value) and value >= 1,
    "made_with": lambda value: isinstance(value, dict),
}


class FixedThresholdMethod:
    """What methods with a fixed threshold share; their results have a field `map`, [H, W] for one slice.

    Attributes:
      name: of the method.
      candidates: the thresholds to choose from, ascending.
      similarity: whether a slice's score is the forward process's similarity; here it is minus the map's maximum.
      median: whether the threshold is chosen on maps after a 5x5 median filter.
      rule: how the threshold is chosen; a threshold that another rule has chosen is not used again.
    """

    name: str
    median: bool
    similarity: ClassVar[bool] = False
    candidates: ClassVar[np.ndarray] = FIXED_THRESHOLDS
    rule: ClassVar[str] = "best mean Dice of lesion slices"

    def calibrate(
        self, results: Iterable[tuple[NamedTuple, int, np.ndarray]], made_with: Mapping[str, Any]
    ) -> FixedThreshold:
        """Chooses the threshold with the best mean Dice over the lesion slices; of equally good ones the lowest.

        Args:
          results: for each validation slice its result, its label and its true mask [H, W] bool. One slice is looked at
            at a time, and only those with the label "lesion".
          made_with: kept with the threshold.

        Raises:
          UserError: if no slice has a lesion, or a map is not finite.
        """
        total, slices, lesions = np.zeros(len(self.candidates)), 0, 0
        for result, label, truth in results:
            if not label:
                continue
            masks = self._filtered(result.map[None], self.median) >= self.candidates[:, None, None]
            total += dice(masks, np.broadcast_to(truth, masks.shape))
            slices, lesions = slices + 1, lesions + bool(np.any(truth))
        if not lesions:
            raise UserError(f"validation slices: none has a lesion in its mask, and the method {self.name} needs some "
                            "to choose its threshold; put cases that have them into the validation split")
        best = int(total.argmax())
        return FixedThreshold(self.name, float(self.candidates[best]), float(total[best] / slices), slices,
                              dict(made_with))

    def load_calibration(self, path: str | os.PathLike) -> FixedThreshold:
        """Reads a threshold of this method.

        Raises:
          UserError: if it is damaged, or another method's.
        """
        found = FixedThreshold.load(path)
        if found.method != self.name:
            raise UserError(f"{path}: is a threshold of the method {found.method}, not of {self.name}; calibrate again")
        return found

    def masks(
        self, results: NamedTuple, calibration: FixedThreshold, *, median: bool, remove_up_to: int = 0,
        positions: np.ndarray | None = None,
    ) -> Masks:
        """Masks in the terms of the forward process: a lesion slice is one whose mask is not empty.

        Args:
          results: with maps [S, H, W].
          calibration: the threshold.
          median: filter the maps by a median first.
          remove_up_to: connected components of at most so many pixels are taken out; 0 keeps all.
          positions: [S] of the slices in their volume, for both filters in 3-D; None: slice by slice.

        Returns:
          The masks; their score is minus the map's maximum.

        Raises:
          UserError: if a map is not finite.
        """
        maps = self._filtered(results.map, median, positions)
        mask = remove_small_components(maps >= calibration.threshold, remove_up_to, positions)
        return Masks(maps.astype(np.float32), mask, mask, mask.any(axis=(1, 2)), -maps.max(axis=(1, 2)))

    def _filtered(
        self, maps: np.ndarray, median: bool, positions: np.ndarray | None = None
    ) -> np.ndarray:  # [S, H, W] -> [S, H, W] float64
        maps = np.asarray(maps, np.float64)
        bad = ~np.isfinite(maps).all(axis=(1, 2))
        if bad.any():
            raise UserError(f"translation: the maps of {bad.sum()} of {bad.size} slices are not finite; the training "
                            "of this checkpoint has diverged, take an earlier one")
        return median_filtered(maps, positions) if median else maps
