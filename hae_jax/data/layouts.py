"""Where the cases lie: every folder layout that the program reads, found without being told which.

The first step of the data flow, before any voxel is read. Each folder below the given one is looked at by itself, and
the first of `_RULES` that finds a case in it decides; docs/data.md shows the folder trees.
"""

import collections
import dataclasses
import itertools
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import nibabel as nib
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from hae_jax.errors import UserError

MODALITIES = ("flair", "t1", "t1ce", "t2")  # also the order of a 4-D file that comes without dataset.json
EXTENSIONS = (".nii.gz", ".nii")
UNREADABLE = (OSError, EOFError, ValueError, TypeError, zlib.error, ImageFileError, HeaderDataError)

LAYOUTS = (  # title, example; for help texts and errors
    ("BraTS 2021", "<case>/<case>_flair.nii.gz, _t1, _t1ce, _t2, _seg"),
    ("BraTS 2023 and later", "<case>/<case>-t2f.nii.gz, -t1n, -t1c, -t2w, -seg"),
    ("Medical Segmentation Decathlon", "dataset.json, imagesTr/<case>.nii.gz (4-D), labelsTr/<case>.nii.gz"),
    ("nnU-Net", "dataset.json, imagesTr/<case>_0000.nii.gz, ..., labelsTr/<case>.nii.gz"),
    ("ATLAS v2.0 and other BIDS trees", "sub-.../anat/sub-..._T1w.nii.gz, ..._label-L_desc-T1lesion_mask.nii.gz"),
    ("one volume per case", "<case>.nii.gz or <case>/<case>.nii.gz, <case>_seg.nii.gz or <case>_mask.nii.gz"),
)

SYNONYMS = {"flair": ("flair", "t2f"), "t1": ("t1", "t1w", "t1n"), "t1ce": ("t1ce", "t1c", "t1gd", "t1gad"),
            "t2": ("t2", "t2w")}
_BRATS_2023 = {"flair": "t2f", "t1": "t1n", "t1ce": "t1c", "t2": "t2w"}
_SEGMENTATIONS = ("seg", "label-l_desc-t1lesion_mask", "consensus_gt", "mask")  # the first that is there is taken
_BRAIN_OR_LESION = "mask"  # taken only with exactly the image's name: it may as well be the brain's

_MODALITY_OF = {word: modality for modality, words in SYNONYMS.items() for word in words}
# Lazy, so that the longest ending wins: the lesion mask of ATLAS is not the "_mask" of something else.
_NAME = re.compile(rf"(?:(?P<case>.*?)(?P<dash>[_-]))?(?P<word>{'|'.join((*_MODALITY_OF, *_SEGMENTATIONS))})",
                   re.IGNORECASE)
_BIDS_SUBJECT = re.compile("sub-[^_]+")
_NUMBERED = re.compile(r"(?P<case>.+)_(?P<channel>\d{4})")
_RESULTS = ("cases.csv", "records")  # a folder with both holds what translate.py wrote


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
    kind: str  # a modality, or one of _SEGMENTATIONS


@dataclasses.dataclass(frozen=True)
class _Folder:
    """One folder's NIfTI files."""

    path: Path
    files: dict[str, Path]  # by name without extension
    top: bool  # whether it is the folder that was asked for

    @property
    def name(self) -> str:
        return self.path.resolve().name

    def named(self) -> list[_Named]:
        found = [(path, _NAME.fullmatch(stem)) for stem, path in self.files.items()]
        return [_Named(path, match["case"] or "", match["dash"] or "",
                       _MODALITY_OF.get(match["word"].lower(), match["word"].lower()))
                for path, match in found if match is not None]


def find_cases(folder: str | Path, modalities: Sequence[str] = MODALITIES) -> list[CaseFiles]:
    """Lists the cases in `folder` and the folders below it, sorted by name.

    Args:
      folder: a data set in any of `LAYOUTS`, a single case's folder, or one file of a case. Hidden files and the
        results of translate.py are passed over.
      modalities: the channels wanted, in their order. Others that a case may have are ignored.

    Raises:
      UserError: no case is there, two have the same name, or dataset.json does not tell where a modality is.
    """
    folder = Path(folder)
    check_modalities(modalities)
    if folder.is_file():
        return [_case_of(folder, modalities)]
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give a folder of cases, or one case's folder")
    cases: dict[str, CaseFiles] = {}
    for path in _folders(folder):
        for case in _cases_in(_listing(path, top=path == folder), modalities):
            if case.name in cases:
                raise UserError(f"{case.images[0].path} and {cases[case.name].images[0].path}: two cases with the name "
                                f"{case.name}; rename one, or give a folder with one of them")
            cases[case.name] = case
    if not cases:
        known = "; ".join(f"{title}: {example}" for title, example in LAYOUTS)
        raise UserError(f"{folder}: no cases found; expected one of: {known}")
    return [cases[name] for name in sorted(cases)]


