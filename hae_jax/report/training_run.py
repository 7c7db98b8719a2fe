"""Reading of a run folder of train.py: the log's columns, the sample grids, facts about the training."""

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from hae_jax.errors import UserError
from hae_jax.files import read_json_lines
from hae_jax.report import sprites
from hae_jax.report.page import Pictures
from hae_jax.report.privacy import Privacy
from hae_jax.report.results import read_json

_POINTS = 1500  # of a curve; a screen does not show more
_STEP = re.compile(r"step_(\d+)\.png$")


def is_run(folder: Path) -> bool:
    """Whether train.py has written into a folder."""
    return (folder / "metrics.jsonl").is_file() or (
        (folder / "config.json").is_file() and (folder / "checkpoints").is_dir())


def run_data(folder: Path, pictures: Pictures, privacy: Privacy) -> dict[str, Any]:
    """The page's data of a run, ready for JSON. The sample grids are added to `pictures`.

    Args:
      folder: the run folder.
      privacy: removes private parts of text.
    """
    notes: list[str] = []
    config, record = read_json(folder / "config.json", notes), read_json(folder / "run.json", notes)
    lines = _lines(folder / "metrics.jsonl", notes)
    samples = _samples(folder / "samples", pictures, notes)
    facts = _facts(config, record, lines, folder)
    return {"kind": "run", "title": f"Training run {folder.resolve().name}",
            "facts": [[name, privacy.text(str(value))] for name, value in facts],
            "progress": [lines[-1]["step"] if lines else 0, (config.get("training") or {}).get("steps")],
            "columns": _columns(lines), "samples": samples, "notes": [privacy.text(note) for note in notes],
            "versions": _versions(record)}


def _versions(record: Mapping[str, Any]) -> list[list[str]]:
    return [[name, str(version)] for name, version in (record.get("versions") or {}).items()]


def _lines(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """The intact lines of the log."""
    try:
        lines, damaged = read_json_lines(path)
    except UserError as error:
        notes.append(f"{path.name} is missing; there are no curves" if not os.path.lexists(path) else
                     str(error).replace(f"{path}:", path.name, 1))
        return []
    notes.extend(f"{path.name}: line {number} is damaged and is left out" for number in damaged)
    if not lines and not damaged:
        notes.append(f"{path.name} is empty; the first line is written after training.log_every steps")
    return [line for line in lines if isinstance(line.get("step"), int)]


def _columns(lines: Sequence[Mapping[str, Any]]) -> dict[str, list[list[float | None]]]:
    """Points [step, value] of each numeric column, by name, reduced to a number that a screen can show."""
    columns: dict[str, list[list[float | None]]] = {}
    for line in lines:
        for name, value in line.items():
            if name != "step" and (value is None or isinstance(value, int | float)):
                finite = value is not None and math.isfinite(value)
                columns.setdefault(name, []).append([line["step"], float(f"{value:.5g}") if finite else None])
    return {name: _thinned(points) for name, points in columns.items()}


def _thinned(points: list[list[float | None]]) -> list[list[float | None]]:
    """Means of neighbouring points, so that spikes stay visible. A mean is missing if all its points are."""
    size = -(-len(points) // _POINTS)
    if size == 1:
        return points
    groups = (points[start:start + size] for start in range(0, len(points), size))
    return [_mean(group) for group in groups]


def _mean(group: Sequence[Sequence[float | None]]) -> list[float | None]:
    values = [value for _, value in group if value is not None]
    return [group[-1][0], float(f"{sum(values) / len(values):.5g}") if values else None]


def _samples(folder: Path, pictures: Pictures, notes: list[str]) -> list[list[Any]]:
    """[step, name of the picture] of each readable grid, in order."""
    found = sorted((int(match[1]), path) for path in folder.glob("step_*.png") if (match := _STEP.search(path.name)))
    shown = []
    for step, path in found:
        name = f"samples_{step}"
        try:
            with Image.open(path) as image:
                pictures.add(name, {"picture": sprites.data_url(image.convert("RGB"))})
            shown.append([step, name])
        except (OSError, ValueError) as error:
            notes.append(f"{path.name} is damaged and not shown ({error})")
    return shown


def _facts(
    config: Mapping[str, Any], record: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], folder: Path
) -> list[tuple[str, Any]]:
    training, model = config.get("training") or {}, config.get("model") or {}
    steps = training.get("steps")
    done = lines[-1]["step"] if lines else 0
    whole = f"{done:,} of {steps:,}" if isinstance(steps, int) else f"{done:,}"
    checkpoints = sorted(int(path.name) for path in (folder / "checkpoints").glob("*") if path.name.isdigit())
    facts = {
        "step": whole,
        "command": " ".join(map(str, record.get("command") or [])),
        "last started": record.get("created"),
        "data": (config.get("data") or {}).get("root"),
        "network": model.get("name") or model.get("variant"),
        "image size": model.get("image_size") and f"{model['image_size']} x {model['image_size']} px",
        "batch size": training.get("batch_size"),
        "learning rate": training.get("learning_rate"),
        "checkpoints kept": ", ".join(f"{step:,}" for step in checkpoints),
        "devices": ", ".join(map(str, record.get("devices") or [])),
        "git revision": record.get("git_revision"),
        "seed": config.get("seed"),
    }
    return [(name, value) for name, value in facts.items() if value not in (None, "")]
