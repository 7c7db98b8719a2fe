"""Output of a run's metrics: metrics.json, cases.csv, a table for the log, and tables that compare methods.

This is the last stage. It writes the metrics that `metrics.py` and `volumes.py` compute.
"""

import csv
import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hae_jax import files, provenance
from hae_jax.evaluation import metrics, volumes
from hae_jax.evaluation.volumes import VolumeMetrics


@dataclasses.dataclass(frozen=True)
class CaseResult:
    """One row of cases.csv; its attributes, in their order, are the header.

    Attributes:
      case: its name.
      volume_ml: predicted lesion volume in millilitres.
      true_volume_ml: the segmentation's volume. Without a segmentation it is None, as are the values that need one:
        dice, iou, hd95_mm, lesions, lesions_found, false_lesions, best_dice, best_threshold.
      dice: volume Dice; 1 where both are empty.
      iou: volume IoU; 1 where both are empty.
      slices: number of slices that were translated.
      lesion_slices: how many of them are flagged, that is, called lesion slices.
      anomaly_score: the highest of its slices; the higher, the more certain is a lesion. None without slices.
      seconds: time that the case took, reading, masks and writing included; counted from when the case before was done.
        If a batch holds several small cases, its whole time counts for one of them.
      hd95_mm: 95th percentile Hausdorff distance; None where mask or segmentation is empty.
      lesions: connected components of the segmentation in 3-D.
      lesions_found: how many of them the mask touches.
      lesions_predicted: connected components of the mask in 3-D.
      false_lesions: how many of them touch no lesion.
      best_dice: volume Dice at the threshold on the map that is best for this case; None without a map or a lesion.
      best_threshold: that threshold.
    """

    case: str
    volume_ml: float
    true_volume_ml: float | None
    dice: float | None
    iou: float | None
    slices: int
    lesion_slices: int
    anomaly_score: float | None
    seconds: float
    hd95_mm: float | None = None
    lesions: int | None = None
    lesions_found: int | None = None
    lesions_predicted: int | None = None
    false_lesions: int | None = None
    best_dice: float | None = None
    best_threshold: float | None = None

    @property
    def measured(self) -> VolumeMetrics | None:
        """The case's metrics for `volumes.summarise`; None without a segmentation."""
        if self.true_volume_ml is None:
            return None
        return VolumeMetrics(*(getattr(self, field.name) for field in dataclasses.fields(VolumeMetrics)))


def case_result(
    case: str,
    predicted: np.ndarray,  # [X, Y, Z] bool
    truth: np.ndarray | None,  # [X, Y, Z] bool
    affine: np.ndarray,  # [4, 4] voxels to mm
    lesion: np.ndarray,  # [S] bool, predicted slice labels
    score: np.ndarray,  # [S] anomaly score
    seconds: float,
    anomaly: np.ndarray | None = None,  # [X, Y, Z] float
) -> CaseResult:
    """The result of a case on its own grid."""
    if truth is not None:
        measured = dataclasses.asdict(volumes.volume_metrics(predicted, truth, affine, anomaly))
    else:
        measured = {"volume_ml": metrics.volume_ml(predicted, affine), "true_volume_ml": None, "dice": None,
                    "iou": None, "lesions_predicted": volumes.lesion_count(predicted)}
    return CaseResult(
        case=case,
        slices=len(lesion),
        lesion_slices=int(np.sum(lesion)),
        anomaly_score=float(np.max(score)) if len(score) else None,
        seconds=seconds,
        **measured,
    )


