"""Processing of cases one after another: reading, slicing, translation, masks, and writing of the results.

A batch may hold slices of several cases. A case is in memory only until its files are written. Its record holds all
that the metrics need.
"""

import collections
import dataclasses
import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections
import numpy as np
from tqdm import tqdm

from hae_jax.data.cases import CaseFiles, read_case
from hae_jax.data.nifti import write_volume
from hae_jax.data.slices import SlicedCase, sliced
from hae_jax.errors import UserError
from hae_jax.evaluation import metrics
from hae_jax.evaluation.figures import overlay_figure
from hae_jax.evaluation.report import CaseResult, case_result
from hae_jax.evaluation.volumes import volume_metrics
from hae_jax.files import disk_refuses, write_json
from hae_jax.localization import probability
from hae_jax.localization.batched import Slice, Translator
from hae_jax.localization.map_threshold import Masks, stacked
from hae_jax.pipeline.results_folder import ResultsFolder
from hae_jax.pipeline.summary import Answer, Measured

_LOG = logging.getLogger(__name__)
SLICES = "slices"  # folder of JSON files for the report page
_CASE_FAULTS = (UserError, OSError, MemoryError)  # fail one case only; other errors are bugs and end the run
_READ_AHEAD = 2  # cases that are read in advance


class TranslatedCase(NamedTuple):
    """A case with the method's results for all its slices."""

    case: SlicedCase
    result: Any  # a NamedTuple of NumPy arrays [S, ...]


class CalibratedMethod(NamedTuple):
    """A method and its calibration."""

    method: Any  # see `hae_jax.localization.methods.Method`
    calibration: Any


class CaseWork(NamedTuple):
    """The settings, methods and output folder for the cases of a run.

    Attributes:
      config: the config tree.
      results: where the files go.
      localizer: the run's method.
      baseline: the intensity threshold, for comparison; None if there are no slices to choose it.
    """

    config: ml_collections.ConfigDict
    results: ResultsFolder
    localizer: CalibratedMethod
    baseline: CalibratedMethod | None


def process_cases(work: CaseWork, cases: Sequence[CaseFiles], translator: Translator) -> None:
    """Translates cases, writes each one's files as soon as it is complete, and its record after them.

    If a case fails, the reason is written to its record, and the other cases are processed.

    Args:
      work: the settings, methods and output folder.
      cases: the cases to process.
      translator: the run's method.

    Raises:
      OSError: the disk refuses to write, so that all other cases would fail as well.
    """
    files = {case.name: case for case in cases}
    for case in cases:
        work.results.begin(case)
    before = time.monotonic()
    with tqdm(total=len(cases), desc="translating",
              bar_format="{l_bar}{bar}| {n:.1f}/{total_fmt} cases [{elapsed}<{remaining}]") as bar:
        for name, done in _translated(cases, work.config, translator, bar):
            try:
                if isinstance(done, Exception):
                    raise done
                _finish(work, files[name], done, before)
                before = time.monotonic()  # not after a failure, since devices already work on the next case
            except _CASE_FAULTS as error:
                if disk_refuses(error):
                    raise
                work.results.fail(name, _reason(error))
                _LOG.info("failed %s: %s", name, _reason(error))


