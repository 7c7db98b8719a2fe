"""One case of a folder of results: its facts and its volumes on the page.

All volumes are reoriented to LPS, as in translation, so that slice numbers agree with those of the scores. X, Y, Z: the
axes of LPS.
"""

import dataclasses
import json
import os
import shlex
import urllib.parse
from pathlib import Path
from typing import Any

import numpy as np

from hae_jax.data.cases import CaseFiles, ImageFile, read_case
from hae_jax.data.layouts import MODALITIES
from hae_jax.data.nifti import Grid, read_volume
from hae_jax.errors import UserError
from hae_jax.report import sprites
from hae_jax.report.kinds import are_slices
from hae_jax.report.privacy import Privacy
from hae_jax.report.results import Thresholds, read_json

_LOOSE = 1.25  # both thresholds are multiplied and divided by it to measure the threshold sensitivity
_SPECK_ML = 1.0  # added to the volumes, so that tiny lesions count little
_MASK_BIT, _TRUTH_BIT = 1, 2
_SHOWN_MAP = 2.0  # the upper end of the map's colours, in units of the threshold


@dataclasses.dataclass
class ReadCase:
    """A case in memory.

    Attributes:
      facts: contents of slices/<case>.json; empty if it is missing.
      grid: grid of its volumes; None if no volume can be read.
      images: [X, Y, Z] float32 by modality.
      healthy: pseudo-healthy reconstructions, in the same form.
      map: [X, Y, Z] float32.
      mask: [X, Y, Z] bool.
      truth: [X, Y, Z] bool.
      warnings: warnings of the case's translation, and of volumes that cannot be shown.
    """

    facts: dict[str, Any]
    grid: Grid | None = None
    images: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    healthy: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    map: np.ndarray | None = None
    mask: np.ndarray | None = None
    truth: np.ndarray | None = None
    warnings: list[str] = dataclasses.field(default_factory=list)


def case_files(folder: Path, name: str) -> list[Path]:
    """The existing files that the page uses for a case."""
    facts = _facts(folder, name, [])
    own = [folder / "slices" / f"{name}.json", *(folder / file for file in _volumes(name))]
    return [path for path in (*own, *(_paths(facts))) if path.is_file()]


def case_folders(folder: Path, name: str) -> list[str]:
    """The folders of a case's images, which messages may name."""
    return list({str(path.parent) for path in _paths(_facts(folder, name, []))})


def _facts(folder: Path, name: str, notes: list[str]) -> dict[str, Any]:
    facts = read_json(folder / "slices" / f"{name}.json", notes)
    if are_slices(facts):
        return facts
    notes.append(f"{name}.json is not what translate.py writes, and left out")
    return {}


def _paths(facts: dict[str, Any]) -> list[Path]:
    """The case's input files, images first."""
    paths = [Path(image["path"]) for image in facts.get("images", [])]
    return [*paths, *([Path(facts["segmentation"])] if facts.get("segmentation") else [])]


def _volumes(name: str) -> dict[str, str]:
    """The volumes that translation may have written: file name -> kind."""
    return {f"{name}_mask.nii.gz": "mask", f"{name}_map.nii.gz": "map",
            **{f"{name}_healthy_{modality}.nii.gz": f"pseudo-healthy {modality}" for modality in MODALITIES}}


def read(folder: Path, name: str) -> ReadCase:
    """Reads the existing files of a case. An unreadable file becomes a warning."""
    warnings: list[str] = []
    facts = _facts(folder, name, warnings)
    case = ReadCase(facts, warnings=[*facts.get("warnings", []), *warnings])
    if facts:
        _read_images(case, name)
    for file, what in _volumes(name).items():
        if (folder / file).is_file():
            _read_result(case, folder / file, what)
        elif what in ("mask", "map"):
            case.warnings.append(f"{file} is missing")
    if case.grid is not None and max(facts.get("slice") or [0]) >= case.grid.reoriented_shape[2]:
        case.warnings.append("its slices are not those of its volumes, and left out")
        case.facts = {field: value for field, value in facts.items() if field in ("images", "segmentation")}
    return case


def translated_files(folder: Path, name: str) -> CaseFiles | None:
    """The files that a case was translated from; None if slices/<case>.json is missing or damaged."""
    try:
        return _files(_facts(folder, name, []), name)
    except KeyError:
        return None


def _files(facts: dict[str, Any], name: str) -> CaseFiles:
    images = tuple(ImageFile(image["modality"], Path(image["path"]), image["volume"], image["volumes"])
                   for image in facts["images"])
    truth = facts["segmentation"]
    return CaseFiles(name, images, None if truth is None else Path(truth))


