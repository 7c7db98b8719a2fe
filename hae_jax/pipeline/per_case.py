"""Case after case: read and sliced, translated in batches that cases share, masked, written, forgotten.

A case is in memory only from its reading until its files are written; what the metrics need goes into its record.
"""

import collections
import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import ml_collections
import numpy as np
from tqdm import tqdm

from hae_jax import provenance
from hae_jax.data.cases import CaseFiles
from hae_jax.data.nifti import write_volume
from hae_jax.errors import UserError
from hae_jax.evaluation import metrics
from hae_jax.evaluation.figures import overlay_figure
from hae_jax.evaluation.report import CaseResult, case_result
from hae_jax.evaluation.volumes import volume_metrics
from hae_jax.files import disk_refuses
from hae_jax.localization.batched import Slice
from hae_jax.localization.map_threshold import stacked
from hae_jax.localization.masks import Masks
from hae_jax.localization.validation import Translator
from hae_jax.localization.volume import SlicedCase, healthy_volume, in_head, read_slices
from hae_jax.pipeline import records
from hae_jax.pipeline.plan import Plan, case_digest, of_phantom

_CASE_FAULTS = (UserError, OSError, MemoryError)  # what concerns one case; everything else is a bug and ends the run
_READ_AHEAD = 2  # cases, while the devices work on those before


class TranslatedCase(NamedTuple):
    """A case with the method's results for all its slices."""

    case: SlicedCase
    result: Any  # a NamedTuple of NumPy arrays [S, ...]


class Calibrations(NamedTuple):
    """What turns maps into masks: for the run's method, and for its baseline if it has one."""

    method: Any
    baseline: Any | None


class _Origin(NamedTuple):
    """What a record says of where its case comes from."""

    digest: str
    folder: str
    phantom: bool


def process_cases(
    plan: Plan, cases: Sequence[CaseFiles], translator: Translator, calibrations: Calibrations,
    inputs: Mapping[str, Any],
) -> dict[str, str]:
    """Translates cases, writes each one's files as soon as it is complete, and its record after them.

    A case that fails leaves a record that says why; the others go on. Where not even that can be written, the reason
    is returned, by the case's name.

    Args:
      plan: the run.
      cases: those to work on.
      translator: the run's method at work.
      calibrations: of the method and its baseline.
      inputs: of the run, for the records.
    """
    origins = {case.name: _Origin(case_digest(inputs, case), str(case.folder.resolve()), of_phantom(case))
               for case in cases}
    before, unrecorded = time.monotonic(), {}

    def failed(name: str, reason: str) -> None:
        try:
            records.write(plan.output, name, _record(origins[name], inputs, failed=reason), None)
        except OSError:  # the disk is full, say, which may be the very reason
            unrecorded[name] = reason
        tqdm.write(f"failed {name}: {reason}")

    with tqdm(total=len(cases), desc="translating",
              bar_format="{l_bar}{bar}| {n:.1f}/{total_fmt} cases [{elapsed}<{remaining}]") as bar:
        for name, done in _translated(cases, plan.config, translator, bar):
            try:
                if isinstance(done, Exception):
                    raise done
                _finish(plan, done, calibrations, origins[name], inputs, before)
                before = time.monotonic()  # not after a failure: the devices were at work on the next case already
            except _CASE_FAULTS as error:
                if disk_refuses(error):  # it would be the same for every case after it
                    raise
                failed(name, _reason(error))
    return unrecorded


