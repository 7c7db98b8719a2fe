"""The search for cases in a folder: the first step of the data flow, before any voxel is read.

The folder layout is recognised automatically. Each folder below the given one is examined separately, with the first
rule of `layout_rules.RULES` that finds a case in it. docs/data.md shows the folder trees.
"""

import collections
import dataclasses
import os
import re
import stat
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from hae_jax.data.case_table import LONGEST, read_table
from hae_jax.data.layout_rules import (
    BRAIN_OR_LESION,
    MODALITIES,
    RULES,
    SEGMENTATIONS,
    SYNONYMS,
    CaseFiles,
    Folder,
    ImageFile,
)
from hae_jax.data.nifti import EXTENSIONS, stem
from hae_jax.data.presence import absence, real_name
from hae_jax.errors import UserError

__all__ = ["LAYOUTS", "MODALITIES", "SYNONYMS", "CaseFiles", "ImageFile", "check_modalities", "find_cases",
           "images_in"]

LAYOUTS = (  # title and example, for help texts and errors
    ("BraTS 2021", "<case>/<case>_flair.nii.gz, _t1, _t1ce, _t2, _seg"),
    ("BraTS 2023 and later", "<case>/<case>-t2f.nii.gz, -t1n, -t1c, -t2w, -seg"),
    ("Medical Segmentation Decathlon", "dataset.json, imagesTr/<case>.nii.gz (4-D), labelsTr/<case>.nii.gz"),
    ("nnU-Net", "dataset.json, imagesTr/<case>_0000.nii.gz, ..., labelsTr/<case>.nii.gz"),
    ("ATLAS v2.0 and other BIDS trees", "sub-.../anat/sub-..._T1w.nii.gz, ..._label-L_desc-T1lesion_mask.nii.gz"),
    ("one volume per case", "<case>.nii.gz or <case>/<case>.nii.gz, <case>_seg.nii.gz (or _lesion, _label, _mask)"),
)
_RESULTS = ("cases.csv", "records")  # a folder with both holds results of translate.py
_NO_IMAGES = ("mask", "seg", "label", "labels")  # endings of files that are derived from images
_FILE = re.compile(r"\.[a-z]\w{0,5}", re.IGNORECASE)  # the extension of a file; a name without one may be a folder
_CONTROLS = re.compile(r"[\0-\x1f\x7f]")
_OF_THE_SYSTEM = ("lost+found", "System Volume Information", "$RECYCLE.BIN")  # unreadable, without cases
_SHOWN = 3  # names in a message


def find_cases(folder: str | os.PathLike, modalities: Sequence[str] = MODALITIES) -> list[CaseFiles]:
    """Lists the cases in `folder` and the folders below it, sorted by name.

    Cases that share a name become one case with a `problem`. A case with a file that exists twice (.nii and .nii.gz)
    has a `problem` as well. A folder that cannot be listed (no permission, or a dead link), or whose cases cannot be
    distinguished, becomes a case with a `problem`, named after its path. NIfTI files that belong to no case are named
    in a warning on stderr.

    Args:
      folder: a dataset in any of `LAYOUTS`, a single case's folder, one file of a case, or a table of cases (.csv,
        `case_table`). Hidden files and the results of translate.py are ignored.
      modalities: the wanted channels, in their order. Other channels of a case are ignored.

    Raises:
      UserError: there are no cases, the folder holds results of translate.py, or no dataset.json gives the position of
        a modality.
    """
    folder = Path(folder)
    check_modalities(modalities)
    if _holds_results(folder):
        raise UserError(f"{folder}: has results of translate.py, not cases; give the folder of the images")
    if reason := absence(folder):
        reason = "no such folder" if reason == "missing" else reason
        raise UserError(f"{folder}: {reason}; give a folder of cases, one case's folder, or a table of cases (.csv)")
    if folder.suffix.lower() == ".csv":
        return read_table(folder, modalities)
    if folder.is_file():
        return [_case_of(folder, modalities)]
    cases, strays, misspelt, faults = [], [], [], {}
    for path in _folders(folder, faults):
        listing = _listing(path, top=path == folder and not cases)  # templates may lie beside the folders of the cases
        try:
            found = _cases_in(listing, modalities)
        except UserError as error:
            faults[path] = error
            continue
        cases += [_without_twins(case) for case in found]
        strays += _strays(listing, found, modalities)
        misspelt += _misspelt(path)
    passed_over = _passed_over(strays, misspelt)
    if not cases:
        raise _all_of(faults) if faults else _no_cases(folder, passed_over)
    if passed_over:
        print(f"warning: {folder}: skips {passed_over} (docs/data.md)", file=sys.stderr)
    cases += [_failed(folder, path, modalities, error) for path, error in faults.items()]
    return sorted(_each_named_once(cases), key=lambda case: case.name)