def _read_images(case: ReadCase, name: str) -> None:
    try:
        files = _files(case.facts, name)
        found = read_case(files)
    except (KeyError, TypeError, UserError, OSError, MemoryError) as error:
        case.warnings.append(f"the images are not shown: {error}")
        return
    case.grid, case.truth = found.grid, found.mask
    case.images = {image.modality: found.volumes[..., c] for c, image in enumerate(files.images)}


def _read_result(case: ReadCase, path: Path, what: str) -> None:
    """Reads a volume that translation wrote into its field of `case`."""
    try:
        values, grid = read_volume(path)
    except UserError as error:
        case.warnings.append(f"not shown: {error}")
        return
    case.grid = case.grid or grid
    if values.shape != case.grid.reoriented_shape:
        case.warnings.append(f"{path.name} is not shown: its shape differs from that of the case's images")
    elif what == "mask":
        case.mask = values > 0.5
    elif what == "map":
        case.map = values
    else:
        case.healthy[what.split()[-1]] = values


def threshold_sensitivity(case: ReadCase, thresholds: Thresholds) -> float | None:
    """How much the lesion volume depends on the thresholds, from 0 to 1; None if each slice has its own threshold.

    (V- - V+) / (V- + V+ + 1 ml): V- is the volume of the map above both thresholds divided by 1.25, V+ above both
    multiplied by it.
    """
    facts, grid, pixel = case.facts, case.grid, thresholds.pixel
    if case.map is None or grid is None or pixel is None or not (facts.get("slice") and facts.get("anomaly_score")):
        return None
    gate = thresholds.slice if thresholds.gated else None
    if thresholds.gated and gate is None:
        return None
    values, scores = case.map[:, :, facts["slice"]], np.array(facts["anomaly_score"])

    def volume(factor: float) -> float:
        called = np.ones(len(scores), bool) if gate is None else scores >= gate * factor
        return np.count_nonzero(values[..., called] >= pixel * factor) * _voxel_ml(grid)

    most, least = volume(1 / _LOOSE), volume(_LOOSE)
    return (most - least) / (most + least + _SPECK_ML)


def _voxel_ml(grid: Grid) -> float:
    return abs(float(np.linalg.det(grid.affine[:3, :3]))) / 1000


def entry(case: ReadCase, folder: Path, name: str, thresholds: Thresholds, privacy: Privacy) -> dict[str, Any]:
    """The values of a case for the page's table, charts and contact sheet, ready for JSON."""
    facts, found = case.facts, threshold_sensitivity(case, thresholds)
    return {
        "threshold_sensitivity": None if found is None else round(found, 4),
        "warnings": [privacy.text(warning) for warning in case.warnings],
        "index": facts.get("slice", []),
        "score": [float(f"{score:.4g}") for score in facts.get("anomaly_score", [])],
        "lesion": [int(called) for called in facts.get("lesion", [])],
        "truth": None if facts.get("truth") is None else [int(label) for label in facts["truth"]],
        "thumbnail": _thumbnail(case),
        **({"files": [], "commands": []} if privacy.anonymous else {
            "files": _links(folder, name), "commands": _commands(case, folder, name)}),
    }


def _background(case: ReadCase) -> np.ndarray | None:  # [X, Y, Z] uint8
    """The first image in its grey window, or the map if there is no image."""
    for volume in case.images.values():
        return sprites.to_bytes(volume, *sprites.window(volume))
    return None if case.map is None else sprites.to_bytes(case.map, *sprites.window(case.map))


def _thumbnail(case: ReadCase) -> str | None:
    """A thumbnail of the most anomalous slice; without scores, of the middle slice."""
    shown = _background(case)
    if shown is None or case.grid is None:
        return None
    scores = case.facts.get("anomaly_score")
    z = case.facts["slice"][int(np.argmax(scores))] if scores else shown.shape[2] // 2
    mask = np.zeros(shown.shape, bool) if case.mask is None else case.mask
    x, y, _ = sprites.head_box(shown > 0)
    spacing = np.linalg.norm(case.grid.reoriented_affine[:3, :3], axis=0)
    return sprites.thumbnail(shown[x, y, z], mask[x, y, z], tuple(spacing[:2]))


def _links(folder: Path, name: str) -> list[dict[str, str]]:
    linked = _volumes(name) | {f"{name}_{what}.nii.gz": what for what in ("probability", "uncertainty")}
    return [{"text": what, "href": urllib.parse.quote(os.fsencode(file))} for file, what in linked.items()
            if (folder / file).is_file()]


