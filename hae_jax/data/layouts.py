"""Where the cases lie: every folder layout that the program reads, found without being told which.

The first step of the data flow, before any voxel is read. Each folder below the given one is looked at by itself, and
the first of `layout_rules.RULES` that finds a case in it decides; docs/data.md shows the folder trees.
"""

import collections
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from hae_jax.data.layout_rules import (
    BRAIN_OR_LESION,
    EXTENSIONS,
    MODALITIES,
    RULES,
    SYNONYMS,
    UNREADABLE,
    CaseFiles,
    Folder,
    ImageFile,
    stem,
)
from hae_jax.errors import UserError

__all__ = ["LAYOUTS", "MODALITIES", "SYNONYMS", "UNREADABLE", "CaseFiles", "ImageFile", "check_modalities",
           "find_cases", "images_in"]

LAYOUTS = (  # title, example; for help texts and errors
    ("BraTS 2021", "<case>/<case>_flair.nii.gz, _t1, _t1ce, _t2, _seg"),
    ("BraTS 2023 and later", "<case>/<case>-t2f.nii.gz, -t1n, -t1c, -t2w, -seg"),
    ("Medical Segmentation Decathlon", "dataset.json, imagesTr/<case>.nii.gz (4-D), labelsTr/<case>.nii.gz"),
    ("nnU-Net", "dataset.json, imagesTr/<case>_0000.nii.gz, ..., labelsTr/<case>.nii.gz"),
    ("ATLAS v2.0 and other BIDS trees", "sub-.../anat/sub-..._T1w.nii.gz, ..._label-L_desc-T1lesion_mask.nii.gz"),
    ("one volume per case", "<case>.nii.gz or <case>/<case>.nii.gz, <case>_seg.nii.gz or <case>_mask.nii.gz"),
)
_RESULTS = ("cases.csv", "records")  # a folder with both holds what translate.py wrote
_NO_IMAGES = ("mask", "seg", "label", "labels")  # endings of files that are derived from images
_SHOWN = 3  # names in a message


def find_cases(folder: str | Path, modalities: Sequence[str] = MODALITIES) -> list[CaseFiles]:
    """Lists the cases in `folder` and the folders below it, sorted by name.

    Cases with one name are one case with a `problem`, as is a case with a file that is there twice (.nii and .nii.gz).
    NIfTI files that belong to no case are named in a warning on stderr.

    Args:
      folder: a data set in any of `LAYOUTS`, a single case's folder, or one file of a case. Hidden files and the
        results of translate.py are passed over.
      modalities: the channels wanted, in their order. Others that a case may have are ignored.

    Raises:
      UserError: no case is there, or dataset.json does not tell where a modality is.
    """
    folder = Path(folder)
    check_modalities(modalities)
    if folder.is_file():
        return [_case_of(folder, modalities)]
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give a folder of cases, or one case's folder")
    cases, strays = [], []
    for path in _folders(folder):
        listing = _listing(path, top=path == folder and not cases)  # beside folders of cases lie templates, too
        found = _cases_in(listing, modalities)
        cases += [_without_twins(case) for case in found]
        strays += _strays(listing, found, modalities)
    unclaimed = f"{len(strays)} NIfTI file{'s' if len(strays) > 1 else ''} in no known layout: {_few(strays)}"
    if not cases:
        known = "; ".join(f"{title}: {example}" for title, example in LAYOUTS)
        raise UserError(f"{folder}: no cases found; expected one of: {known}{f' ({unclaimed})' if strays else ''}")
    if strays:
        print(f"warning: {folder}: passes over {unclaimed} (docs/data.md)", file=sys.stderr)
    return sorted(_each_named_once(cases), key=lambda case: case.name)


def check_modalities(modalities: Sequence[str]) -> None:
    """Raises a UserError for modalities that are unknown, repeated or none at all."""
    unknown = [str(modality) for modality in modalities if modality not in MODALITIES]
    if isinstance(modalities, str) or unknown or not modalities or len(set(modalities)) < len(modalities):
        raise UserError(f"modalities {', '.join(map(str, modalities)) or 'are none'}: give one or several of "
                        f"{', '.join(MODALITIES)}, each once")


