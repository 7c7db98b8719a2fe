"""Rules that recognise the layout of one folder and group its files into cases.

The first rule of `RULES` that finds a case in a folder is used. `layouts` walks through the folders and applies the
rules. Only dataset.json is read here, and a header where a 3-D file must be distinguished from a 4-D file.
"""

import collections
import dataclasses
import itertools
import os
import re
from collections.abc import Container, Sequence
from pathlib import Path

from hae_jax.data.case_warning import CaseWarning
from hae_jax.data.nifti import EXTENSIONS, is_4d
from hae_jax.data.presence import absence, is_there
from hae_jax.errors import UserError
from hae_jax.files import read_json

MODALITIES = ("flair", "t1", "t1ce", "t2")  # also the assumed order in a 4-D file without dataset.json

SYNONYMS = {"flair": ("flair", "t2f"), "t1": ("t1", "t1w", "t1n"),
            "t1ce": ("t1ce", "t1c", "t1gd", "t1gad", "ce-gadolinium_t1w", "ce-gad_t1w", "ce-gd_t1w"),
            "t2": ("t2", "t2w")}
_BRATS_2023 = {"flair": "t2f", "t1": "t1n", "t1ce": "t1c", "t2": "t2w"}
SEGMENTATIONS = ("seg", "label-l_desc-t1lesion_mask", "consensus_gt", "lesion_mask", "lesion", "label", "labels",
                  "mask")  # the first one found is used
BRAIN_OR_LESION = ("label", "labels", "mask")  # used only with an image's name, since such a file may be a brain mask

_MODALITY_OF = {word: modality for modality, words in SYNONYMS.items() for word in words}
_CHANNEL_OF = {re.sub("[^a-z0-9]", "", word): modality for word, modality in _MODALITY_OF.items()}
_AMBIGUOUS = ("seg", *BRAIN_OR_LESION)
# A segmentation with such a word in its name is a lesion mask.
_OF_LESIONS = re.compile("gliom|infarct|lesion|stroke|tumou?r|wmh", re.IGNORECASE)
# The case matches lazily, so that the longest ending is found: "label-L_desc-T1lesion_mask" (ATLAS), not "mask".
_NAME = re.compile(rf"(?:(?P<case>.*?)(?P<dash>[_-]))?(?P<word>{'|'.join((*_MODALITY_OF, *SEGMENTATIONS))})",
                   re.IGNORECASE)
