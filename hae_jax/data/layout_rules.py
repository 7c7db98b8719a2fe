"""One folder's files -> its cases: what tells the layouts apart.

The first of `RULES` that finds a case in a folder decides. `layouts` walks through the folders and asks; nothing is
read here but dataset.json and, to tell 3-D from 4-D, a header.
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

MODALITIES = ("flair", "t1", "t1ce", "t2")  # also the order of a 4-D file that comes without dataset.json

SYNONYMS = {"flair": ("flair", "t2f"), "t1": ("t1", "t1w", "t1n"),
            "t1ce": ("t1ce", "t1c", "t1gd", "t1gad", "ce-gadolinium_t1w", "ce-gad_t1w", "ce-gd_t1w"),
            "t2": ("t2", "t2w")}
_BRATS_2023 = {"flair": "t2f", "t1": "t1n", "t1ce": "t1c", "t2": "t2w"}
SEGMENTATIONS = ("seg", "label-l_desc-t1lesion_mask", "consensus_gt", "lesion_mask", "lesion", "label", "labels",
                  "mask")  # the first that is there is taken
BRAIN_OR_LESION = ("label", "labels", "mask")  # taken only with an image's name: they may as well be the brain's

_MODALITY_OF = {word: modality for modality, words in SYNONYMS.items() for word in words}
_CHANNEL_OF = {re.sub("[^a-z0-9]", "", word): modality for word, modality in _MODALITY_OF.items()}
_AMBIGUOUS = ("seg", *BRAIN_OR_LESION)
_OF_LESIONS = re.compile("gliom|infarct|lesion|stroke|tumou?r|wmh", re.IGNORECASE)  # then whatever else the name says
# Lazy, so that the longest ending wins: the lesion mask of ATLAS is not the "_mask" of something else.
_NAME = re.compile(rf"(?:(?P<case>.*?)(?P<dash>[_-]))?(?P<word>{'|'.join((*_MODALITY_OF, *SEGMENTATIONS))})",
                   re.IGNORECASE)
_ASSUMED = f"no dataset.json says what the file's volumes are; taken as {', '.join(MODALITIES)}, in this order"
_BIDS_SUBJECT = re.compile("sub-[^_]+")
_NUMBERED = re.compile(r"(?P<case>.+)_(?P<channel>\d{4})")
# What may follow a patient's name in the name of another case, rather than tell that an image is made from another.
_VISIT = re.compile(r"[a-z]|.*\d.*|baseline|follow-?up|initial|last|post|pre|prior|visit", re.IGNORECASE)
_GENERIC = re.compile(r"anat|data|images?|inputs?|mri?|nii|nifti|raw|scans?|ses(sion)?[-_]?\d*|volumes?", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class ImageFile:
    """One channel of a case: a 3-D file, or one volume of a 4-D file."""

    modality: str
    path: Path  # that of a missing file is the one that it should have
    volume: int | None = None  # position along the fourth axis; None: the file is 3-D
    volumes: int = 1  # that the file must have


@dataclasses.dataclass(frozen=True)
class CaseFiles:
    """Where a case lies. Nothing is read yet: files may be missing or broken, which `read_case` reports."""

    name: str
    images: tuple[ImageFile, ...]  # in the order of the wanted modalities
    segmentation: Path | None
    problem: str | None = None  # why it cannot be used, if that is known from the names alone
    warnings: tuple[CaseWarning, ...] = ()  # what was assumed about its files, one line each
    patient: str | None = None  # whose it is, where a table of cases says so; None: as its name tells

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
    """A file whose name ends in a word that we know."""

    path: Path
    case: str  # what comes before the word
    dash: str  # between them
    kind: str  # a modality, or one of SEGMENTATIONS


@dataclasses.dataclass(frozen=True)
class Folder:
    """One folder's NIfTI files."""

    path: Path
    files: dict[str, Path]  # by name without extension
    top: bool  # whether it is the folder that was asked for

    @property
    def absolute(self) -> Path:
        """Its path as it was asked for: what links lead to may be called anything."""
        return Path(os.path.abspath(self.path))

    @property
    def name(self) -> str:
        """Its own name, also where it was asked for as "."."""
        return self.absolute.name

    def named(self) -> list[_Named]:
        """Its files that say by their name what they are."""
        found = [(path, _NAME.fullmatch(stem)) for stem, path in self.files.items()]
        return [_Named(path, match["case"] or "", match["dash"] or "",
                       _MODALITY_OF.get(match["word"].lower(), match["word"].lower()))
                for path, match in found if match is not None]

    def numbered(self) -> dict[str, dict[int, Path]]:
        """Its files whose names end in four digits: what comes before -> number -> file."""
        found: dict[str, dict[int, Path]] = collections.defaultdict(dict)
        for stem, path in self.files.items():
            if match := _NUMBERED.fullmatch(stem):
                found[match["case"]][int(match["channel"])] = path
        return found


def _by_name(folder: Folder, modalities: Sequence[str]) -> list[CaseFiles]:
    """Files that say in their name what they are: BraTS, ATLAS and BIDS, MSLUB.

    A folder is one case if it says so by its name or has no modality twice; else its cases lie side by side. One case
    is called like its folder, whatever lies beside it; where folders are called "scan" and the like, or "anat" as in a
    BIDS tree, like what its images' names have in common.
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
    """One case, called `prefix` as its files are."""
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
    """The file of a kind that begins with `prefix`, else the only one of the kind; None where it would be a guess."""
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
    """nnU-Net: <case>_0000, <case>_0001, ...; dataset.json says which number is which modality."""
    numbers = folder.numbered()
    if not any(0 in channels for channels in numbers.values()):  # then the digits count patients
        return []
    channels = _read_channels(folder)
    if channels is not None and max(k for files in numbers.values() for k in files) >= len(channels.names):
        return []  # patients again, from 0000 on
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
    """One file per case: all channels in 4-D as in the Decathlon, or the only channel."""
    named = {file.path for file in folder.named()}
    images = {stem: path for stem, path in folder.files.items() if path not in named}
    if not folder.top and not folder.name.startswith("images"):  # deeper, a file must say that it is a case
        images = {stem: path for stem, path in images.items() if stem == folder.name}
    if not images:
        return []
    described = _read_channels(folder)
    if described is None:  # else the data set says that all are cases
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
    """Whether an image is made from one beside it: p1_brain from p1, but patient_1_2 is a visit, not a derivative."""
    dashes = [k for k, letter in enumerate(name) if letter == "_"]
    return any(name[:k] in others and not _VISIT.fullmatch(name[k + 1:]) for k in dashes)


RULES = (_by_name, _by_number, _by_case)  # each: (folder, wanted modalities) -> its cases, or none


def _label(folder: Folder, name: str) -> Path | None:
    """The segmentation of nnU-Net and the Decathlon (imagesTr -> labelsTr), or one beside the image."""
    if folder.name.startswith("images"):
        labels = folder.absolute.with_name(folder.name.replace("images", "labels", 1))
        if labels.is_symlink() and (reason := absence(labels)):  # not to be taken for a case without a lesion
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
    """The channels of a data set in order, and the dataset.json that names them, if there is one."""

    source: Path | None
    names: Sequence[str]

    def positions(self, modalities: Sequence[str]) -> dict[str, int]:
        """Where each modality is.

        Raises:
          UserError: one is not there, or there twice.
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
    except OSError:  # the folder above is closed, which is not what was asked for
        return False


def _read_channels(folder: Folder) -> _Channels | None:
    """What dataset.json in a folder or the one above it says about the channels; None without such a file."""
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
