"""What the finished cases of a run add up to, for several methods side by side.

Filled case by case in `gathering.py`; `evaluation` does the measuring. Of a case only sums and counts stay, so that
memory does not grow with pixels: thousands of slices of any size fit into it.
"""

import dataclasses
from typing import Any

from hae_jax.evaluation import volumes
from hae_jax.evaluation.running import SliceSums
from hae_jax.evaluation.volumes import VolumeMetrics
from hae_jax.pipeline.records import Measured

_BASELINE = "threshold"


@dataclasses.dataclass(eq=False)
class _Method:
    slices: SliceSums = dataclasses.field(default_factory=SliceSums)
    volumes: list[VolumeMetrics] = dataclasses.field(default_factory=list)  # of each case that it answered for
    patients: list[str] = dataclasses.field(default_factory=list)  # likewise


class Tally:
    """Collects the cases that have a segmentation; the others have nothing to be measured against.

    Attributes:
      cases: number of cases that count.
      slices: number of their slices.
    """

    def __init__(self):
        self.cases = 0
        self.slices = 0
        self._methods: dict[str, _Method] = {}

    def add(self, patient: str, case: Measured | None) -> None:
        """Adds a case with every method's answer; None, a case without a segmentation, is passed over.

        Args:
          patient: whose case it is; several may be one's, who is drawn with all of them.
          case: what is measured.

        Raises:
          ValueError: if a map is not finite.
        """
        if case is None:
            return
        self.cases += 1
        self.slices += len(case.truth)
        labels = case.truth.any(axis=(1, 2)).astype(int)  # as in a prepared dataset
        for name, (masks, volume) in case.answers.items():
            method = self._methods.setdefault(name, _Method())
            method.slices.add(patient, mask=masks.mask, mask_all=masks.mask_all, map=masks.map, lesion=masks.lesion,
                              truth=case.truth, labels=labels, foreground=case.foreground)
            method.volumes.append(volume)
            method.patients.append(patient)

    def results(self) -> dict[str, dict[str, Any]]:
        """For each method that answered for every case: `running.SliceSums`'s, and "volumes". Empty without cases.

        Where the intensity threshold has answered as well, the others have "above_threshold".
        """
        complete = {name: method for name, method in self._methods.items() if len(method.volumes) == self.cases}
        baseline = complete.get(_BASELINE)
        return {name: method.slices.results() | {"volumes": volumes.summarise(method.volumes, method.patients)}
                | ({} if baseline in (None, method) else {"above_threshold": {
                    "lesion_slice_dice": method.slices.paired_dice(baseline.slices),
                    "volume_dice": volumes.paired_dice(method.volumes, baseline.volumes, method.patients)}})
                for name, method in complete.items()}