def images_in(folder: Path) -> str:
    """The first NIfTI files of a folder, in words."""
    return _few(list(_files(folder))) or "none"


def _folders(folder: Path) -> Iterator[Path]:
    """The folders below, and the folder itself last."""
    for path in sorted(folder.iterdir()):
        if path.name[0] == "." or not path.is_dir() or all((path / name).exists() for name in _RESULTS):
            continue
        if path.name.startswith("labels") and (folder / path.name.replace("labels", "images", 1)).is_dir():
            continue
        if path.is_symlink() and folder.resolve().is_relative_to(path.resolve()):  # a link upwards: endless
            continue
        yield from _folders(path)
    yield folder


def _files(folder: Path) -> Iterator[Path]:
    for file in sorted(folder.iterdir()):
        if file.name[0] != "." and file.name.endswith(EXTENSIONS) and file.is_file():
            yield file


def _listing(path: Path, top: bool) -> Folder:
    return Folder(path, {stem(file): file for file in _files(path)}, top)


def _cases_in(folder: Folder, modalities: Sequence[str]) -> list[CaseFiles]:
    return next((cases for rule in RULES if (cases := rule(folder, modalities))), [])


def _case_of(file: Path, modalities: Sequence[str]) -> CaseFiles:
    """The case that a single file belongs to; of two with one name it is the one that was asked for."""
    folder = _listing(file.parent, top=True)
    if file.name.endswith(EXTENSIONS):
        folder.files[stem(file)] = file
    for rule in RULES:
        for case in rule(folder, modalities):
            if file in case.paths:
                return _without_twins(case, chosen=file)
    raise UserError(f"{file}: not a NIfTI image of {', '.join(modalities)}; give an image or a folder of cases")


def _without_twins(case: CaseFiles, chosen: Path | None = None) -> CaseFiles:
    """The case, with a problem if one of its files is there both compressed and not."""
    for path in case.paths:
        both = [path.with_name(stem(path) + extension) for extension in EXTENSIONS]
        if path != chosen and all(file.is_file() for file in both):
            return dataclasses.replace(case, problem=f"{both[0]} and {both[1].name}: two files with one name; remove "
                                                     "one")
    return case


def _each_named_once(cases: Sequence[CaseFiles]) -> list[CaseFiles]:
    """The cases under names that differ; for several with one name, one that says what is wrong."""
    found: dict[str, list[CaseFiles]] = collections.defaultdict(list)
    for case in cases:
        found[case.name].append(case)
    return [same[0] if len(same) == 1 else _clash(same) for same in found.values()]


def _clash(cases: Sequence[CaseFiles]) -> CaseFiles:
    paths = [str(case.images[0].path) for case in cases]
    return dataclasses.replace(cases[0], problem=f"{' and '.join(paths[:2])}: {len(cases)} cases with the name "
                                                 f"{cases[0].name}; rename them, or give a folder with one of them")


def _strays(folder: Folder, cases: Sequence[CaseFiles], modalities: Sequence[str]) -> list[Path]:
    """Files that are no case's and, as far as their names tell, do not belong to one either."""
    claimed = {path for case in cases for path in case.paths}
    named, numbered = folder.named(), [set(files.values()) for files in folder.numbered().values()]
    prefixes = {file.case for file in named if file.path in claimed}
    known = claimed | {file.path for file in named if file.kind not in modalities
                       and (file.case in prefixes or file.kind in (*MODALITIES, BRAIN_OR_LESION))}
    for channels in numbered:
        if channels & claimed:  # of one case; those that are not wanted belong to it
            known |= channels
    telling = {file.path for file in named}.union(*numbered)
    beginnings = tuple(f"{name}{dash}".lower() for name in prefixes | {case.name for case in cases} if name
                       for dash in "_-.")
    derived = {path for name, path in folder.files.items() if path not in telling
               and (name.lower().startswith(beginnings) or name.lower().endswith(_NO_IMAGES))}
    return [path for path in folder.files.values() if path not in known | derived]


def _few(paths: Sequence[Path]) -> str:
    more = f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
    return ", ".join(path.name for path in paths[:_SHOWN]) + more
