"""Export of finished results as BIDS derivatives: the same files under BIDS names, with the JSON files of BIDS.

It follows a run (`translate.py --layout bids`, `hae-bids`) and reads the run's manifest.json and files. Volumes are
linked, or copied if the file system has no hard links. See the BIDS specification, chapter "Derivatives".
"""

import csv
import io
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from hae_jax import __version__
from hae_jax.data.cases import CaseFiles
from hae_jax.data.splits import patient_of
from hae_jax.errors import UserError
from hae_jax.files import decoded, read_content, read_json, write_json, written_whole
from hae_jax.localization.probability import MEANINGS
from hae_jax.pipeline.results_folder import read_manifest
from hae_jax.provenance import RESEARCH_USE
from hae_jax.report.cases import translated_files

RESULTS = Path("sourcedata") / "hae-jax"  # in a folder of derivatives: the results that they come from
GROUP_TABLE = "group_lesions.tsv"
_VERSION = "1.10.0"  # of BIDS
_DESCRIPTION = "dataset_description.json"
_SUFFIXES = {"flair": "FLAIR", "t1": "T1w", "t1ce": "T1w", "t2": "T2w"}
_IGNORED = ("*_anomalymap.*", "*_uncertainty.*", "group_*")  # files without a BIDS suffix
_README = f"""# Lesions found by HAE-JAX

`*_desc-hae_mask.nii.gz` is the lesion mask. `*_desc-hae_probseg.nii.gz` is the probability of a lesion, if it was
saved; the JSON file beside it defines it. `.bidsignore` lists files without a BIDS suffix: the anomaly map and the
uncertainty. `{RESULTS}` holds tables, metrics, pictures, the manifest and the calibration.

{RESEARCH_USE}
"""


class _File(NamedTuple):
    """A derivative: the part of its name after the entities of the case, and the contents of its JSON file."""

    ending: str
    facts: Mapping[str, Any]


def write_derivatives(results: str | Path, output: str | Path) -> list[Path]:
    """Writes the BIDS derivatives of every finished case of a run.

    Args:
      results: folder of the run.
      output: folder of the derivatives, made if absent.

    Returns:
      The masks that were written.

    Raises:
      UserError: there is no manifest.json, or two cases would get the same BIDS name.
    """
    results, output = Path(results), Path(output)
    manifest = read_manifest(results)
    finished = {name: facts for name, facts in manifest["cases"].items() if f"{name}_mask.nii.gz" in facts["files"]}
    stems = _stems(finished)
    raw = {root for name in finished if (root := _bids_root(Path(finished[name]["folder"])))}
    _describe(output, raw, [Path(facts["folder"]) for facts in finished.values()])
    masks = []
    for name, facts in finished.items():
        folder = output / _folder(stems[name])
        wanted, images = dict(_derivatives(name, facts["files"])), _uris(translated_files(results, name), raw)
        common = {"SpatialReference": images[0] if images else "orig", "Sources": images}
        _remove_stale(folder, stems[name], {file.ending for file in wanted.values()})
        for path, file in wanted.items():
            target = folder / f"{stems[name]}{file.ending}.nii.gz"
            _link(results / path, target)
            write_json(_json_of(target), {**file.facts, **common})
            if file.ending.endswith("_mask"):
                masks.append(target)
    return masks


def check_derivatives_folder(output: str | Path, source: str | Path | None) -> None:
    """Refuses folders in which derivatives would mix with raw data.

    Raises:
      UserError: it is the folder of the cases, or a BIDS dataset of raw data.
    """
    path = Path(output) / _DESCRIPTION
    try:
        raw = path.exists() and read_json(path)["DatasetType"] != "derivative"
    except (UserError, KeyError, TypeError):
        raw = True  # the default of BIDS
    if raw or (source is not None and os.path.realpath(output) == os.path.realpath(source)):
        raise UserError(f"{output}: holds raw data; give another folder for the derivatives, such as "
                        f"{Path(output) / 'derivatives' / 'hae'}")


def write_group_table(output: str | Path) -> Path:
    """Gathers the lesion volumes of all runs under a folder of derivatives in one table.

    Raises:
      UserError: no run has finished there.
    """
    output, rows = Path(output), {}
    tables = sorted((output / RESULTS).rglob("cases.csv"), key=lambda path: path.stat().st_mtime)
    for path in tables:  # of two runs of one case, the later one is used
        found = list(csv.DictReader(io.StringIO(decoded(read_content(path)), newline="")))
        if any(None in row or None in row.values() or "case" not in row for row in found):
            raise UserError(f"{path}: is damaged; run the level participant again")
        rows |= {row["case"]: row for row in found}
    if not rows:
        raise UserError(f"{output / RESULTS}: has no finished case; run the level participant first")
    fields = [field for field in next(iter(rows.values())) if field != "case"]
    with written_whole(output / GROUP_TABLE) as temporary, open(temporary, "w", newline="") as stream:
        writer = csv.writer(stream, delimiter="\t", lineterminator="\n")
        writer.writerow(["participant_id", "session_id", "case", *fields])
        for name, row in sorted(rows.items()):
            parts = dict(_entities(name))
            writer.writerow([f"sub-{parts['sub']}", f"ses-{parts['ses']}" if "ses" in parts else "n/a", name,
                             *(row.get(field) or "n/a" for field in fields)])
    return output / GROUP_TABLE


