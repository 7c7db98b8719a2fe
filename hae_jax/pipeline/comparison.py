"""Comparison of several methods, or of several numbers of steps, on the same cases, as tables and figures.

Each entry is a separate run of `translate` in its own folder, so existing results are not computed again.
"""

import contextlib
import copy
import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections
from flax import nnx
from jax.sharding import Mesh

from hae_jax.console import only_warnings
from hae_jax.errors import UserError
from hae_jax.evaluation import figures, report
from hae_jax.files import write_json
from hae_jax.localization import rules
from hae_jax.localization.methods import make_method
from hae_jax.pipeline import checks
from hae_jax.pipeline.calibrations import available
from hae_jax.pipeline.translate import translate
from hae_jax.provenance import record

_LOG = logging.getLogger(__name__)
_STEPS_SHOWN = {"all-slice Dice": ("all_slices", "dice"), "lesion-slice Dice": ("lesion_slices", "dice"),
                "lesion-slice AUPRC": ("lesion_slices", "auprc"), "slice accuracy": ("slice_level", "accuracy")}


@dataclasses.dataclass(frozen=True)
class Network:
    """A network and its origin.

    Attributes:
      model: the network; None for methods without a network.
      identity: its checkpoint, ready for JSON.
      calibrations: folder of its calibrations.
      config: config of its training, of which model, diffusion, training and data.scaling are used; None: the
        comparison's config.
      shipped: the file of a calibration beside its weights.
    """

    model: nnx.Module | None
    identity: Mapping[str, Any]
    calibrations: Path
    config: ml_collections.ConfigDict | None = None
    shipped: Path | None = None


@dataclasses.dataclass(frozen=True)
class Entry:
    """One entry of a comparison: a method with settings that differ from the config's."""

    title: str
    folder: str
    settings: Mapping[str, Any]  # fields of config.translation
    network: Network


def method_entries(names: Sequence[str], network: Network, others: Mapping[str, Network] | None = None) -> list[Entry]:
    """One entry for each method. A method in `others` uses its own network from there."""
    return [Entry(name, name, {"method": name}, (others or {}).get(name, network)) for name in names]


def steps_entries(counts: Sequence[int], network: Network) -> list[Entry]:
    """The forward process with its schedule respaced to each of `counts` steps."""
    return [Entry(f"hae, {count} steps", f"hae_{count}", {"method": "hae", "respacing": str(count)}, network)
            for count in counts]


def check(
    entries: Sequence[Entry], config: ml_collections.ConfigDict, *, output: str | Path, source: str | Path | None = None
) -> None:
    """Checks names, settings, networks, data and calibrations of all entries before the first one runs.

    It also makes the folders for the results. `compare` and `compare_steps` call it.

    Raises:
      UserError: an entry cannot run. The message names it.
    """
    own = [_own_config(entry, config) for entry in entries]
    # Messages of the checks that are not errors are hidden here and shown when the entry runs.
    with only_warnings():
        for entry, its_config in zip(entries, own, strict=True):  # first the checks that make no folders
            with _named(entry):
                checks.check_settings(its_config, make_method(its_config), entry.network.model)
        for entry, its_config in zip(entries, own, strict=True):
            with _named(entry):
                store = checks.find_inputs(its_config, source).store
                checks.make_output(Path(output) / entry.folder, source)
                available(its_config, store, make_method(its_config), entry.network.identity,
                          entry.network.calibrations, entry.network.shipped)


def compare(
    entries: Sequence[Entry], config: ml_collections.ConfigDict, mesh: Mesh, *, output: str | Path,
    source: str | Path | None = None,
) -> list[Path]:
    """Runs each entry on the same cases and writes comparison.csv, .md, .png and .json.

    Args:
      config: the config tree, from which the entries differ.
      output: folder for the tables; each entry's results are in a subfolder.
      source: folder of cases with segmentations; None: the test split of `data.root`.

    Returns:
      The written files.

    Raises:
      UserError: settings or data do not fit, a case failed, or no case has a segmentation.
    """
    check(entries, config, output=output, source=source)
    rows, phantom = _measured(entries, config, mesh, Path(output), source)
    written = _tables(Path(output), "comparison", entries, rows, config, phantom)
    path = Path(output) / "comparison.png"
    figures.comparison_figure(path, rows, _title("Methods on the same cases", rows, phantom))
    return [*written, path]


