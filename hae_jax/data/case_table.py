"""Reading of a table with the files of each case. The table replaces the search by file and folder names.

    case,patient,flair,t1,t1ce,t2,segmentation
    P1_2019,P1,scans/P1_flair.nii.gz,scans/P1_t1.nii.gz,scans/P1_t1ce.nii.gz,scans/P1_t2.nii.gz,masks/P1.nii.gz

Paths are relative to the table's folder. The columns `patient` and `segmentation` are optional, and their cells may be
empty. A row with a mistake becomes a case whose `problem` names the row. A mistake in the header or the file format
raises an error.
"""

import collections
import csv
import dataclasses
import io
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from hae_jax.data.layout_rules import MODALITIES, SYNONYMS, CaseFiles, ImageFile
from hae_jax.data.nifti import EXTENSIONS
from hae_jax.data.presence import absence
from hae_jax.errors import UserError
from hae_jax.files import decoded, read_content

_OTHERS = ("case", "patient", "segmentation")
_FORBIDDEN = re.compile(r"[/\\\0-\x1f\x7f]")  # not allowed in a case's name, which becomes a file name
LONGEST = 200  # bytes in a case's name at most; result files have names such as <case>_healthy_flair.nii.gz


def read_table(path: Path, modalities: Sequence[str]) -> list[CaseFiles]:
    """The cases of a CSV file, sorted by name; separated by commas, semicolons or tabs.

    Args:
      modalities: the columns wanted, in their order; others of known modalities are ignored.

    Raises:
      UserError: it cannot be read, has no cases, or its first row lacks a column or has one that is not known.
    """
    rows = _rows(path)
    header = next(rows, (1, []))[1]
    columns = _columns(path, header, modalities)
    cases = [_case(path, number, row, columns, modalities) for number, row in rows if any(row)]
    if not cases:
        raise UserError(f"{path}: no cases below its first row")
    return sorted(_each_once(path, cases), key=lambda case: case.name)


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yields the number (from 1) and the cells of each row."""
    text = decoded(read_content(path))
    if "\0" in text:
        raise UserError(f"{path}: is no text; save the table as CSV")
    first = text.partition("\n")[0]
    delimiter = max(",;\t", key=first.count)
    try:
        for number, row in enumerate(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True), 1):
            yield number, [cell.strip() for cell in row]
    except csv.Error as error:
        raise UserError(f"{path}: is no CSV ({error}); check its quotes") from error


def _columns(path: Path, header: Sequence[str], modalities: Sequence[str]) -> list[str]:
    """The canonical name of each column, such as "flair" for "t2f"."""
    known = {word: modality for modality, words in SYNONYMS.items() for word in words} | {n: n for n in _OTHERS}
    columns = [known.get(name.lower(), "") for name in header]
    if unknown := [name for name, column in zip(header, columns, strict=True) if not column]:
        raise UserError(f"{path}, row 1: column {unknown[0] or '(without a name)'} is not known; columns are "
                        f"{', '.join((*_OTHERS[:2], *MODALITIES, _OTHERS[2]))}")
    if twice := [name for name, count in collections.Counter(columns).items() if count > 1]:
        raise UserError(f"{path}, row 1: column {twice[0]} is there twice")
    if missing := [name for name in ("case", *modalities) if name not in columns]:
        raise UserError(f"{path}, row 1: column {missing[0]} is missing; its columns are {', '.join(header) or 'none'}")
    return columns


def _case(
    path: Path, number: int, row: Sequence[str], columns: Sequence[str], modalities: Sequence[str]
) -> CaseFiles:
    cells = dict(zip(columns, row, strict=False))
    given = {column: path.parent / cell for column, cell in cells.items() if cell and column not in ("case", "patient")}
    missing = path.parent / "not_given.nii.gz"
    images = tuple(ImageFile(modality, given.get(modality, missing)) for modality in modalities)
    segmentation = given.get("segmentation")
    problem = _problem(cells, {name: given.get(name) for name in modalities} | (
        {} if segmentation is None else {"segmentation": segmentation}), len(row) - len(columns))
    name = cells.get("case", "")
    return CaseFiles(
        f"row_{number}" if problem and _bad_name(name) else name, images, segmentation,
        problem and f"{path}, row {number}: {problem}", patient=cells.get("patient") or name)


def _problem(cells: dict[str, str], files: dict[str, Path | None], surplus: int) -> str | None:
    """Describes what is wrong with a row; None if nothing is."""
    if surplus:
        return f"has {abs(surplus)} cell{'s' if abs(surplus) > 1 else ''} {'more' if surplus > 0 else 'less'} than " \
               "row 1; cells with commas need quotes"
    if bad := _bad_name(cells["case"]):
        return f"case {cells['case']!r} {bad}"
    seen: dict[Path, str] = {}
    for column, file in files.items():
        if file is None:
            return f"column {column} is empty"
        if file in seen:
            return f"columns {seen[file]} and {column} name one file, {file}"
        if not file.name.endswith(EXTENSIONS):
            return f"{column} {file}: ends in none of {', '.join(EXTENSIONS)}"
        if reason := "missing" if os.path.isdir(file) else absence(file):
            return f"{column} {file}: {'no such file' if reason == 'missing' else reason}"
        seen[file] = column
    return None


def _bad_name(name: str) -> str | None:
    if not name:
        return "has no name"
    if _FORBIDDEN.search(name) or name[0] == "." or len(name.encode()) > LONGEST:
        return f"cannot be the name of files; use no slashes, no dot in front, and at most {LONGEST} letters"
    return None


def _each_once(path: Path, cases: Sequence[CaseFiles]) -> list[CaseFiles]:
    """The cases, each name once. Rows that share a name become one case with a `problem`."""
    counts = collections.Counter(case.name for case in cases)
    found = {case.name: case for case in reversed(cases)}  # the first of each name
    return [case if counts[name] == 1 else dataclasses.replace(
        case, problem=f"{path}: {counts[name]} rows have the case {name}; give each row a name of its own")
        for name, case in found.items()]