def _entities(name: str) -> Iterator[tuple[str, str]]:
    """Yields the BIDS entities in a case's name, or else its patient and visit, reduced to letters and digits."""
    found = re.findall(r"(?:^|_)([a-z]+)-([A-Za-z0-9+]+)(?=_|$)", name)
    if found and found[0][0] == "sub":
        yield from found
        return
    patient = patient_of(name)
    yield "sub", re.sub(r"[^A-Za-z0-9]", "", patient) or "unnamed"
    if visit := re.sub(r"[^A-Za-z0-9]", "", name[len(patient):]):
        yield "ses", visit


def _stems(cases: Iterable[str]) -> dict[str, str]:
    """The common beginning of the file names of each case. It has `space-orig` if the case's name gives no space.

    The derivatives have entities `label` and `desc` of their own, so those of the case's name are left out.
    """
    stems: dict[str, str] = {}
    for name in cases:
        parts = {key: value for key, value in _entities(name) if key not in ("label", "desc")}
        parts.setdefault("space", "orig")
        stem = "_".join(f"{key}-{value}" for key, value in parts.items())
        if twin := next((other for other, its in stems.items() if its == stem), None):
            raise UserError(f"{name} and {twin}: would both be {stem} in BIDS; rename one of the cases")
        stems[name] = stem
    return stems


def _folder(stem: str) -> Path:
    parts = dict(part.split("-", 1) for part in stem.split("_"))
    return Path(f"sub-{parts['sub']}", *([f"ses-{parts['ses']}"] if "ses" in parts else []), "anat")


def _derivatives(name: str, files: Iterable[str]) -> Iterator[tuple[str, _File]]:
    """Yields each NIfTI file of a case with its BIDS derivative."""
    for file in files:
        if not file.endswith(".nii.gz"):
            continue
        kind = file.removeprefix(f"{name}_").removesuffix(".nii.gz")
        if kind == "mask":
            yield file, _File("_label-L_desc-hae_mask", {
                "Type": "Lesion", "Description": "Voxels that belong to a lesion are 1."})
        elif kind == "probability":
            yield file, _File("_label-L_desc-hae_probseg", {
                "Manual": False, "Description": MEANINGS[kind]})
        elif kind == "uncertainty":
            yield file, _File("_label-L_desc-hae_uncertainty", {"Description": MEANINGS[kind]})
        elif kind == "map":
            yield file, _File("_desc-hae_anomalymap", {
                "Description": "Anomaly map: high where there is a lesion. Its unit depends on the method. It is not a "
                "probability."})
        elif kind.startswith("healthy_"):
            modality = kind.removeprefix("healthy_")
            suffix = _SUFFIXES.get(modality, modality)
            desc = "pseudohealthyce" if modality == "t1ce" else "pseudohealthy"
            yield file, _File(f"_desc-{desc}_{suffix}", {
                "SkullStripped": True, "Description": "Pseudo-healthy reconstruction: the image as predicted "
                "without a lesion."})


def _bids_root(folder: Path) -> Path | None:
    """The root of the BIDS dataset that contains a case; None outside of one."""
    return next((parent for parent in (folder, *folder.parents) if (parent / _DESCRIPTION).is_file()), None)


def _uris(case: CaseFiles | None, raw: Iterable[Path]) -> list[str]:
    """The URIs of the case's images: BIDS URIs, or file URIs outside of a BIDS dataset."""
    found = []
    for image in () if case is None else case.images:
        path = image.path
        root = next((root for root in raw if path.is_relative_to(root)), None)
        found.append(path.as_uri() if root is None else f"bids:{_link_name(root, raw)}:{path.relative_to(root)}")
    return list(dict.fromkeys(found))


def _link_name(root: Path, raw: Iterable[Path]) -> str:
    return f"raw{sorted(raw).index(root) or ''}"


def _describe(output: Path, raw: Iterable[Path], folders: list[Path]) -> None:
    """Writes the general files of a BIDS dataset. Without BIDS datasets in `raw`, `folders` give the source."""
    sources = sorted(raw) or ([Path(os.path.commonpath(folders))] if folders else [])
    links = {_link_name(root, raw): os.path.relpath(root, output.resolve()) for root in sorted(raw)}
    write_json(output / _DESCRIPTION, {
        "Name": "Lesions found by HAE-JAX", "BIDSVersion": _VERSION, "DatasetType": "derivative",
        "GeneratedBy": [{"Name": "HAE-JAX", "Version": __version__, "Description": RESEARCH_USE}],
        "SourceDatasets": [{"URL": root.as_uri()} for root in sources],
        **({"DatasetLinks": links} if links else {})})
    for name, text in (("README.md", _README), (".bidsignore", "".join(f"{line}\n" for line in _IGNORED))):
        with written_whole(output / name) as temporary:
            temporary.write_text(text)


def _remove_stale(folder: Path, stem: str, endings: set[str]) -> None:
    """Removes files of this case that an earlier run with other settings wrote."""
    for path in folder.glob(f"{stem}_*desc-*.nii.gz"):
        if path.name.removeprefix(stem).removesuffix(".nii.gz") not in endings:
            path.unlink()
            _json_of(path).unlink(missing_ok=True)


def _link(source: Path, target: Path) -> None:
    if target.exists() and target.samefile(source):
        return
    with written_whole(target) as temporary:
        temporary.unlink()  # a link cannot replace a file
        try:
            os.link(source, temporary)
        except OSError:  # another disk, or a file system without hard links
            shutil.copyfile(source, temporary)


def _json_of(volume: Path) -> Path:
    return volume.with_name(volume.name.removesuffix(".nii.gz") + ".json")
