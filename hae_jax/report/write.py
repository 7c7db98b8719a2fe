"""Writes report.html for a folder of results or of a training run."""

import hashlib
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hae_jax.errors import UserError
from hae_jax.report import cases
from hae_jax.report.facts import metrics_rows, results_facts
from hae_jax.report.page import Pictures, write_page
from hae_jax.report.privacy import Privacy
from hae_jax.report.results import Results, is_results, read_results
from hae_jax.report.training_run import is_run, run_data

PAGE = "report.html"
_ANONYMOUS = "report_anonymous.html"
LIMIT_MB = 25.0
_FORMAT = 1  # version of the pictures beside a page; if it differs, they are made again
_OWN_MB = 0.5  # part of the limit for style, code and table


def write_report(
    folder: str | Path, *, output: str | Path | None = None, anonymize: bool = False, limit_mb: float = LIMIT_MB
) -> Path:
    """Writes the page of a folder of results or of a training run.

    Args:
      folder: a folder of results of translate.py, or a run folder of train.py.
      output: the page; None: report.html in the folder, or report_anonymous.html.
      anonymize: number the cases, and leave out all that reveals their names: links, commands, file names.
      limit_mb: megabytes up to which pictures lie in the page itself. Beyond that, each case's pictures go to a file in
        the folder `report` beside it.

    Returns:
      The page.

    Raises:
      UserError: if the folder is neither.
    """
    folder = Path(folder)
    _check(folder, limit_mb)
    page = Path(output) if output is not None else folder / (_ANONYMOUS if anonymize else PAGE)
    if page.suffix != ".html":
        raise UserError(f"{page}: the page's name must end in .html")
    pictures = Pictures(page, int(max(0, limit_mb - _OWN_MB) * 1e6))
    if is_results(folder):
        data = _results_data(read_results(folder), pictures, anonymize)
    else:
        data = run_data(folder, pictures, Privacy([str(folder.resolve().parent)], [folder.resolve().name],
                                                  anonymous=False))
    write_page(page, data, pictures)
    return page


def _check(folder: Path, limit_mb: float) -> None:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give a folder that translate.py or train.py has written")
    if not 0 < limit_mb < math.inf:
        raise UserError(f"--max-mb is {limit_mb:g}; give a number greater than 0")
    if not (is_results(folder) or is_run(folder)):
        below = sorted(path.name for path in folder.iterdir() if path.is_dir() and (is_results(path) or is_run(path)))
        hint = f", for example {', '.join(below[:3])}" if below else ""
        raise UserError(f"{folder}: has neither results of translate.py (cases.csv, records) nor a run of train.py "
                        f"(metrics.jsonl); give such a folder{hint}")


def _results_data(results: Results, pictures: Pictures, anonymize: bool) -> dict[str, Any]:
    names = sorted({*results.rows, *results.failed})
    folder = results.folder
    # expanduser does not fail for a user without a home, as in some containers; Path.home does.
    private = {str(folder.resolve()), str(folder), str(Path.cwd()), os.path.expanduser("~")}
    private |= {place for name in names for place in cases.case_folders(folder, name)}
    privacy = Privacy(private, names, anonymous=anonymize)
    thresholds = results.thresholds
    return {
        "kind": "results", "title": "Lesions found" if anonymize else f"Lesions found: {folder.resolve().name}",
        "phantom": results.phantom, "facts": results_facts(results, privacy),
        "notes": [privacy.text(note) for note in results.notes],
        "cases": list(_cases(results, pictures, privacy)),
        "failed": [[privacy.label(name), privacy.text(why)] for name, why in sorted(results.failed.items())],
        "metrics": metrics_rows(results.metrics), "anonymous": anonymize,
        "calibration": {"histogram": results.calibration.get("slice_scores") or None, "threshold": thresholds.slice},
        "versions": [[name, str(own)] for name, own in (results.manifest.get("versions") or {}).items()],
    }


def _cases(results: Results, pictures: Pictures, privacy: Privacy) -> Iterator[dict[str, Any]]:
    """Yields the entry of each finished case. Pictures beside the page are used again if they are still valid."""
    for name, row in sorted(results.rows.items()):
        label = privacy.label(name)
        key = _key(results.thresholds, label, cases.fingerprint(results.folder, name))
        entry = pictures.known(label, key) or _made(results, name, label, key, pictures, privacy)
        yield {"name": label, **_numbers(row), **entry}


def _key(*parts: Any) -> str:
    """The key of a case's pictures. It is a digest, since the files may have names that the page hides."""
    return hashlib.sha256(repr((_FORMAT, *parts)).encode("utf-8", "backslashreplace")).hexdigest()


def _made(results: Results, name: str, label: str, key: str, pictures: Pictures, privacy: Privacy) -> dict[str, Any]:
    case = cases.read(results.folder, name)
    entry = cases.entry(case, results.folder, name, results.thresholds, privacy)
    drawn = cases.volumes(case, results.thresholds)
    entry["viewable"] = drawn is not None
    pictures.add(label, drawn, key, entry)
    return entry


def _numbers(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row's values, with numbers rounded to five digits."""
    return {column: float(f"{value:.5g}") if isinstance(value, float) else value
            for column, value in row.items() if column != "case"}