def check_modalities(modalities: Sequence[str]) -> None:
    """Raises a UserError for modalities that are unknown, repeated or none at all."""
    unknown = [str(modality) for modality in modalities if modality not in MODALITIES]
    if isinstance(modalities, str) or unknown or not modalities or len(set(modalities)) < len(modalities):
        raise UserError(f"modalities {', '.join(map(str, modalities)) or 'are none'}: give one or several of "
                        f"{', '.join(MODALITIES)}, each once")


def images_in(folder: Path) -> str:
    """The first NIfTI files of a folder, in words."""
    try:
        return _few(list(_files(folder))) or "none"
    except OSError:  # it does not exist, or there is no permission to list it
        return "nothing"


def looked_for(case: CaseFiles) -> str:
    """Describes where a case's segmentation was searched, and which files are there."""
    folder = case.folder
    if folder.name.startswith("images"):
        folder = folder.with_name(folder.name.replace("images", "labels", 1))
        names = f"{folder.name}/{case.name}{EXTENSIONS[0]}"
    else:
        names = f"{case.name}_{SEGMENTATIONS[0]}{EXTENSIONS[0]}, or _{', _'.join(SEGMENTATIONS[1:])}"
    try:
        there = [file for file in _files(folder) if file not in case.paths]
    except OSError:
        there = []
    return (f"looked for: {names}; there: {_few(there) or 'no other file'}; rename the file, or list it in a table of "
            "cases (--cases)")


def _all_of(faults: dict[Path, UserError]) -> UserError:
    first, *others = faults.values()
    return UserError(f"{first} (and {len(others)} more places)") if others else first


def _no_cases(folder: Path, passed_over: str) -> UserError:
    known = "; ".join(f"{title}: {example}" for title, example in LAYOUTS)
    return UserError(f"{folder}: no cases found; expected one of: {known}{f' ({passed_over})' if passed_over else ''}")


def _folders(
    top: Path,
    faults: dict[Path, UserError],  # folders that cannot be listed are added to it
) -> Iterator[Path]:
    """Yields the folders below `top`, each real folder once, and `top` itself last.

    Links are followed after all other folders. So a folder that is also the target of a link keeps its own name.
    """
    waiting, links, walked = [top], [], set()
    while waiting or links:
        folder = waiting.pop() if waiting else links.pop(0)
        if folder.resolve() in walked:
            continue
        walked.add(folder.resolve())
        below = _subfolders(folder, faults)
        if below is None or (folder != top and _holds_results(folder)):
            continue
        links += [path for path in below if path.is_symlink()]
        waiting += [path for path in reversed(below) if not path.is_symlink()]
        if folder != top:
            yield folder
    if top not in faults:
        yield top


def _holds_results(folder: Path) -> bool:
    return all(os.path.exists(folder / name) for name in _RESULTS)