_ASSUMED = f"no dataset.json says what the file's volumes are; taken as {', '.join(MODALITIES)}, in this order"
_BIDS_SUBJECT = re.compile("sub-[^_]+")
_NUMBERED = re.compile(r"(?P<case>.+)_(?P<channel>\d{4})")
# A suffix that marks another visit of a patient. Any other suffix marks an image that was derived from another one.
_VISIT = re.compile(r"[a-z]|.*\d.*|baseline|follow-?up|initial|last|post|pre|prior|visit", re.IGNORECASE)
_GENERIC = re.compile(r"anat|data|images?|inputs?|mri?|nii|nifti|raw|scans?|ses(sion)?[-_]?\d*|volumes?", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class ImageFile:
    """One channel of a case: a 3-D file, or one volume of a 4-D file."""

    modality: str
    path: Path  # for a missing file, the expected path
    volume: int | None = None  # position along the fourth axis; None: the file is 3-D
    volumes: int = 1  # number of volumes that the file must have


@dataclasses.dataclass(frozen=True)
class CaseFiles:
    """The files of a case. They have not been read yet; `read_case` reports missing or broken files."""

    name: str
    images: tuple[ImageFile, ...]  # in the order of the wanted modalities
    segmentation: Path | None
    problem: str | None = None  # why the case cannot be used, if the names alone tell
    warnings: tuple[CaseWarning, ...] = ()  # assumptions about its files, one line each
    patient: str | None = None  # the patient, if a table of cases gives one; None: derived from the case's name

    @property
    def paths(self) -> tuple[Path, ...]:
        """All files of the case, each once, the segmentation last; some may be missing."""
        paths = [image.path for image in self.images]
        return tuple(dict.fromkeys(paths if self.segmentation is None else [*paths, self.segmentation]))

    @property
    def folder(self) -> Path:
        """The folder that the images are in; other cases may share it."""
        return self.images[0].path.parent


@dataclasses.dataclass(frozen=True)
class _Named:
    """A file whose name ends in a known word."""

    path: Path
    case: str  # the part before the word
    dash: str  # the separator between both, "_", "-" or empty
    kind: str  # a modality, or one of SEGMENTATIONS


@dataclasses.dataclass(frozen=True)
class Folder:
    """One folder's NIfTI files."""

    path: Path
    files: dict[str, Path]  # by name without extension
    top: bool  # whether it is the folder that the user gave

    @property
    def absolute(self) -> Path:
        """Its absolute path. Links are not resolved, since their targets may have unrelated names."""
        return Path(os.path.abspath(self.path))

    @property
    def name(self) -> str:
        """Its own name, also if the path is "."."""
        return self.absolute.name

    def named(self) -> list[_Named]:
        """Its files whose names end in a known word."""
        found = [(path, _NAME.fullmatch(stem)) for stem, path in self.files.items()]
        return [_Named(path, match["case"] or "", match["dash"] or "",
                       _MODALITY_OF.get(match["word"].lower(), match["word"].lower()))
                for path, match in found if match is not None]

    def numbered(self) -> dict[str, dict[int, Path]]:
        """Its files whose names end in four digits, as {part before the digits: {number: file}}."""
        found: dict[str, dict[int, Path]] = collections.defaultdict(dict)
        for stem, path in self.files.items():
            if match := _NUMBERED.fullmatch(stem):
                found[match["case"]][int(match["channel"])] = path
        return found


def _by_name(folder: Folder, modalities: Sequence[str]) -> list[CaseFiles]:
    """Cases of files whose names end in the modality: BraTS, ATLAS and BIDS, MSLUB.

    A folder is one case if its files are named after it, or if no modality occurs twice. Otherwise it holds several
    cases. A single case gets the folder's name. If the folder has a generic name such as "scan", or is part of a BIDS
    tree ("anat"), the case gets the common beginning of its images' names.
    """
    named = folder.named()
    images = [file for file in named if file.kind in MODALITIES]
    if not images:
        return []
    prefixes = sorted({file.case for file in images})
    subjects = {found[0] for prefix in prefixes if (found := _BIDS_SUBJECT.match(prefix))}
    twice = max(collections.Counter(file.kind for file in images).values()) > 1
    if folder.name not in prefixes and (twice or len(subjects) > 1):
        return [_named_case(folder, prefix or folder.name, [file for file in named if file.case == prefix], modalities)
                for prefix in prefixes]
    parts = zip(*(prefix.split("_") for prefix in prefixes), strict=False)
    shared = "_".join(part[0] for part in itertools.takewhile(lambda part: len(set(part)) == 1, parts))
    name = shared if shared and (subjects or _GENERIC.fullmatch(folder.name)) else folder.name
    case = _named_case(folder, name if name in prefixes else shared or name, named, modalities)
    return [dataclasses.replace(case, name=name)]


def _named_case(folder: Folder, prefix: str, files: list[_Named], modalities: Sequence[str]) -> CaseFiles:
    """One case with the name `prefix`, with which its files' names begin."""
    images = []
    for modality in modalities:
        file = _choose(files, prefix, modality)
        if file is None:
            dash = "-" if any(other.dash == "-" for other in files) else "_"
            word = _BRATS_2023[modality] if dash == "-" else modality
            images.append(ImageFile(modality, folder.path / f"{prefix}{dash}{word}{EXTENSIONS[0]}"))
        else:
            images.append(ImageFile(modality, file.path))
    return CaseFiles(prefix, tuple(images), _segmentation(files, prefix))


def _choose(files: list[_Named], prefix: str, kind: str) -> _Named | None:
    """The file of a kind whose name begins with `prefix`, else the only file of the kind; None if it is ambiguous."""
    of_kind = [file for file in files if file.kind == kind]
    exact = [file for file in of_kind if file.case.lower() == prefix.lower()]
    candidates = exact or of_kind
    return candidates[0] if len(candidates) == 1 else None


def _segmentation(files: list[_Named], name: str) -> Path | None:
    for kind in SEGMENTATIONS:
        file = _choose(files, name, kind)
        images = {other.case for other in files if other.kind in MODALITIES} | {name}
        if file is not None and (kind not in _AMBIGUOUS or file.case in images
                                 or _OF_LESIONS.search(file.case.removeprefix(name))):
            return file.path
    return None


def _by_number(folder: Folder, modalities: Sequence[str]) -> list[CaseFiles]:
    """Cases of nnU-Net: <case>_0000, <case>_0001, ...; dataset.json gives the modality of each number."""
    numbers = folder.numbered()
    if not any(0 in channels for channels in numbers.values()):  # the digits number the patients
        return []
    channels = _read_channels(folder)
    if channels is not None and max(k for files in numbers.values() for k in files) >= len(channels.names):
        return []  # the digits number the patients, from 0000 on
    if channels is None:
        if len(modalities) > 1 or any(files.keys() != {0} for files in numbers.values()):
            raise UserError(f"{folder.path}: files numbered as for nnU-Net (_0000, _0001, ...) need a dataset.json "
                            'beside or above them that says what they are; add one with "channel_names"')
        channels = _Channels(None, modalities)
    position = channels.positions(modalities)
    return [CaseFiles(name, tuple(ImageFile(m, files.get(k, folder.path / f"{name}_{k:04d}{EXTENSIONS[0]}"))
                                  for m, k in position.items()), _label(folder, name))
            for name, files in sorted(numbers.items())]


def _by_case(folder: Folder, modalities: Sequence[str]) -> list[CaseFiles]:
    """Cases of one file: a 4-D file with all channels (Decathlon), or a 3-D file with the only channel."""
    named = {file.path for file in folder.named()}
    images = {stem: path for stem, path in folder.files.items() if path not in named}
    if not folder.top and not folder.name.startswith("images"):  # else only a file named as its folder
        images = {stem: path for stem, path in images.items() if stem == folder.name}
    if not images:
        return []
    described = _read_channels(folder)
    if described is None:  # with a dataset.json, all files are cases
        images = {stem: path for stem, path in images.items() if not _is_derived(stem, folder.files)}
    channels = described or _Channels(None, MODALITIES)
    count, position = len(channels.names), channels.positions(modalities)
    assumed = () if described else (CaseWarning(_ASSUMED),)
    cases = []
    for name, path in images.items():
        if count == 1 or (described is None and len(modalities) == 1 and not is_4d(path)):
            cases.append(CaseFiles(name, (ImageFile(modalities[0], path),), _label(folder, name)))
        else:
            files = tuple(ImageFile(modality, path, k, count) for modality, k in position.items())
            cases.append(CaseFiles(name, files, _label(folder, name), warnings=assumed))
    return cases


def _is_derived(name: str, others: Container[str]) -> bool:
    """Whether an image was derived from one beside it: p1_brain from p1. patient_1_2 is a visit of patient_1."""
    dashes = [k for k, letter in enumerate(name) if letter == "_"]
    return any(name[:k] in others and not _VISIT.fullmatch(name[k + 1:]) for k in dashes)


RULES = (_by_name, _by_number, _by_case)  # each: (folder, wanted modalities) -> its cases, possibly none


def _label(folder: Folder, name: str) -> Path | None:
    """The segmentation in the labels folder (labelsTr for imagesTr, nnU-Net and Decathlon), or beside the image."""
    if folder.name.startswith("images"):
        labels = folder.absolute.with_name(folder.name.replace("images", "labels", 1))
        if labels.is_symlink() and (reason := absence(labels)):  # else the case would lack a segmentation
            raise UserError(f"{labels}: {reason}")
        try:
            there = [file for extension in EXTENSIONS if is_there(file := labels / (name + extension))]
        except OSError as error:
            raise UserError(f"{labels}: cannot be looked into ({error.strerror}); change its permissions") from error
        if there:
            return there[0]
    files = [file for file in folder.named() if folder.name == name or file.case.lower() == name.lower()]
    return _segmentation(files, name)


@dataclasses.dataclass(frozen=True)
class _Channels:
    """The channels of a dataset in order, and the dataset.json that names them, if there is one."""

    source: Path | None
    names: Sequence[str]

    def positions(self, modalities: Sequence[str]) -> dict[str, int]:
        """The position of each modality.

        Raises:
          UserError: a modality is missing or occurs twice.
        """
        known = [_CHANNEL_OF.get(re.sub("[^a-z0-9]", "", name.lower())) for name in self.names]
        for modality in modalities:
            if known.count(modality) != 1:
                raise UserError(f"{self.source}: {known.count(modality) or 'no'} channels are {modality}, one is "
                                f"needed; its channels are {', '.join(self.names)}, wanted are "
                                f"{', '.join(modalities)}; names for {modality} are {', '.join(SYNONYMS[modality])}")
        return {modality: known.index(modality) for modality in modalities}


def _may_be_there(path: Path) -> bool:
    try:
        return is_there(path)
    except OSError:  # no permission for the folder above, which the user did not give
        return False


def _read_channels(folder: Folder) -> _Channels | None:
    """The channels according to dataset.json in the folder or its parent; None without such a file."""
    path = next((path for path in (folder.path / "dataset.json", folder.absolute.parent / "dataset.json")
                 if _may_be_there(path)), None)
    if path is None:
        return None
    if reason := absence(path):
        raise UserError(f"{path}: {reason}")
    facts = read_json(path)
    try:
        names = {int(k): name.strip() for k, name in (facts.get("channel_names") or facts["modality"]).items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f'{path}: names no channels; give "channel_names": {{"0": "FLAIR", "1": "T1w", ...}}, or '
                        '"modality" likewise') from error
    if sorted(names) != list(range(len(names))):
        raise UserError(f"{path}: its channels are numbered {', '.join(map(str, sorted(names)))}; count from 0")
    return _Channels(path, [names[k] for k in range(len(names))])