def compare_steps(
    counts: Sequence[int], network: Network, config: ml_collections.ConfigDict, mesh: Mesh, *, output: str | Path,
    source: str | Path | None = None,
) -> list[Path]:
    """Compares numbers of steps to which the whole schedule is respaced: steps.csv, .md, .png and .json.

    See `compare` for the rest.
    """
    entries = steps_entries(counts, network)
    check(entries, config, output=output, source=source)
    rows, phantom = _measured(entries, config, mesh, Path(output), source)
    written = _tables(Path(output), "steps", entries, rows, config, phantom)
    series = {title: [row.results[part][name] for row in rows] for title, (part, name) in _STEPS_SHOWN.items()}
    path = Path(output) / "steps.png"
    title = _title("Quality against the steps of the whole schedule", rows, phantom)
    figures.steps_figure(path, counts, series, f"{title}\n(all-slice metrics: an empty mask without a lesion scores 1)")
    return [*written, path]


def _measured(
    entries: Sequence[Entry], config: ml_collections.ConfigDict, mesh: Mesh, output: Path, source: str | Path | None
) -> tuple[list[report.ComparedMethod], bool]:
    """Runs all entries. Returns a row for each, and whether the cases belong to a phantom."""
    rows, phantom = [], False
    for entry in entries:
        own = _own_config(entry, config)
        _LOG.info("%s:", entry.title)
        if own.translation.calibration != config.translation.calibration:
            _LOG.info("calibration: %s is for %s only; %s uses its own", config.translation.calibration,
                      config.translation.method, entry.title)
        done = translate(entry.network.model, entry.network.identity, own, mesh, output=output / entry.folder,
                         source=source, calibrations=entry.network.calibrations, shipped=entry.network.shipped,
                         only_source=True)
        if done.failed:
            name, reason = next(iter(done.failed.items()))
            raise UserError(f"{output / entry.folder}: {len(done.failed)} cases failed, the first, {name}: {reason}; a "
                            "comparison needs the same cases for all methods")
        if not done.results:
            raise UserError(f"{source or config.data.root}: no case has a segmentation to compare with")
        method = make_method(own)
        settings = ", ".join(f"{field}={value}" for field, value in entry.settings.items() if field != "method")
        rows.append(report.ComparedMethod(
            entry.title, settings, done.results[own.translation.method], done.seconds_per_slice,
            rules.LABELS[method.rule], method.passes))
        phantom = done.phantom
    return rows, phantom


def _own_config(entry: Entry, config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The config of an entry's run, with its settings, and with model and diffusion of its network's training.

    A calibration that the user gives is used for the config's method only. Other methods make their own.
    """
    own, trained = copy.deepcopy(config), copy.deepcopy(entry.network.config)
    with own.unlocked():
        own.translation.update(entry.settings)
        own.evaluation.overlay_slices, own.evaluation.report = 0, False  # only tables are needed
        if entry.settings.get("method", own.translation.method) != config.translation.method:
            own.translation.calibration = None
        if trained is not None:
            _check_same_data(entry.network, config)
            own.model, own.diffusion, own.training = trained.model, trained.diffusion, trained.training
            own.data.scaling = trained.data.get("scaling", "slice")
    return own


def _check_same_data(network: Network, config: ml_collections.ConfigDict) -> None:
    assert network.config is not None
    for field in ("data.modalities", "model.image_size", "model.in_channels"):
        section, name = field.split(".")
        its, ours = network.config[section][name], config[section][name]
        if its != ours:
            raise UserError(f"{network.identity['path']}: was trained with {field} {its}, but the comparison has "
                            f"{ours}; give a network that was trained on the same data")


@contextlib.contextmanager
def _named(entry: Entry) -> Iterator[None]:
    """Adds the entry's title to a UserError."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{entry.title}: {error}") from error


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


def _title(text: str, rows: Sequence[report.ComparedMethod], phantom: bool) -> str:
    """A title with the share of healthy slices, which all-slice metrics depend on."""
    healthy = rows[0].results["shares"]["healthy"]
    return (f"{text}{' (phantom metrics)' if phantom else ''}\n"
            f"bars: 95% over patients; {healthy:.0%} of all slices are healthy")