def write_cases(path: str | os.PathLike, cases: Sequence[CaseResult]) -> None:
    """Writes one row per case under a header line. Unknown values are empty cells."""
    with files.written_whole(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(field.name for field in dataclasses.fields(CaseResult))
        writer.writerows([_cell(value) for value in dataclasses.astuple(case)] for case in cases)


def write_metrics(path: str | os.PathLike, results: Mapping[str, Any], **context: Any) -> None:
    """Writes metrics.json: the results, the definition of every name in them, and where they come from.

    Args:
      results: nested dictionaries of numbers, e.g. from `running.SliceSums`.
      context: further entries beside "results" (calibration, checkpoint, settings), ready for JSON.
    """
    files.write_json(path, {
        "results": results,
        **context,
        "definitions": metrics.DEFINITIONS | {"volumes": volumes.DEFINITIONS},
        "made_by": provenance.record(),
    })


def metrics_table(columns: Mapping[str, Mapping[str, Any]]) -> str:
    """Results of several methods side by side, for the log.

    Args:
      columns: for each method, its nested dictionaries of numbers. Missing metrics are shown as "-". A metric with an
        interval (`bootstrap.with_interval`) takes one line: 0.712 [0.650, 0.770].
    """
    flat = {method: _flattened(results) for method, results in columns.items()}
    names = list(dict.fromkeys(name for results in flat.values() for name in results))
    rows = [["", *flat], *([name, *(_shown(results.get(name)) for results in flat.values())] for name in names)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows)
    return "\n".join("  ".join(row) for row in aligned)


_WRITTEN = {"dice": "Dice", "iou": "IoU", "auroc": "AUROC", "auprc": "AUPRC", "hd95": "HD95", "f1": "F1", "mm": "(mm)",
            "ml": "(ml)"}
_WHOLE = {  # titles of groups, and of metrics whose names are not readable as text
    "all_slices": "all-slice", "lesion_slices": "lesion-slice", "slice_level": "slice", "volumes": "volume",
    "healthy_volume_ml": "of false positives in healthy subjects (ml)",
    "healthy_volume_median_ml": "of false positives in healthy subjects, median (ml)",
    "healthy_false_lesions": "false lesions in healthy subjects"}
# Columns of comparison.csv that have an interval, and their place in a method's results.
_INTERVALS = {
    **{f"{setting}_{name}": (setting, name) for setting in ("all_slices", "lesion_slices")
       for name in ("dice", "iou", "precision", "recall", "auroc", "auprc")},
    **{f"slice_{name}": ("slice_level", name) for name in ("accuracy", "precision", "recall")},
    **{f"volume_{name}": ("volumes", name) for name in ("dice", "iou")},
    **{name: ("volumes", name) for name in ("hd95_mm", "best_dice", "lesion_recall", "lesion_precision", "lesion_f1",
                                            "healthy_volume_ml", "healthy_false_lesions")},
}
_COMPARED = {
    **{f"{column}{suffix}": (*place, end) for column, place in _INTERVALS.items()
       for suffix, end in (("", "mean"), ("_low", "low"), ("_high", "high"))},
    "upper_bound_dice": ("upper_bound", "lesion_slice_dice"),
    **{f"{name}_above_threshold{suffix}": ("above_threshold", name, end)
       for name in ("lesion_slice_dice", "volume_dice")
       for suffix, end in (("", "mean"), ("_low", "low"), ("_high", "high"))},
    "healthy_volume_median_ml": ("volumes", "healthy_volume_median_ml"),
    "slices": ("shares", "slices"),
    "healthy_share": ("shares", "healthy"),
    "called_lesion_share": ("shares", "called_lesion"),
    **{name: ("volumes", name) for name in ("cases", "lesion_cases", "healthy_cases", "missed_cases")},
}
# Columns of comparison.md: place in a method's results, and number of decimals.
_PRINTED = {
    "lesion-slice Dice": ("lesion_slices", "dice", 3),
    "lesion-slice Dice at the best single threshold (upper bound)": ("upper_bound", "lesion_slice_dice", 3),
    "lesion-slice AUPRC": ("lesion_slices", "auprc", 3),
    "all-slice Dice": ("all_slices", "dice", 3),
    "all-slice AUPRC": ("all_slices", "auprc", 3),
    "slice accuracy": ("slice_level", "accuracy", 3),
    "volume Dice": ("volumes", "dice", 3),
    "volume Dice minus the threshold's": ("above_threshold", "volume_dice", 3),
    "false-positive volume in healthy subjects, ml (median)": ("volumes", "healthy_volume_median_ml", 2),
    "HD95, mm": ("volumes", "hd95_mm", 1),
    "lesion F1": ("volumes", "lesion_f1", 3),
}


class ComparedMethod(NamedTuple):
    """One line of a comparison.

    Attributes:
      method: its title.
      settings: settings that differ from other lines, as text.
      results: results of `running.SliceSums`, and "volumes" of `volumes.summarise`; missing ones stay empty.
      seconds_per_slice: None if not measured.
      labels: labels that the threshold has used, "image labels" or "ground truth".
      passes: network passes per slice.
    """

    method: str
    settings: str
    results: Mapping[str, Any]
    seconds_per_slice: float | None
    labels: str = ""
    passes: int | None = None


def write_comparison(
    folder: str | os.PathLike, rows: Sequence[ComparedMethod], phantom: bool, name: str = "comparison"
) -> None:
    """Writes <name>.csv (all metrics, to six digits; an empty cell where there is none) and <name>.md.

    Args:
      folder: folder of the files, made if absent.
      rows: the methods in the order of the table, measured on the same slices. Tuples in the order of fields also work.
      phantom: whether the cases belong to the phantom, which the headline states.
      name: name of the files.
    """
    rows = [ComparedMethod(*row) for row in rows]
    with files.written_whole(Path(folder) / f"{name}.csv") as temporary, \
            temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["method", "settings", "labels", *_COMPARED, "passes_per_slice", "seconds_per_slice",
                         "phantom"])
        for row in rows:
            metrics_found = [_found(row.results, *place) for place in _COMPARED.values()]
            passes = "" if row.passes is None else row.passes
            writer.writerow([row.method, row.settings, row.labels, *map(_cell, metrics_found), passes,
                             _cell(row.seconds_per_slice), phantom])
    with files.written_whole(Path(folder) / f"{name}.md") as temporary:
        temporary.write_text(_comparison_page(rows, phantom), encoding="utf-8")