def check_modalities(modalities: Sequence[str]) -> None:
    """Raises a UserError for modalities that are unknown, repeated or none at all."""
    unknown = [str(modality) for modality in modalities if modality not in MODALITIES]
    if isinstance(modalities, str) or unknown or not modalities or len(set(modalities)) < len(modalities):
        raise UserError(f"modalities {', '.join(map(str, modalities)) or 'are none'}: give one or several of "
                        f"{', '.join(MODALITIES)}, each once")


def _folders(folder: Path) -> Iterator[Path]:
    yield folder
    for path in sorted(folder.iterdir()):
        if path.name[0] == "." or not path.is_dir() or all((path / name).exists() for name in _RESULTS):
            continue
        if path.name.startswith("labels") and (folder / path.name.replace("labels", "images", 1)).is_dir():
            continue
        if path.is_symlink() and folder.resolve().is_relative_to(path.resolve()):  # a link upwards: endless
            continue
        yield from _folders(path)


def _listing(path: Path, top: bool) -> _Folder:
    files: dict[str, Path] = {}
    for file in sorted(path.iterdir()):
        if file.name[0] != "." and file.name.endswith(EXTENSIONS) and file.is_file():
            stem = _stem(file)
            if stem in files:
                raise UserError(f"{file} and {files[stem].name}: two files with one name; remove one")
            files[stem] = file
    return _Folder(path, files, top)


def _cases_in(folder: _Folder, modalities: Sequence[str]) -> list[CaseFiles]:
    return next((cases for rule in _RULES if (cases := rule(folder, modalities))), [])


def _case_of(file: Path, modalities: Sequence[str]) -> CaseFiles:
    """The case that a single file belongs to."""
    folder = _listing(file.parent, top=True)
    for rule in _RULES:
        for case in rule(folder, modalities):
            if file in case.paths:
                return case
    raise UserError(f"{file}: not a NIfTI image of {', '.join(modalities)}; give an image or a folder of cases")


def _by_name(folder: _Folder, modalities: Sequence[str]) -> list[CaseFiles]:
    """Files that say in their name what they are: BraTS, ATLAS and BIDS, MSLUB.

    A folder is one case if it says so by its name or has no modality twice; else its cases lie side by side.
    """
    named = folder.named()
    images = [file for file in named if file.kind in MODALITIES]
    if not images:
        return []
    prefixes = sorted({file.case for file in images})
    subjects = {_BIDS_SUBJECT.match(prefix)[0] for prefix in prefixes if _BIDS_SUBJECT.match(prefix)}
    twice = max(collections.Counter(file.kind for file in images).values()) > 1
    if folder.name not in prefixes and (twice or len(subjects) > 1):
        return [_named_case(folder, prefix or folder.name, [file for file in named if file.case == prefix], modalities)
                for prefix in prefixes]
    if not subjects:
        return [_named_case(folder, folder.name, named, modalities)]
    # In a BIDS tree the folder is only called "anat": the name is what the files have in common.
    parts = zip(*(prefix.split("_") for prefix in prefixes), strict=False)
    shared = [part[0] for part in itertools.takewhile(lambda part: len(set(part)) == 1, parts)]
    return [_named_case(folder, "_".join(shared) or folder.name, named, modalities)]


def _named_case(folder: _Folder, name: str, files: list[_Named], modalities: Sequence[str]) -> CaseFiles:
    images = []
    for modality in modalities:
        file = _choose(files, name, modality)
        if file is None:
            dash = "-" if any(other.dash == "-" for other in files) else "_"
            word = _BRATS_2023[modality] if dash == "-" else modality
            images.append(ImageFile(modality, folder.path / f"{name}{dash}{word}{EXTENSIONS[0]}"))
        else:
            images.append(ImageFile(modality, file.path))
    return CaseFiles(name, tuple(images), _segmentation(files, name))


def _choose(files: list[_Named], name: str, kind: str) -> _Named | None:
    """The file of a kind that has the case's name, else the only one of the kind; None where it would be a guess."""
    of_kind = [file for file in files if file.kind == kind]
    exact = [file for file in of_kind if file.case.lower() == name.lower()]
    candidates = exact or of_kind
    return candidates[0] if len(candidates) == 1 else None


