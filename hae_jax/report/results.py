"""Reading of a folder of results: rows, failures, metrics, calibration, and notes about missing files.

Each file is read separately. A missing or damaged file becomes a note and not an error, since a report is especially
useful for a run that went wrong.
"""

import csv
import dataclasses
import io
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hae_jax import files
from hae_jax.errors import UserError
from hae_jax.report import kinds

_TEXTS = ("case",)  # columns of cases.csv that are not numbers
_COUNTS = ("slices", "lesion_slices", "lesions", "lesions_found", "lesions_predicted", "false_lesions")
_UNGATED = ("threshold",)  # methods that keep masks in slices that are called healthy


@dataclasses.dataclass
class Thresholds:
    """The thresholds that turned maps into masks.

    Attributes:
      pixel: a voxel belongs to the mask where the map is at least this; None where each slice has its own.
      slice: a slice is called a lesion slice where its anomaly score is at least this.
      gated: whether the masks of other slices are empty.
    """

    pixel: float | None
    slice: float | None
    gated: bool = True


@dataclasses.dataclass
class Results:
    """The contents of a folder of results.

    Attributes:
      folder: the folder.
      rows: rows of finished cases by name, with numbers, and None for empty cells.
      failed: reason of each failed case, by name.
      manifest, metrics, calibration: the files with these names; empty if missing.
      notes: missing or damaged parts, one line each.
    """

    folder: Path
    rows: dict[str, dict[str, Any]]
    failed: dict[str, str]
    manifest: dict[str, Any]
    metrics: dict[str, Any]
    calibration: dict[str, Any]
    notes: list[str]

    @property
    def phantom(self) -> bool:
        """Whether a case of a phantom is among them."""
        return bool(self.manifest.get("phantom") or self.metrics.get("phantom"))

    @property
    def thresholds(self) -> Thresholds:
        """The thresholds of the calibration."""
        found = self.calibration
        if "diff_max" in found:  # the published forward process has a similarity, low for lesions
            return Thresholds(None, None if found.get("threshold") is None else 1 - found["threshold"])
        fixed = found.get("rule") != "quantile"
        return Thresholds(found.get("threshold") if fixed else None, found.get("slice_threshold"),
                          found.get("method") not in _UNGATED)


def is_results(folder: Path) -> bool:
    """Whether translate.py has written into a folder."""
    return (folder / "cases.csv").is_file() or (folder / "records").is_dir()


def read_results(folder: Path) -> Results:
    """Reads the existing files of a folder of results."""
    notes: list[str] = []
    manifest, metrics, calibration = (read_json(folder / f"{name}.json", notes, checks) for name, checks in (
        ("manifest", kinds.MANIFEST), ("metrics", kinds.METRICS), ("calibration", kinds.CALIBRATION)))
    rows, records = _read_rows(folder / "cases.csv", notes), _read_records(folder / "records", notes)
    failed = dict(manifest.get("failed") or {})
    if not manifest:
        notes.append("the run is not finished or was stopped, so metrics over all cases are missing; run its "
                     "command again")
        rows |= {name: record["row"] for name, record in records.items() if record.get("row") and name not in rows}
        failed = {name: record["failed"] for name, record in records.items() if record.get("failed")}
        begun = [name for name, record in records.items() if not (record.get("row") or record.get("failed"))]
        failed |= dict.fromkeys(begun, "its results were not complete when this page was made")
    return Results(folder, rows, {name: why for name, why in failed.items() if name not in rows}, manifest, metrics,
                   calibration, notes)


def read_json(
    path: Path, notes: list[str], checks: Mapping[str, kinds.Check] = MappingProxyType({})
) -> dict[str, Any]:
    """Reads a JSON object. A missing or damaged file gives an empty one and a note. Bad fields are left out."""
    if not os.path.lexists(path):
        notes.append(f"{path.name} is missing")
        return {}
    try:
        found = files.read_json(path)
        if isinstance(found, dict):
            bad = kinds.wrong(found, checks)
            notes.extend(f"{path.name}: {name} is not what translate.py writes, and left out" for name in bad)
            return {name: value for name, value in found.items() if name not in bad}
        notes.append(f"{path.name} is not a JSON object")
    except UserError as error:
        notes.append(str(error).replace(f"{path}:", path.name, 1))
    return {}


def _read_rows(path: Path, notes: list[str]) -> dict[str, dict[str, Any]]:
    if not os.path.lexists(path):
        notes.append(f"{path.name} is missing")
        return {}
    try:
        stream = io.StringIO(files.read_content(path).decode(errors="surrogateescape"), newline="")
        return {row["case"]: {name: _number(name, value) for name, value in row.items() if name}
                for row in csv.DictReader(stream)}
    except UserError as error:
        notes.append(str(error).replace(f"{path}:", path.name, 1))
    except (ValueError, KeyError, csv.Error) as error:
        notes.append(f"{path.name} cannot be read ({error})")
    return {}


def _number(column: str, text: str | None) -> Any:
    if column in _TEXTS:
        return text
    if not text:
        return None
    value = int(text) if column in _COUNTS else float(text)
    return value if math.isfinite(value) else None


def _read_records(folder: Path, notes: list[str]) -> dict[str, dict[str, Any]]:
    paths = [path for path in sorted(folder.glob("*.json")) if path.name[0] != "."]
    found = {path.stem: read_json(path, notes, kinds.RECORD) for path in paths}
    return {name: record for name, record in found.items() if record}