def _subfolders(folder: Path, faults: dict[Path, UserError]) -> list[Path] | None:
    """The subfolders that may hold cases; None if the folder cannot be listed."""
    found = []
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        faults[folder] = UserError(f"{folder}: cannot be looked into ({error.strerror}); change its permissions")
        return None
    for path in entries:
        if path.name[0] == "." or path.name in _OF_THE_SYSTEM or not _is_folder(path, faults):
            continue
        if path.name.startswith("labels") and os.path.isdir(folder / path.name.replace("labels", "images", 1)):
            continue
        if path.is_symlink() and folder.resolve().is_relative_to(path.resolve()):  # to a parent
            continue
        found.append(path)
    return found


def _is_folder(path: Path, faults: dict[Path, UserError]) -> bool:
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except OSError:  # a dead link, or no permission; it may be a case, so it must be reported
        if not _FILE.fullmatch(path.suffix):
            faults[path] = UserError(f"{path}: {absence(path)}")
        return False


def _files(folder: Path) -> Iterator[Path]:
    """Yields the NIfTI files of a folder, including those that cannot be read."""
    for entry in sorted(folder.iterdir()):
        path = entry.with_name(real_name(entry.name))
        if path.name[0] != "." and path.name.endswith(EXTENSIONS) and not os.path.isdir(entry):
            yield path


def _misspelt(folder: Path) -> list[Path]:
    """Files with extensions such as .Nii.Gz, which nibabel can read on some systems only."""
    return [file for file in sorted(folder.iterdir()) if file.name[0] != "." and not file.name.endswith(EXTENSIONS)
            and file.name.lower().endswith(EXTENSIONS) and os.path.isfile(file)]


def _listing(path: Path, top: bool) -> Folder:
    return Folder(path, {stem(file): file for file in _files(path)}, top)


def _cases_in(folder: Folder, modalities: Sequence[str]) -> list[CaseFiles]:
    return next((cases for rule in RULES if (cases := rule(folder, modalities))), [])


def _failed(top: Path, folder: Path, modalities: Sequence[str], error: UserError) -> CaseFiles:
    """One case with a `problem`, in place of a folder's cases that cannot be determined. Other folders are used."""
    name = "_".join(folder.relative_to(top).parts) or Folder(folder, {}, top=True).name
    return CaseFiles(name, (ImageFile(modalities[0], folder / f"{modalities[0]}{EXTENSIONS[0]}"),), None, str(error))


def _case_of(file: Path, modalities: Sequence[str]) -> CaseFiles:
    """The case that a single file belongs to. If two files differ only in their extension, the given one is used."""
    try:
        folder = _listing(file.parent, top=True)
    except OSError as error:
        raise UserError(f"{file.parent}: cannot be listed ({error.strerror}); change its permissions") from error
    if file.name.endswith(EXTENSIONS):
        folder.files[stem(file)] = file
    # If the user gives p1_brain, it is used although p1 lies beside it.
    chosen = {name: path for name, path in folder.files.items() if not stem(file).startswith(f"{name}_")}
    for listing in (folder, dataclasses.replace(folder, files=chosen)):
        for rule in RULES:
            for case in rule(listing, modalities):
                if file in case.paths:
                    return _without_twins(case, chosen=file)
    raise UserError(f"{file}: not a NIfTI image of {', '.join(modalities)}; give an image or a folder of cases")


def _without_twins(case: CaseFiles, chosen: Path | None = None) -> CaseFiles:
    """The case, with a `problem` if one of its files exists both compressed and uncompressed."""
    for path in case.paths:
        same = _with_its_stem(path)
        if path != chosen and len(same) > 1:
            return dataclasses.replace(case, problem=f"{same[0]} and {same[1].name}: two files with one name; remove "
                                                     "one")
    return case


def _with_its_stem(path: Path) -> list[Path]:
    """The existing files that differ from `path` at most in their extension."""
    there = [file for extension in EXTENSIONS if os.path.lexists(file := path.with_name(stem(path) + extension))]
    # On a case-insensitive disk, one file is found under two names.
    return [file for k, file in enumerate(there) if not any(os.path.samestat(file.lstat(), other.lstat())
                                                            for other in there[:k])]