def _segmentation(files: list[_Named], name: str) -> Path | None:
    for kind in _SEGMENTATIONS:
        file = _choose(files, name, kind)
        images = {other.case for other in files if other.kind in MODALITIES} | {name}
        if file is not None and (kind != _BRAIN_OR_LESION or file.case in images):
            return file.path
    return None


def _by_number(folder: _Folder, modalities: Sequence[str]) -> list[CaseFiles]:
    """nnU-Net: <case>_0000, <case>_0001, ...; dataset.json says which number is which modality."""
    numbers: dict[str, dict[int, Path]] = collections.defaultdict(dict)
    for stem, path in folder.files.items():
        if match := _NUMBERED.fullmatch(stem):
            numbers[match["case"]][int(match["channel"])] = path
    if not any(0 in channels for channels in numbers.values()):  # then the digits count patients
        return []
    channels = _read_channels(folder.path)
    if channels is None:
        if len(modalities) > 1 or any(files.keys() != {0} for files in numbers.values()):
            raise UserError(f"{folder.path}: files numbered as for nnU-Net (_0000, _0001, ...) need a dataset.json "
                            'beside or above them that says what they are; add one with "channel_names"')
        channels = _Channels(None, modalities)
    position = channels.positions(modalities)
    return [CaseFiles(name, tuple(ImageFile(m, files.get(k, folder.path / f"{name}_{k:04d}{EXTENSIONS[0]}"))
                                  for m, k in position.items()), _label(folder, name))
            for name, files in sorted(numbers.items())]


def _by_case(folder: _Folder, modalities: Sequence[str]) -> list[CaseFiles]:
    """One file per case: all channels in 4-D as in the Decathlon, or the only channel."""
    named = {file.path for file in folder.named()}
    images = {stem: path for stem, path in folder.files.items() if path not in named}
    if not folder.top and not folder.name.startswith("images"):  # deeper, a file must say that it is a case
        images = {stem: path for stem, path in images.items() if stem == folder.name}
    if not images:
        return []
    described = _read_channels(folder.path)
    channels = described or _Channels(None, MODALITIES)
    count, position = len(channels.names), channels.positions(modalities)
    cases = []
    for name, path in images.items():
        if count == 1 or (described is None and len(modalities) == 1 and not _is_4d(path)):
            files = (ImageFile(modalities[0], path),)
        else:
            files = tuple(ImageFile(modality, path, k, count) for modality, k in position.items())
        cases.append(CaseFiles(name, files, _label(folder, name)))
    return cases


_RULES = (_by_name, _by_number, _by_case)


def _label(folder: _Folder, name: str) -> Path | None:
    """The segmentation of nnU-Net and the Decathlon (imagesTr -> labelsTr), or one beside the image."""
    if folder.name.startswith("images"):
        labels = folder.path.resolve().with_name(folder.name.replace("images", "labels", 1))
        for extension in EXTENSIONS:
            if (labels / (name + extension)).is_file():
                return labels / (name + extension)
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
        known = [_MODALITY_OF.get(re.sub("[^a-z0-9]", "", name.lower())) for name in self.names]
        for modality in modalities:
            if known.count(modality) != 1:
                raise UserError(f"{self.source}: {known.count(modality) or 'no'} channels are {modality}, one is "
                                f"needed; its channels are {', '.join(self.names)}, names for {modality} are "
                                f"{', '.join(SYNONYMS[modality])}")
        return {modality: known.index(modality) for modality in modalities}


def _read_channels(folder: Path) -> _Channels | None:
    """What dataset.json in a folder or the one above it says about the channels; None without such a file."""
    path = next((path for path in (folder / "dataset.json", folder.resolve().parent / "dataset.json")
                 if path.is_file()), None)
    if path is None:
        return None
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        names = {int(k): str(name) for k, name in (facts.get("channel_names") or facts["modality"]).items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f'{path}: no channel names can be read; give "channel_names": {{"0": "FLAIR", "1": "T1w", '
                        "...}, or \"modality\" likewise") from error
    if sorted(names) != list(range(len(names))):
        raise UserError(f"{path}: its channels are numbered {', '.join(map(str, sorted(names)))}; count from 0")
    return _Channels(path, [names[k] for k in range(len(names))])


def _is_4d(path: Path) -> bool:
    try:
        shape = nib.load(path).shape
    except UNREADABLE:  # reported when the case is read
        return False
    return len(shape) > 3 and shape[3] > 1


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".nii")