def _comparison_page(rows: Sequence[ComparedMethod], phantom: bool) -> str:
    table = [["method", "settings", "threshold from", *_PRINTED, "passes per slice", "seconds per slice"]]
    for row in rows:
        shown = [_shown(_found(row.results, *place), digits) for *place, digits in _PRINTED.values()]
        table.append([row.method, row.settings, row.labels or "-", *shown, _shown(row.passes),
                      _shown(row.seconds_per_slice)])
    table.insert(1, ["---", "---", "---", *["---:"] * (len(table[0]) - 3)])
    lines = ("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in table)
    return "\n".join([
        f"# {'PHANTOM metrics' if phantom else 'Metrics'} of {_extent(rows)}", "", *lines, "",
        "Threshold from: the labels of the validation slices that the rule for the threshold has seen. Best single "
        "threshold: chosen with the ground truth of the same slices, and applied without filters. "
        "All-slice Dice: an empty mask without a lesion scores 1, so it increases with the share of healthy slices. "
        "Volume Dice and HD95: means over the cases with a lesion, HD95 without those whose mask is empty. Lesion "
        "F1: a lesion is found if the mask touches it. Brackets: 95% interval, bootstrap over patients.", "",
        provenance.RESEARCH_USE, ""])


def _extent(rows: Sequence[ComparedMethod]) -> str:
    """Describes the cases and slices of the comparison. If they differ between methods, all values are given."""
    def said(form: str, *place: str) -> str:
        values = (_found(row.results, *place) for row in rows)
        return " or ".join(dict.fromkeys(form.format(value) for value in values if value is not None)) or "?"

    return (f"{said('{}', 'volumes', 'cases')} cases, {said('{}', 'shares', 'slices')} slices, "
            f"{said('{:.0%}', 'shares', 'healthy')} of them healthy")


def _found(results: Any, *place: str) -> Any:
    for key in place:
        results = results.get(key) if isinstance(results, Mapping) else None
    return results


def written(name: str) -> str:
    """The title of a metric or group in text: lesion_f1 -> lesion F1."""
    return _WHOLE.get(name) or " ".join(_WRITTEN.get(word, word) for word in name.split("_"))


def _flattened(results: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in results.items():
        label = f"{prefix}{written(name)}"
        nested = isinstance(value, Mapping) and not _is_interval(value)
        flat |= _flattened(value, f"{label} ") if nested else {label: value}
    return flat


def _is_interval(value: Any) -> bool:
    return isinstance(value, Mapping) and {"mean", "low", "high"} <= value.keys()


def _shown(value: Any, digits: int = 3) -> str:
    if value is None:
        return "-"
    if _is_interval(value):
        ends = "" if value["low"] is None else f" [{_shown(value['low'], digits)}, {_shown(value['high'], digits)}]"
        return _shown(value["mean"], digits) + ends
    return f"{round(value, digits) + 0:.{digits}f}" if isinstance(value, float) else str(value)  # + 0 avoids -0.000


def _cell(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value