def _each_named_once(cases: Sequence[CaseFiles]) -> list[CaseFiles]:
    """The cases, each name once. Cases that share a name become one case with a `problem`."""
    found: dict[str, list[CaseFiles]] = collections.defaultdict(list)
    for case in cases:
        found[case.name].append(case)
    return [_encodable(same[0]) if len(same) == 1 else _clash(same) for same in found.values()]


def _encodable(case: CaseFiles) -> CaseFiles:
    """The case, with a `problem` if its name is too long or not one line of text, since results are named after it."""
    if (length := len(os.fsencode(case.name))) > LONGEST:
        shown = os.fsencode(case.name)[:LONGEST // 2].decode(errors="ignore")
        return dataclasses.replace(case, name=shown, problem=f"{shown}...: its name has {length} bytes, and results "
                                                             f"are named after it; rename it, {LONGEST} are allowed")
    if _CONTROLS.search(case.name):
        shown = _CONTROLS.sub("?", case.name)
        return dataclasses.replace(case, name=shown, problem=f"{shown}: its name has a line break or another control "
                                                             "character (here ?); rename its folder or files")
    if case.name == os.fsencode(case.name).decode(errors="replace"):
        return case
    shown = os.fsencode(case.name).decode(errors="backslashreplace")
    encoding = sys.getfilesystemencoding()
    what = "its name is not UTF-8; rename its folder or files" if encoding == "utf-8" else (
        f"its name cannot be read, since the locale here is {encoding}; set PYTHONUTF8=1")
    return dataclasses.replace(case, name=shown, problem=f"{shown}: {what}")


def _clash(cases: Sequence[CaseFiles]) -> CaseFiles:
    paths = [str(case.images[0].path) for case in cases]
    return dataclasses.replace(cases[0], problem=f"{' and '.join(paths[:2])}: {len(cases)} cases with the name "
                                                 f"{cases[0].name}; rename them, or give a folder with one of them")


def _strays(folder: Folder, cases: Sequence[CaseFiles], modalities: Sequence[str]) -> list[Path]:
    """Files that belong to no case and whose names do not show that they accompany one."""
    claimed = {path for case in cases for path in case.paths}
    named, numbered = folder.named(), [set(files.values()) for files in folder.numbered().values()]
    prefixes = {file.case for file in named if file.path in claimed}
    known = claimed | {file.path for file in named if file.kind not in modalities
                       and (file.case in prefixes or file.kind in (*MODALITIES, *BRAIN_OR_LESION))}
    for channels in numbered:
        if channels & claimed:  # of one case, to which the unwanted channels belong as well
            known |= channels
    telling = {file.path for file in named}.union(*numbered)
    names = {case.name for case in cases}
    beginnings = tuple(f"{name}{dash}".lower() for name in prefixes | names if name for dash in "_-.")
    derived = {path for name, path in folder.files.items() if path not in telling
               and (name.lower().startswith(beginnings) or name.lower().endswith(_NO_IMAGES))}
    if folder.name not in names and any(stem(case.images[0].path) == case.name for case in cases):
        derived = set()  # each file is one patient here, so a file that was taken for a derivative must be reported
    return [path for path in folder.files.values() if path not in known | derived]


def _passed_over(strays: Sequence[Path], misspelt: Sequence[Path]) -> str:
    """Describes the files that belong to no case or are not read; empty if there are none."""
    parts = [(strays, "NIfTI file", "in no known layout"),
             (misspelt, "file", "to rename, since only .nii.gz, .nii, .NII.GZ and .NII are read")]
    return "; ".join(f"{len(paths)} {noun}{'s' if len(paths) > 1 else ''} {why}: {_few(paths)}"
                     for paths, noun, why in parts if paths)


def _few(paths: Sequence[Path]) -> str:
    more = f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
    return ", ".join(_CONTROLS.sub("?", path.name) for path in paths[:_SHOWN]) + more
