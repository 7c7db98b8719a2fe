"""Case after case: read and sliced, translated in batches that cases share, masked, written, forgotten.

A case is in memory only from its reading until its files are written; what the metrics need stays in the `Tally`.
"""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from hae_jax.data.cases import MODALITIES, CaseFiles
from hae_jax.errors import UserError
from hae_jax.evaluation.figures import overlay_figure
from hae_jax.evaluation.report import CaseResult, case_result
from hae_jax.translation.batched import Slice, SliceTranslator, stacked
from hae_jax.translation.calibration import Calibration
from hae_jax.translation.forward_process import Translation
from hae_jax.translation.masks import Masks, make_masks
from hae_jax.translation.methods import FlairThreshold
from hae_jax.translation.plan import Plan
from hae_jax.translation.tally import Tally
from hae_jax.translation.volume import SlicedCase, map_volume, mask_volume, read_slices, write_volume

NETWORK, FLAIR = "network", "flair threshold"  # the methods' names in the tally
_CASE_FAULTS = (UserError, OSError)  # what concerns one case; everything else is a bug and ends the run


class TranslatedCase(NamedTuple):
    """A case with the network's results for all its slices."""

    case: SlicedCase
    result: Translation  # of NumPy arrays, [S, ...]
    started: float  # time.monotonic() when its reading began


@dataclasses.dataclass
class Outcome:
    """What came of the cases: rows of cases.csv, reasons of failures by case name, overlays, numbers for metrics."""

    finished: list[CaseResult] = dataclasses.field(default_factory=list)
    failed: dict[str, str] = dataclasses.field(default_factory=dict)
    pictures: list[Path] = dataclasses.field(default_factory=list)
    tally: Tally = dataclasses.field(default_factory=Tally)


def process_cases(
    plan: Plan, translator: SliceTranslator, calibration: Calibration, competitor: FlairThreshold
) -> Outcome:
    """Translates all cases of a run and writes each one's files as soon as it is complete."""
    outcome = Outcome(failed=dict(plan.missing))
    with tqdm(total=len(plan.cases), desc="translating",
              bar_format="{l_bar}{bar}| {n:.1f}/{total_fmt} cases [{elapsed}<{remaining}]") as bar:
        for done in _translated(plan.cases, plan.config.model.image_size, translator, outcome.failed, bar):
            try:
                _finish(plan, done, calibration, competitor, outcome)
            except _CASE_FAULTS as error:
                outcome.failed[done.case.name] = str(error)
    return outcome


def _translated(
    cases: Sequence[CaseFiles], image_size: int, translator: SliceTranslator, failed: dict[str, str], bar: tqdm
) -> Iterator[TranslatedCase]:
    """Yields the cases in order, each when its last slice is done; unreadable ones go to `failed`."""
    reading: dict[str, tuple[SlicedCase, float]] = {}

    def slices() -> Iterator[Slice]:
        for case_files in cases:
            started = time.monotonic()
            try:
                case = read_slices(case_files, image_size)
            except _CASE_FAULTS as error:
                failed[case_files.name] = str(error)
                bar.update(1)
                continue
            reading[case.name] = case, started
            for image, index in zip(case.inputs, case.slices.index, strict=True):
                yield Slice(image, case.name, int(index))

    results = []
    for item, result in translator(slices()):
        results.append(result)
        count = len(reading[item.case][0].inputs)
        bar.update(min(1 / count, bar.total - bar.n))  # fractions may add up to a little more than 1
        if len(results) == count:  # slices come in order, so these are all of one case
            case, started = reading.pop(item.case)
            yield TranslatedCase(case, stacked(results), started)
            results = []


def _finish(
    plan: Plan, done: TranslatedCase, calibration: Calibration, competitor: FlairThreshold, outcome: Outcome
) -> None:
    """Makes the masks, writes the volumes and the picture, and adds the case to the outcome."""
    case, wanted = done.case, plan.config.translation
    masks = make_masks(done.result.mse, done.result.ref, done.result.diff, done.result.map, calibration,
                       median=wanted.median, remove_up_to=wanted.components)
    mask = mask_volume(masks.mask, case.slices)
    write_volume(plan.output / f"{case.name}_mask.nii.gz", mask.astype(np.uint8), case.header,
                 "lesion mask, HAE-JAX, research use only")
    write_volume(plan.output / f"{case.name}_map.nii.gz", map_volume(masks.map, case.slices), case.header,
                 "anomaly map, HAE-JAX, research use only")
    row = case_result(case.name, mask, case.truth, case.affine, masks.lesion, masks.score,
                      time.monotonic() - done.started)
    if plan.config.evaluation.overlay_slices:
        outcome.pictures.append(_draw(plan, done, masks, row))
    outcome.tally.add(case, {NETWORK: masks, FLAIR: competitor.masks(case.slices.images, wanted.components)})
    outcome.finished.append(row)


def _draw(plan: Plan, done: TranslatedCase, masks: Masks, row: CaseResult) -> Path:
    """The overlay of the most anomalous slices."""
    case, path = done.case, plan.output / f"{done.case.name}_overlay.png"
    shown = most_anomalous(masks.score, plan.config.evaluation.overlay_slices)
    title = f"{case.name}{' (phantom figure)' if plan.phantom else ''}: mask {row.volume_ml:.1f} ml"
    if row.dice is not None:
        title += f", truth {row.true_volume_ml:.1f} ml, volume Dice {row.dice:.2f}"
    overlay_figure(
        path, case.inputs[shown], done.result.healthy[shown], masks.map[shown], masks.mask[shown],
        None if case.truth is None else case.slice_truth[shown], channels=MODALITIES, modality=plan.settings.modality,
        title=title, row_titles=[f"slice {case.slices.index[s]}, s {masks.score[s]:.4f}" for s in shown])
    return path


def most_anomalous(
    score: np.ndarray,  # [S] similarity, low where there is a lesion
    count: int,
) -> list[int]:
    """Positions of the `count` lowest scores, in order; not too close together, for neighbours look alike."""
    gap, chosen = max(1, len(score) // (4 * count)), []
    for s in np.argsort(score, kind="stable"):
        if len(chosen) < count and all(abs(s - other) >= gap for other in chosen):
            chosen.append(int(s))
    return sorted(chosen)