def _reason(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return f"does not fit in memory ({error}); work on it where there is more, or crop it"
    return str(error)


def _translated(
    cases: Sequence[CaseFiles], config: ml_collections.ConfigDict, translator: Translator, bar: tqdm
) -> Iterator[tuple[str, TranslatedCase | Exception]]:
    """Yields the cases, each when its last slice is done; for an unreadable one, the reason."""
    reading: dict[str, SlicedCase] = {}
    broken: collections.deque[tuple[str, Exception]] = collections.deque()
    said: collections.Counter[str] = collections.Counter()

    def slices() -> Iterator[Slice]:
        for name, future in _read_ahead(cases, config):
            try:
                case = future.result()
            except _CASE_FAULTS as error:
                broken.append((name, error))
                bar.update(1)
                continue
            for warning in case.warnings:
                said[warning] += 1
                if said[warning] == 1:
                    tqdm.write(f"{name}: {warning}")
            reading[name] = case
            for image, intensity, index in zip(case.inputs, case.slices.images, case.slices.index, strict=True):
                yield Slice(image, name, int(index), intensity)

    results = []
    for item, result in translator(slices()):
        while broken:
            yield broken.popleft()
        results.append(result)
        count = len(reading[item.case].inputs)
        bar.update(min(1 / count, bar.total - bar.n))  # fractions may add up to a little more than 1
        if len(results) == count:  # slices come in order, so these are all of one case
            yield item.case, TranslatedCase(reading.pop(item.case), stacked(results))
            results = []
    yield from broken
    for warning, count in said.items():
        if count > 1:
            tqdm.write(f"{count - 1} more case{'s' if count > 2 else ''}: {warning}")


def _read_ahead(
    cases: Sequence[CaseFiles], config: ml_collections.ConfigDict
) -> Iterator[tuple[str, Future[SlicedCase]]]:
    """The cases in order, the next ones being read in the background."""
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


def _finish(
    plan: Plan, done: TranslatedCase, calibrations: Calibrations, origin: _Origin, inputs: Mapping[str, Any],
    before: float,  # when the case before was done
) -> None:
    """Makes the masks, writes the volumes, the picture and the record."""
    case, method, wanted = done.case, plan.method, plan.config.translation
    masks = method.masks(done.result, calibrations.method, case.heads, case.slice_grid)
    mask, anomaly = in_head(case, masks.mask, masks.map)
    volumes = {"mask": (mask.astype(np.uint8), "lesion mask"), "map": (anomaly, "anomaly map")}
    healthy = method.healthy(done.result)
    if wanted.save_healthy and healthy is not None:
        for m, channel in enumerate(method.modality):
            modality = plan.config.data.modalities[channel]
            volumes[f"healthy_{modality}"] = (healthy_volume(healthy[..., m], case, channel),
                                              f"pseudo-healthy {modality}")
    shown = plan.config.evaluation.overlay_slices > 0
    written = [*(f"{case.name}_{kind}.nii.gz" for kind in volumes), *([_overlay(case.name)] if shown else [])]
    records.begin(plan.output, case.name, tuple(written))
    for name, (values, description) in zip(written[:len(volumes)], volumes.values(), strict=True):
        write_volume(plan.output / name, values, case.grid, f"{description}, HAE-JAX, research use only")
    row = case_result(case.name, mask, case.truth, case.affine, masks.lesion, masks.score, 0.0, anomaly)
    if shown:
        _draw(plan, done, healthy, masks, row, origin.phantom)
    measured = _measured(plan, case, masks, row, calibrations)
    row = dataclasses.replace(row, seconds=time.monotonic() - before)
    records.write(plan.output, case.name, _record(origin, inputs, files=tuple(written), row=row), measured)


def _measured(
    plan: Plan, case: SlicedCase, masks: Masks, row: CaseResult, calibrations: Calibrations
) -> records.Measured | None:
    """The answers of the method and its baseline, if there is anything to measure them against."""
    if case.truth is None:
        return None
    answers = {plan.method.name: records.Answer(masks, row.measured)}
    if plan.baseline is not None:
        baseline = plan.baseline.masks(plan.baseline.intensity(case.slices.images), calibrations.baseline,
                                      case.heads, case.slice_grid)
        mask, anomaly = in_head(case, baseline.mask, baseline.map)
        answers[plan.baseline.name] = records.Answer(
            baseline, volume_metrics(mask, case.truth, case.affine, anomaly))
    return records.Measured(case.slice_truth, metrics.foreground(case.inputs), answers)


def _record(
    origin: _Origin, inputs: Mapping[str, Any], files: tuple[str, ...] = (), row: CaseResult | None = None,
    failed: str | None = None,
) -> records.Record:
    made_by = {name: value for name, value in provenance.record().items() if name not in ("notice", "versions")}
    return records.Record(origin.digest, files, row, failed, records.digest(inputs), made_by, origin.folder,
                          origin.phantom)


def _overlay(case: str) -> str:
    return f"{case}_overlay.png"


def _draw(plan: Plan, done: TranslatedCase, healthy: np.ndarray | None, masks: Masks, row: CaseResult,
          phantom: bool) -> None:
    """The overlay of the most anomalous slices."""
    case, path = done.case, plan.output / _overlay(done.case.name)
    shown = most_anomalous(masks.score, plan.config.evaluation.overlay_slices)
    title = f"{case.name}{' (phantom figure)' if phantom else ''}: mask {row.volume_ml:.1f} ml"
    if row.dice is not None:
        title += f", truth {row.true_volume_ml:.1f} ml, volume Dice {row.dice:.2f}"
    modality = plan.method.modality
    overlay_figure(
        path, case.inputs[shown], case.inputs[shown][..., list(modality)] if healthy is None else healthy[shown],
        masks.map[shown], masks.mask[shown], None if case.truth is None else case.slice_truth[shown],
        channels=plan.config.data.modalities, modality=modality, title=title,
        row_titles=[f"slice {case.slices.index[s]}, score {masks.score[s]:.4g}" for s in shown])


def most_anomalous(
    score: np.ndarray,  # [S] anomaly score
    count: int,
) -> list[int]:
    """Positions of the `count` highest scores, in order; not too close together, for neighbours look alike."""
    gap, chosen = max(1, len(score) // (4 * count)), []
    for s in np.argsort(-score, kind="stable"):
        if len(chosen) < count and all(abs(s - other) >= gap for other in chosen):
            chosen.append(int(s))
    return sorted(chosen)
