"""Several methods, or one with several numbers of steps, on the same cases: a table and a figure of each kind.

Every entry is a run of its own (`run.py`) in its own folder, so what is there already is not computed again.
"""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections
from flax import nnx
from jax.sharding import Mesh

from hae_jax.errors import UserError
from hae_jax.evaluation import figures, report
from hae_jax.files import write_json
from hae_jax.provenance import record
from hae_jax.translation.run import translate

_STEPS_SHOWN = {"mixed Dice": ("mixed", "dice"), "lesion-slice Dice": ("unhealthy", "dice"),
                "lesion-slice AUPRC": ("unhealthy", "auprc"), "slice accuracy": ("slice_level", "accuracy")}


@dataclasses.dataclass(frozen=True)
class Network:
    """A network and where it comes from."""

    model: nnx.Module | None
    identity: Mapping[str, Any]
    calibrations: Path  # folder in which its calibrations are kept
    model_config: ml_collections.ConfigDict | None = None  # None: that of the config


@dataclasses.dataclass(frozen=True)
class Entry:
    """One column of a comparison: a method with settings that differ from the config's."""

    title: str
    folder: str
    settings: Mapping[str, Any]  # fields of config.translation
    network: Network


def method_entries(names: Sequence[str], network: Network, unconditional: Network | None = None) -> list[Entry]:
    """One entry for each method; AnoDDPM takes the unconditional network where there is one."""
    return [Entry(name, name, {"method": name},
                  unconditional if unconditional and name.startswith("anoddpm") else network) for name in names]


def steps_entries(counts: Sequence[int], network: Network) -> list[Entry]:
    """The forward process with its schedule respaced to each of `counts` steps."""
    return [Entry(f"hae, {count} steps", f"hae_{count}", {"method": "hae", "respacing": str(count)}, network)
            for count in counts]


def compare(
    entries: Sequence[Entry], config: ml_collections.ConfigDict, mesh: Mesh, *, output: str | Path,
    source: str | Path | None = None,
) -> list[Path]:
    """Runs each entry on the same cases and writes comparison.csv, .md, .png and .json.

    Args:
      entries: what to compare.
      config: the config tree that the entries differ from.
      mesh: the devices.
      output: folder for the tables; each entry's results go into a folder in it.
      source: folder of cases with segmentations; None: the test split of `data.root`.

    Returns:
      What was written.

    Raises:
      UserError: for settings or data that do not fit, or if a case failed or none has a segmentation.
    """
    rows, phantom = _measured(entries, config, mesh, Path(output), source)
    written = _tables(Path(output), "comparison", entries, rows, config, phantom)
    path = Path(output) / "comparison.png"
    figures.comparison_figure(path, rows, _title("Methods on the same cases", phantom))
    return [*written, path]


def compare_steps(
    counts: Sequence[int], network: Network, config: ml_collections.ConfigDict, mesh: Mesh, *, output: str | Path,
    source: str | Path | None = None,
) -> list[Path]:
    """Quality against the steps that the whole schedule is respaced to: steps.csv, .md, .png and .json.

    See `compare` for the rest.
    """
    entries = steps_entries(counts, network)
    rows, phantom = _measured(entries, config, mesh, Path(output), source)
    written = _tables(Path(output), "steps", entries, rows, config, phantom)
    series = {title: [row.results[part][value] for row in rows] for title, (part, value) in _STEPS_SHOWN.items()}
    path = Path(output) / "steps.png"
    figures.steps_figure(path, counts, series, _title("Quality against the steps of the whole schedule", phantom))
    return [*written, path]


def _measured(
    entries: Sequence[Entry], config: ml_collections.ConfigDict, mesh: Mesh, output: Path, source: str | Path | None
) -> tuple[list[report.ComparedMethod], bool]:
    """A line for each entry, and whether the cases are a phantom's."""
    rows, phantom = [], False
    for entry in entries:
        own = copy.deepcopy(config)
        with own.unlocked():
            own.translation.update(entry.settings)
            own.evaluation.overlay_slices = 0
            if entry.network.model_config is not None:
                own.model = entry.network.model_config
        print(f"{entry.title}:", flush=True)
        done = translate(entry.network.model, entry.network.identity, own, mesh, output=output / entry.folder,
                         source=source, calibrations=entry.network.calibrations)
        if done.failed:
            name, reason = next(iter(done.failed.items()))
            raise UserError(f"{output / entry.folder}: {len(done.failed)} cases failed, the first, {name}: {reason}; a "
                            "comparison needs the same cases everywhere")
        if not done.results:
            raise UserError(f"{source or config.data.root}: no case has a segmentation to compare with")
        settings = ", ".join(f"{field}={value}" for field, value in entry.settings.items() if field != "method")
        rows.append(report.ComparedMethod(entry.title, settings, done.results[own.translation.method],
                                          done.seconds_per_slice))
        phantom = done.phantom
    return rows, phantom


def _tables(
    output: Path, name: str, entries: Sequence[Entry], rows: Sequence[report.ComparedMethod],
    config: ml_collections.ConfigDict, phantom: bool,
) -> list[Path]:
    report.write_comparison(output, rows, phantom, name)
    write_json(output / f"{name}.json", {
        **record(), "phantom": phantom, "config": config.to_dict(),
        "entries": [{"title": entry.title, "settings": dict(entry.settings), "folder": entry.folder,
                     "checkpoint": dict(entry.network.identity), "results": row.results,
                     "seconds_per_slice": row.seconds_per_slice} for entry, row in zip(entries, rows, strict=True)]})
    return [output / f"{name}.{kind}" for kind in ("csv", "md", "json")]


def _title(text: str, phantom: bool) -> str:
    return f"{text}{' (phantom figures)' if phantom else ''}"