def _reason(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return f"does not fit in memory ({error}); work on it where there is more, or crop it"
    return str(error)


def _translated(
    cases: Sequence[CaseFiles], config: ml_collections.ConfigDict, translator: Translator, bar: tqdm
) -> Iterator[tuple[str, TranslatedCase | Exception]]:
    """Yields each case when its last slice is translated. For an unreadable case, it yields the error."""
    reading: dict[str, SlicedCase] = {}
    broken: collections.deque[tuple[str, Exception]] = collections.deque()
    said: dict[str, list[str]] = collections.defaultdict(list)  # kind of warning -> cases and their warnings

    def slices() -> Iterator[Slice]:
        for name, future in _read_ahead(cases, config):
            try:
                case = future.result()
            except _CASE_FAULTS as error:
                broken.append((name, error))
                bar.update(1)
                continue
            for warning in case.warnings:
                said[warning.kind].append(f"{name}: {warning}")
                if len(said[warning.kind]) == 1:
                    _LOG.info("%s: %s", name, warning)
            reading[name] = case
            for image, intensity, index in zip(case.inputs, case.slices.images, case.slices.index, strict=True):
                yield Slice(image, name, int(index), intensity)

    results = []
    for item, result in translator(slices()):
        while broken:
            yield broken.popleft()
        results.append(result)
        count = len(reading[item.case].inputs)
        bar.update(min(1 / count, bar.total - bar.n))  # rounded fractions may sum to more than 1
        if len(results) == count:  # slices come in order, so all results are of one case
            yield item.case, TranslatedCase(reading.pop(item.case), stacked(results))
            results = []
    yield from broken
    for first, *others in said.values():
        if others:
            _LOG.info("%d more case%s like %s", len(others), "s" if others[1:] else "", first)


def _read_ahead(
    cases: Sequence[CaseFiles], config: ml_collections.ConfigDict
) -> Iterator[tuple[str, Future[SlicedCase]]]:
    """Yields the cases in order, while the next ones are read in the background."""
    with ThreadPoolExecutor(1) as pool:
        waiting: collections.deque[tuple[str, Future[SlicedCase]]] = collections.deque()
        try:
            for files in cases:
                future = pool.submit(read_slices, files, config.model.image_size, config.data.scaling)
                waiting.append((files.name, future))
                if len(waiting) > _READ_AHEAD:
                    yield waiting.popleft()
            while waiting:
                yield waiting.popleft()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def read_slices(files: CaseFiles, image_size: int, scaling: str) -> SlicedCase:
    """Reads a case and slices it. The volumes are not kept."""
    return sliced(read_case(files), image_size, scaling, str(files.folder))


def _finish(work: CaseWork, files: CaseFiles, done: TranslatedCase, before: float) -> None:
    """Makes the masks, and writes volumes, picture and record. `before` is the time when the last case ended."""
    case, config, (method, calibration) = done.case, work.config, work.localizer
    masks = method.masks(done.result, calibration, case.heads, case.slice_grid)
    mask, anomaly = case.mask_volume(masks.mask), case.volume(masks.map)
    healthy = method.healthy(done.result)
    volumes = _volumes(work, case, mask, anomaly, healthy)
    if config.translation.save_probability:
        maps = probability.volumes(case, method, done.result, masks, calibration)._asdict()
        volumes |= {kind: (values, f"lesion {kind}") for kind, values in maps.items() if values is not None}
    shown = config.evaluation.overlay_slices > 0
    documents = {f"{SLICES}/{case.name}.json": _slices(files, case, masks)} | {
        f"{case.name}_{kind}.json": {"Description": meaning, "Units": "arbitrary", "Range": [0, 1]}
        for kind, meaning in probability.MEANINGS.items() if kind in volumes}
    written = [*(f"{case.name}_{kind}.nii.gz" for kind in volumes), *documents,
               *([_overlay(case.name)] if shown else [])]
    work.results.writing(case.name, written)
    for name, (values, description) in zip(written[:len(volumes)], volumes.values(), strict=True):
        write_volume(work.results.path / name, values, case.grid, f"{description}, HAE-JAX, research use only")
    for name, facts in documents.items():
        write_json(work.results.path / name, facts)
    row = case_result(case.name, mask, case.truth, case.affine, masks.lesion, masks.score, 0.0, anomaly)
    if shown:
        _draw(work, done, healthy, masks, row)
    measured = _measured(work, case, masks, row)
    row = dataclasses.replace(row, seconds=time.monotonic() - before)
    work.results.commit(case.name, written, row, measured)


def _volumes(
    work: CaseWork, case: SlicedCase, mask: np.ndarray, anomaly: np.ndarray, healthy: np.ndarray | None
) -> dict[str, tuple[np.ndarray, str]]:
    """The volumes to write, each with its description, by the ending of their file names."""
    volumes = {"mask": (mask.astype(np.uint8), "lesion mask"), "map": (anomaly, "anomaly map")}
    if work.config.translation.save_healthy and healthy is not None:
        for m, channel in enumerate(work.localizer.method.modality):
            modality = work.config.data.modalities[channel]
            volumes[f"healthy_{modality}"] = case.healthy_volume(healthy[..., m], channel), f"pseudo-healthy {modality}"
    return volumes


def _slices(files: CaseFiles, case: SlicedCase, masks: Masks) -> dict[str, Any]:
    """Facts for the report page that no other file holds: the case's files, its warnings, and scores of its slices."""
    return {
        "images": [{"modality": image.modality, "path": _absolute(image.path), "volume": image.volume,
                    "volumes": image.volumes} for image in files.images],
        "segmentation": None if files.segmentation is None else _absolute(files.segmentation),
        "warnings": case.warnings,
        "slice": case.slices.index.tolist(),
        "anomaly_score": masks.score.tolist(),
        "lesion": masks.lesion.tolist(),
        "truth": None if case.slice_truth is None else case.slice_truth.any(axis=(1, 2)).tolist(),
    }


def _absolute(path: Path) -> str:
    """The path with an absolute folder without links. A file that is a link keeps its own name."""
    return str(path.parent.resolve() / path.name)


def _measured(work: CaseWork, case: SlicedCase, masks: Masks, row: CaseResult) -> Measured | None:
    """The results of the method and its baseline, if there is a ground truth."""
    truth, volume = case.slice_truth, row.measured
    if case.truth is None or truth is None or volume is None:
        return None
    answers = {work.localizer.method.name: Answer(masks, volume)}
    if work.baseline is not None:
        method, calibration = work.baseline
        own = method.masks(method.intensity(case.slices.images), calibration, case.heads, case.slice_grid)
        mask, anomaly = case.mask_volume(own.mask), case.volume(own.map)
        answers[method.name] = Answer(own, volume_metrics(mask, case.truth, case.affine, anomaly))
    return Measured(truth, metrics.foreground(case.inputs), answers)


def _overlay(case: str) -> str:
    return f"{case}_overlay.png"


def _draw(work: CaseWork, done: TranslatedCase, healthy: np.ndarray | None, masks: Masks, row: CaseResult) -> None:
    """Draws the overlay of the most anomalous slices."""
    case, path, modality = done.case, work.results.path / _overlay(done.case.name), work.localizer.method.modality
    shown = most_anomalous(masks.score, work.config.evaluation.overlay_slices)
    title = f"{case.name}{' (phantom)' if work.results.phantom(case.name) else ''}: mask {row.volume_ml:.1f} ml"
    if row.dice is not None:
        title += f", ground truth {row.true_volume_ml:.1f} ml, volume Dice {row.dice:.2f}"
    overlay_figure(
        path, case.inputs[shown], case.inputs[shown][..., list(modality)] if healthy is None else healthy[shown],
        masks.map[shown], masks.mask[shown], None if case.slice_truth is None else case.slice_truth[shown],
        channels=work.config.data.modalities, modality=modality, title=title,
        row_titles=[f"slice {case.slices.index[s]}, score {masks.score[s]:.4g}" for s in shown])


def most_anomalous(
    score: np.ndarray,  # [S] anomaly score
    count: int,
) -> list[int]:
    """Positions of the `count` highest scores, in order. They have a minimum distance, since neighbours look alike."""
    gap, chosen = max(1, len(score) // (4 * count)), []
    for s in np.argsort(-score, kind="stable"):
        if len(chosen) < count and all(abs(s - other) >= gap for other in chosen):
            chosen.append(int(s))
    return sorted(chosen)
