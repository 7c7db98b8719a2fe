"""The head of a page of results: facts about the run, and its metrics with their definitions."""

from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any

from hae_jax.evaluation.report import written
from hae_jax.report.privacy import Privacy
from hae_jax.report.results import Results

_HEADLINES = (("volumes", "dice"), ("lesion_slices", "dice"), ("lesion_slices", "auprc"), ("slice_level", "accuracy"),
              ("volumes", "lesion_f1"))


def results_facts(results: Results, privacy: Privacy) -> list[list[str]]:
    """Pairs of name and value, in the order of the page. Unknown values are left out."""
    manifest, metrics, calibration = results.manifest, results.metrics, results.calibration
    network = manifest.get("checkpoint") or metrics.get("checkpoint") or {}
    config = manifest.get("config") or {}
    facts = {
        "method": _joined(metrics.get("method") or calibration.get("method"),
                          metrics.get("rule") and f"rule {metrics['rule']}"),
        "weights": _joined(_last(network.get("path")), network.get("step") is not None and f"step {network['step']}",
                           network.get("parameters"), network.get("sha256") and f"SHA-256 {network['sha256'][:12]}"),
        "calibration": _calibration(results),
        "labels seen by the threshold": metrics.get("labels") or calibration.get("labels"),
        "channels": ", ".join((config.get("data") or {}).get("modalities") or ()),
        "slices": metrics.get("image_size") and f"{metrics['image_size']} x {metrics['image_size']} px in the network",
        "finished": manifest.get("created"),
        "duration": _duration(manifest.get("seconds"), metrics.get("seconds_per_slice")),
        "command": None if privacy.anonymous else " ".join(map(str, manifest.get("command") or [])),
        "git revision": manifest.get("git_revision"),
        "seed": manifest.get("seed"),
        "devices": ", ".join(manifest.get("devices") or ()),
    }
    return [[name, privacy.text(str(value))] for name, value in facts.items() if value not in (None, "", False)]


def _joined(*parts: Any) -> str:
    return ", ".join(str(part) for part in parts if part)


def _last(path: str | None) -> str | None:
    """The last two names of a path, since `model.safetensors` alone does not identify a network."""
    return path and "/".join(part for part in PurePath(path).parts[-2:] if part != "/")


def _duration(seconds: float | None, each: float | None) -> str:
    return _joined(seconds is not None and f"{seconds:.0f} s", each and f"{each:.3g} s per slice of a finished case")


def _calibration(results: Results) -> str:
    found = results.calibration
    data = ((found.get("made_with") or {}).get("data") or {})
    root = data.get("root") if isinstance(data, Mapping) else data
    return _joined(
        found.get("threshold") is not None and f"threshold {found['threshold']:.4g}",
        results.thresholds.slice is not None and f"slice threshold {results.thresholds.slice:.4g}" if found else None,
        found.get("slice_auc") and f"slice AUC {found['slice_auc']:.3f} on validation slices",
        {"healthy_slices", "lesion_slices"} <= found.keys()
        and f"{found['healthy_slices']} healthy and {found['lesion_slices']} lesion slices",
        root and f"of {PurePath(root).name}")


def metrics_rows(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The table of metrics: "methods", and "rows" of group, name, title, definition, headline, and a value by method.

    A value is [mean, low, high, cases]; a number without an interval has None for what it lacks.
    """
    columns = {metrics.get("method", "method"): metrics.get("results") or {}, **(metrics.get("baselines") or {})}
    columns = {method: dict(_flat(results)) for method, results in columns.items() if results}
    names = dict.fromkeys(name for results in columns.values() for name in results)
    definitions = metrics.get("definitions") or {}
    return {"methods": list(columns), "rows": [
        {"group": group.replace("_", " "), "name": written(name), "title": f"{written(group)} {written(name)}",
         "headline": (group, name) in _HEADLINES,
         "definition": _definition(definitions, group, name),
         "values": [results.get((group, name)) for results in columns.values()]} for group, name in names]}


def _flat(results: Mapping[str, Any]) -> Iterator[tuple[tuple[str, str], list[Any]]]:
    for group, found in results.items():
        for name, value in found.items() if isinstance(found, Mapping) else ():
            if isinstance(value, Mapping):
                yield (group, name), [value.get(key) for key in ("mean", "low", "high", "cases")]
            elif isinstance(value, int | float):
                yield (group, name), [value, None, None, None]


def _definition(definitions: Mapping[str, Any], group: str, name: str) -> str:
    """The definition of a metric, with that of its group."""
    inner = definitions.get(group)
    if isinstance(inner, Mapping):
        return str(inner.get(name) or inner.get("lesions" if name.startswith("lesion") else "cases") or "")
    return ". ".join(str(text) for text in (inner, definitions.get(name)) if text)