def _commands(case: ReadCase, folder: Path, name: str) -> list[dict[str, str]]:
    """A command line for each viewer, for use in the folder of results."""
    there = {what: file for file, what in _volumes(name).items() if (folder / file).is_file()}
    if "mask" not in there or "map" not in there:
        return []
    image = next(iter(_paths(case.facts)), None)
    shown = there["map"] if image is None else _relative(image, folder)
    quoted, mask, heat = map(shlex.quote, (shown, there["mask"], there["map"]))
    slicer = (f"slicer.util.loadVolume({shown!r}); slicer.util.loadVolume({there['map']!r}); "
              f"slicer.util.loadSegmentation({there['mask']!r})")
    return [{"program": "ITK-SNAP", "text": f"itksnap -g {quoted} -s {mask} -o {heat}"},
            {"program": "3D Slicer", "text": f"Slicer --python-code {shlex.quote(slicer)}"},
            {"program": "FSLeyes", "text": f"fsleyes {quoted} {heat} -cm hot -a 50 {mask} -cm red -a 50"}]


def _relative(path: Path, folder: Path) -> str:
    """A file's path relative to the results; only its name if both share only the root folder."""
    folder = folder.resolve()
    common = os.path.commonpath([path, folder])
    return path.name if common == os.path.sep else os.path.relpath(path, folder)


def volumes(case: ReadCase, thresholds: Thresholds) -> dict[str, Any] | None:
    """The data for the case view, ready for JSON; None if no volume can be read."""
    if case.grid is None:
        return None
    box = sprites.head_box(_shown(case, case.grid.reoriented_shape))
    shape = tuple(side.stop - side.start for side in box)
    tile, columns, per_sheet = sprites.layout(shape)
    origin = [side.start for side in box]
    affine = case.grid.reoriented_affine
    return {
        "shape": shape, "origin": origin, "tile": tile, "columns": columns, "perSheet": per_sheet,
        "spacing": [round(float(mm), 4) for mm in np.linalg.norm(affine[:3, :3], axis=0)],
        "affine": np.round(affine[:3], 4).tolist(),
        "images": [{"name": name, "sheets": sprites.sheets(_grey(volume, volume, box)),
                    "healthy": _healthy(case, name, volume, box)} for name, volume in case.images.items()],
        "map": _map(case, box, thresholds),
        "labels": _labels(case, case.grid.reoriented_shape, box),
        "hasMask": case.mask is not None, "hasTruth": case.truth is not None,
    }


def _shown(case: ReadCase, shape: tuple[int, int, int]) -> np.ndarray:  # [X, Y, Z] bool
    shown = np.zeros(shape, bool)
    for volume in (*case.images.values(), case.map, case.mask):
        if volume is not None:
            shown |= volume != 0
    return shown


def _grey(volume: np.ndarray, of: np.ndarray, box: tuple[slice, ...]) -> np.ndarray:
    """A volume in the grey window of another one, so that both can be compared visually."""
    return sprites.to_bytes(volume[box], *sprites.window(of))


def _healthy(case: ReadCase, name: str, volume: np.ndarray, box: tuple[slice, ...]) -> list[str] | None:
    return sprites.sheets(_grey(case.healthy[name], volume, box)) if name in case.healthy else None


def _map(case: ReadCase, box: tuple[slice, ...], thresholds: Thresholds) -> dict[str, Any] | None:
    """The map. All cases have the same colour scale if one threshold is used for all slices."""
    if case.map is None:
        return None
    high = _SHOWN_MAP * thresholds.pixel if thresholds.pixel else sprites.window(case.map)[1]
    return {"sheets": sprites.sheets(sprites.to_bytes(case.map[box], 0, high)), "high": float(f"{high:.4g}"),
            "threshold": thresholds.pixel and float(f"{thresholds.pixel:.4g}")}


def _labels(case: ReadCase, shape: tuple[int, int, int], box: tuple[slice, ...]) -> list[str] | None:
    if case.mask is None and case.truth is None:
        return None
    labels = np.zeros(shape, np.uint8)
    for bit, mask in ((_MASK_BIT, case.mask), (_TRUTH_BIT, case.truth)):
        if mask is not None:
            labels |= np.uint8(bit) * mask.astype(np.uint8)
    return sprites.sheets(labels[box], exact=True)


def fingerprint(folder: Path, name: str) -> str:
    """Names, sizes and modification times of a case's files. It changes if any of the files changes."""
    return json.dumps([[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in case_files(folder, name)])
