"""The numbers of a run on disk and on screen: metrics.json, cases.csv, a small table for the log.

The last stage; it computes nothing that `metrics.py` does not.
"""

import csv
import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hae_jax import files, provenance
from hae_jax.evaluation import metrics


@dataclasses.dataclass(frozen=True)
class CaseResult:
    """One row of cases.csv.

    Attributes:
      case: its name.
      volume_ml: predicted lesion volume in millilitres.
      true_volume_ml: the segmentation's volume; None without a segmentation, as the next two.
      dice: volume Dice; 1 where both are empty.
      iou: volume IoU; 1 where both are empty.
      slices: number of slices that were translated.
      lesion_slices: how many of them are called lesion slices.
      lowest_similarity: of its slices; the lower, the more certain is a lesion. None without slices.
      seconds: time that the case took.
    """

    case: str
    volume_ml: float
    true_volume_ml: float | None
    dice: float | None
    iou: float | None
    slices: int
    lesion_slices: int
    lowest_similarity: float | None
    seconds: float


def case_result(
    case: str,
    predicted: np.ndarray,  # [X, Y, Z] bool
    truth: np.ndarray | None,  # [X, Y, Z] bool
    affine: np.ndarray,  # [4, 4] voxels to mm
    lesion: np.ndarray,  # [S] bool, predicted slice labels
    score: np.ndarray,  # [S] similarity
    seconds: float,
) -> CaseResult:
    """Sums a case up, on its own grid."""
    known = truth is not None
    return CaseResult(
        case=case,
        volume_ml=metrics.volume_ml(predicted, affine),
        true_volume_ml=metrics.volume_ml(truth, affine) if known else None,
        dice=metrics.volume_dice(predicted, truth) if known else None,
        iou=float(metrics.iou(predicted[None], truth[None])[0]) if known else None,
        slices=len(lesion),
        lesion_slices=int(np.sum(lesion)),
        lowest_similarity=float(np.min(score)) if len(score) else None,
        seconds=seconds,
    )


def write_cases(path: str | os.PathLike, cases: Sequence[CaseResult]) -> None:
    """Writes one row per case under a header line. What is not known is an empty cell."""
    with files.written_whole(path) as temporary, open(temporary, "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(field.name for field in dataclasses.fields(CaseResult))
        writer.writerows([_cell(value) for value in dataclasses.astuple(case)] for case in cases)


def write_metrics(path: str | os.PathLike, results: Mapping[str, Any], **context: Any) -> None:
    """Writes metrics.json: the results, the definition of every name in them, and where they come from.

    Args:
      path: the file to write.
      results: nested dictionaries of numbers, e.g. from `metrics.slice_metrics`.
      context: further entries beside "results" (calibration, checkpoint, settings), ready for JSON.
    """
    files.write_json(path, {
        "results": results,
        **context,
        "definitions": metrics.DEFINITIONS,
        "made_by": provenance.record(),
    })


def metrics_table(columns: Mapping[str, Mapping[str, Any]]) -> str:
    """Results of several methods side by side, for the log.

    Args:
      columns: for each method its nested dictionaries of numbers; what one method lacks is shown as "-".
    """
    flat = {method: _flattened(results) for method, results in columns.items()}
    names = list(dict.fromkeys(name for results in flat.values() for name in results))
    rows = [["", *flat], *([name, *(_shown(results.get(name)) for results in flat.values())] for name in names)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows)
    return "\n".join("  ".join(row) for row in aligned)


def _flattened(results: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in results.items():
        label = f"{prefix}{name.replace('_', ' ')}"
        flat |= _flattened(value, f"{label} ") if isinstance(value, Mapping) else {label: value}
    return flat


def _shown(value: float | int | str | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _cell(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value
