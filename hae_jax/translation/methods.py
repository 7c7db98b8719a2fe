"""What people compare with, on the same slices and measured in the same way as the network."""

import dataclasses

import numpy as np

from hae_jax.data.cases import MODALITIES
from hae_jax.data.store import SplitReader
from hae_jax.evaluation.metrics import best_threshold
from hae_jax.translation.masks import Masks, remove_small_components

_FLAIR = MODALITIES.index("flair")
_GRID = np.arange(15, 101) / 50  # 0.3 to 2 times the 99th percentile of a case's flair
_READ_AT_ONCE = 256  # slices


@dataclasses.dataclass(frozen=True)
class FlairThreshold:
    """The trivial competitor: everything bright on flair is lesion.

    Attributes:
      threshold: as a multiple of the 99th percentile of the case's positive voxels.
      validation_dice: its mean Dice over the validation slices that have a lesion.
    """

    threshold: float
    validation_dice: float

    @classmethod
    def chosen_on(cls, reader: SplitReader) -> "FlairThreshold":
        """The threshold with the best mean Dice over the lesion slices of a split.

        Over all slices the best would be one that no pixel exceeds, wherever healthy slices are many: a competitor
        that finds nothing. Unlike the network, this one is given the split's masks.
        """
        lesion, flair, truth = np.flatnonzero(reader.rows["labels"]), [], []
        for start in range(0, len(lesion), _READ_AT_ONCE):
            rows = reader.read(lesion[start:start + _READ_AT_ONCE])
            flair.append(rows["image"][..., _FLAIR].copy())  # a view would keep the other channels
            truth.append(rows["mask"])
        return cls(*best_threshold(np.concatenate(flair), np.concatenate(truth), _GRID))

    def masks(
        self,
        images: np.ndarray,  # [S, H, W, C] normalised, not scaled to [-1, 1]
        remove_up_to: int = 0,
    ) -> Masks:
        """Its answer in the network's terms: the map is flair itself, a lesion slice is one whose mask is not empty.

        Args:
          images: the slices.
          remove_up_to: connected components of at most so many pixels are taken out; 0 keeps all.
        """
        flair = images[..., _FLAIR]
        mask = flair >= self.threshold
        if remove_up_to:
            mask = remove_small_components(mask, remove_up_to)
        return Masks(flair, mask, mask, mask.any(axis=(1, 2)), -flair.max(axis=(1, 2)).astype(np.float64))
