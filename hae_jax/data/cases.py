"""Find and read cases on disk: the first stage of the data flow, shared by preparation and translation.

A layout is one row of `LAYOUTS`. What leaves this file is the same for every layout: raw intensities in channel order,
the affine, and a binary lesion mask where there is a segmentation.
"""

import dataclasses
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from hae_jax.errors import UserError

MODALITIES = ("flair", "t1", "t1ce", "t2")
EXTENSIONS = (".nii.gz", ".nii")
AFFINE_TOLERANCE = 1e-3  # mm; what writing an affine as float32 quaternions can lose
_UNREADABLE = (OSError, EOFError, ValueError, TypeError, zlib.error, ImageFileError, HeaderDataError)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Naming of the files in a case folder: a file is `<anything><suffix><extension>`."""

    title: str
    images: dict[str, str]  # modality -> suffix
    segmentation: str


LAYOUTS = (
    Layout("BraTS 2021", {"flair": "_flair", "t1": "_t1", "t1ce": "_t1ce", "t2": "_t2"}, "_seg"),
    Layout("BraTS 2023 and later", {"flair": "-t2f", "t1": "-t1n", "t1ce": "-t1c", "t2": "-t2w"}, "-seg"),
)


@dataclasses.dataclass(frozen=True)
class CaseFiles:
    """Where a case lies. A missing modality keeps the path it should have, so that `read_case` can name it."""

    name: str
    images: tuple[Path, ...]  # in the order of MODALITIES
    segmentation: Path | None


@dataclasses.dataclass(frozen=True)
class Case:
    """A case in memory, on its own grid."""

    name: str
    volumes: np.ndarray  # [X, Y, Z, C] float32, raw intensities
    affine: np.ndarray  # [4, 4] float64, voxel -> mm
    header: nib.Nifti1Header  # of the first channel; results are written with it
    mask: np.ndarray | None  # [X, Y, Z] bool, any lesion label; None without a segmentation


def find_cases(folder: str | Path) -> list[CaseFiles]:
    """Lists the cases in `folder`, sorted by name. `folder` may also be a single case.

    A sub-folder counts as a case as soon as it holds one image of a known layout; its name is the case's name.

    Raises:
      UserError: `folder` does not exist or holds no case.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give a folder of cases, or one case's folder")
    candidates = [folder, *sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")]
    cases = [case for path in candidates if (case := _case_in(path)) is not None]
    if not cases:
        suffixes = " or ".join(f"*{layout.images['flair']}.nii.gz ({layout.title})" for layout in LAYOUTS)
        raise UserError(f"{folder}: no cases found; expected <case>/{suffixes} and the other modalities beside it")
    return sorted(cases, key=lambda case: case.name)


def read_case(files: CaseFiles) -> Case:
    """Reads all of a case and checks that its parts belong together.

    Raises:
      UserError: a file is missing, unreadable, not 3-D, not finite, without a positive voxel, or on another grid than
        the first modality.
    """
    first, affine, header = _read_volume(files.images[0])
    volumes = np.empty((*first.shape, len(files.images)), np.float32)
    for channel, path in enumerate(files.images):
        volume = first if channel == 0 else _read_on_grid(path, first.shape, affine, files.images[0])
        if not (volume > 0).any():
            raise UserError(f"{path}: no voxel is positive; the image is empty, export it again")
        volumes[..., channel] = volume
    mask = None
    if files.segmentation is not None:
        mask = _read_on_grid(files.segmentation, first.shape, affine, files.images[0]) > 0.5
    return Case(files.name, volumes, affine, header, mask)


def _case_in(folder: Path) -> CaseFiles | None:
    name = folder.resolve().name
    files = sorted(path.name for path in folder.iterdir() if path.name.endswith(EXTENSIONS) and path.name[0] != ".")
    for layout in LAYOUTS:
        found = [_with_suffix(files, name, layout.images[modality]) for modality in MODALITIES]
        if any(found):
            images = tuple(folder / (file or name + layout.images[modality] + EXTENSIONS[0])
                           for file, modality in zip(found, MODALITIES, strict=True))
            segmentation = _with_suffix(files, name, layout.segmentation)
            return CaseFiles(name, images, None if segmentation is None else folder / segmentation)
    return None


def _with_suffix(files: list[str], name: str, suffix: str) -> str | None:
    """The file that is named after its folder, else the only one that ends in `suffix`; None if there is a choice."""
    endings = [suffix + extension for extension in EXTENSIONS]
    exact = [name + ending for ending in endings if name + ending in files]
    loose = [file for file in files if file.endswith(tuple(endings))]
    if exact:
        return exact[0]
    return loose[0] if len(loose) == 1 else None


def _read_volume(path: Path) -> tuple[np.ndarray, np.ndarray, nib.Nifti1Header]:
    if not path.is_file():
        raise UserError(f"{path}: missing; every case needs one file each for {', '.join(MODALITIES)}")
    try:
        image = nib.load(path)
        volume = image.get_fdata(dtype=np.float32, caching="unchanged")
    except _UNREADABLE as error:
        raise UserError(f"{path}: cannot be read ({_one_line(error)}); copy or download it again") from error
    if volume.ndim != 3:
        raise UserError(f"{path}: has shape {volume.shape}; expected one 3-D volume per file")
    if not np.isfinite(volume).all():
        raise UserError(f"{path}: holds NaN or infinite voxels; repair or remove the case")
    return volume, image.affine, image.header


def _read_on_grid(path: Path, shape: tuple[int, ...], affine: np.ndarray, reference: Path) -> np.ndarray:
    volume, own_affine, _ = _read_volume(path)
    if volume.shape != shape:
        raise UserError(f"{path}: shape {volume.shape} differs from {shape} of {reference.name}; resample the case")
    if not np.allclose(own_affine, affine, rtol=0, atol=AFFINE_TOLERANCE):
        raise UserError(f"{path}: its affine differs from that of {reference.name}; resample to one grid")
    return volume


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
