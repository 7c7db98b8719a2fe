"""Preparation of a source folder as a dataset, with `cases`, `slices` and `store`, in parallel over cases.

There are two kinds of source: folders of NIfTI cases, and slices that were prepared for the published PyTorch code
(`npy_{train,val,test}/patient_<case>/slice_<k>.npz`). The latter keep their values and their split.
"""

import collections
import dataclasses
import functools
import logging
import os
import struct
import time
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from hae_jax.data.case_warning import CaseWarning
from hae_jax.data.cases import MODALITIES, CaseFiles, find_cases, read_case
from hae_jax.data.layouts import check_modalities, looked_for
from hae_jax.data.lesion_mask import refuse_head_mask
from hae_jax.data.nifti import ORIENTATION
from hae_jax.data.presence import absence, is_there
from hae_jax.data.slices import CaseSlices, case_slices
from hae_jax.data.splits import SPLITS, split_patients
from hae_jax.data.store import MANIFEST, StoreWriter
from hae_jax.errors import UserError
from hae_jax.files import finish_replacing, folder_written_whole
from hae_jax.processes import in_order
from hae_jax.provenance import record

_LOG = logging.getLogger(__name__)
_WITHOUT_LABELS = "imagesTs"  # test cases of the Decathlon and nnU-Net, whose labels are not published
_NPZ_SPLITS = {split: f"npy_{split}" for split in SPLITS}


@dataclasses.dataclass(frozen=True)
class PrepareReport:
    """The result of a preparation."""

    output: Path
    cases: dict[str, int]  # per split
    slices: dict[str, int]
    lesion_slices: dict[str, int]
    skipped: dict[str, str]  # case name -> reason
    seconds: float
    warnings: dict[str, dict[str, str]]  # kind -> name of a case or split -> warning

    def lines(self) -> list[str]:
        """The summary that the command prints."""
        lines = [f"{self.output}: {sum(self.cases.values())} cases in {self.seconds:.0f} s"]
        lines += [f"  {split}: {self.cases[split]} cases, {self.slices[split]} slices, "
                  f"{self.lesion_slices[split]} with lesion" for split in SPLITS]
        lines += [f"warning: {_first(texts)}" for texts in self.warnings.values()]
        lines += [f"skipped {name}: {reason}" for name, reason in self.skipped.items()]
        return lines


def _first(texts: dict[str, str]) -> str:
    """The warning about the first case, and the number of other cases with a warning of this kind."""
    (name, text), *others = texts.items()
    return f"{name}{f' and {len(others)} more' if others else ''}: {text}"


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The cases of each split and the function that reads them. `load` runs in worker processes."""

    layout: str
    settings: dict[str, Any]
    split: dict[str, list[Any]]  # split -> items with a `name`
    load: Callable[[Any], "_Loaded"]


@dataclasses.dataclass(frozen=True)
class _Loaded:
    slices: CaseSlices
    affine: np.ndarray | None
    warnings: tuple[CaseWarning, ...] = ()


@dataclasses.dataclass(frozen=True)
class _NpzCase:
    name: str
    folder: Path
    patient: None = None


def prepare(
    source: str | Path,
    output: str | Path,
    *,
    modalities: Sequence[str] = MODALITIES,
    image_size: int = 128,
    train_fraction: float = 0.75,
    val_fraction: float = 0.05,
    seed: int = 10,
    workers: int = 1,
    overwrite: bool = False,
) -> PrepareReport:
    """Writes the prepared dataset `output` from the cases in `source`.

    A case that cannot be used is skipped and reported, the others are kept. The split is decided before anything is
    read, so a broken case does not move other patients. Memory holds a few cases and one shard, however many cases.

    Args:
      source: folder of NIfTI cases in any of `layouts.LAYOUTS`, a table of cases (.csv, `case_table`), or the parent
        of `npy_train`, `npy_val`, `npy_test`.
      output: folder to make; complete or absent afterwards.
      modalities: the channels, in their order; those of PyTorch slices are taken to be these.
      image_size: side of the square slices, pixels. PyTorch slices must have it already.
      train_fraction: share of patients to train on. This, `val_fraction` and `seed` do not apply to PyTorch slices.
      val_fraction: share of patients to calibrate on; the rest is for testing.
      seed: of the split.
      workers: processes.
      overwrite: replace an existing prepared dataset, once the new one is complete.

    Raises:
      UserError: nothing usable in `source`, `output` exists, or a setting does not fit.
    """
    for name, path in (("--source", source), ("--output", output)):
        if not str(path):
            raise UserError(f"{name} is empty; name a folder")
    source, output = Path(source), Path(output)
    started = time.monotonic()
    if image_size < 1 or workers < 1:
        raise UserError(f"image_size {image_size} and workers {workers}: both must be at least 1")
    check_modalities(modalities)
    if finish_replacing(output):
        _LOG.info("%s: restored; the run that was replacing it was killed", output)
    replaces = _must_replace(output, overwrite)
    if any(is_there(source / folder) for folder in _NPZ_SPLITS.values()):
        plan = _plan_npz(source, modalities, image_size)
    else:
        plan = _plan_nifti(source, modalities, image_size, train_fraction, val_fraction, seed)
    with folder_written_whole(output, replace=replaces) as root:
        manifest, skipped, warnings = _write(root, source, plan, modalities, workers)
    totals = manifest["splits"]
    cases, slices, lesion_slices = (
        {split: totals[split][key] for split in SPLITS} for key in ("cases", "slices", "lesion_slices"))
    return PrepareReport(output, cases, slices, lesion_slices, skipped, time.monotonic() - started, warnings)


def _write(
    root: Path, source: Path, plan: _Plan, modalities: Sequence[str], workers: int
) -> tuple[dict[str, Any], dict[str, str], dict[str, dict[str, str]]]:
    todo = [(split, item) for split in SPLITS for item in sorted(plan.split[split], key=lambda item: item.name)]
    writer, skipped, warnings, added = StoreWriter(root), {}, collections.defaultdict(dict), 0
    loaded = in_order(functools.partial(_attempt, plan.load), [item for _, item in todo], workers)
    for (split, item), result in tqdm(zip(todo, loaded, strict=True), "preparing", len(todo), unit="case"):
        try:
            if isinstance(result, str):
                raise UserError(result)
            writer.add(item.name, split, result.slices, result.affine, item.patient)
            added += 1
            for warning in result.warnings:
                warnings[warning.kind][item.name] = str(warning)
        except UserError as error:
            skipped[item.name] = str(error)
    if not added:
        name, reason = next(iter(skipped.items()))
        raise UserError(f"{source}: none of {len(skipped)} cases can be used; the first, {name}: {reason}")
    for split, warning in _one_class(writer.totals()):
        warnings[warning][split] = warning
    names = {split: [item.name for item in plan.split[split] if item.name not in skipped] for split in SPLITS}
    facts = {"source": str(source.resolve()), "layout": plan.layout, "modalities": list(modalities),
             "settings": plan.settings, "split": names, "skipped": skipped,
             "warnings": _by_name(warnings), "provenance": record()}
    return writer.finish(facts), skipped, dict(warnings)


def _by_name(warnings: dict[str, dict[str, str]]) -> dict[str, list[str]]:
    """Warnings by case or split: name -> its warnings."""
    found = collections.defaultdict(list)
    for texts in warnings.values():
        for name, text in texts.items():
            found[name].append(text)
    return dict(found)


def _one_class(splits: dict[str, dict[str, int]]) -> Iterator[tuple[str, str]]:
    """Yields each split whose slices are all of one class, with a warning."""
    for split in SPLITS:
        slices, lesion = splits[split]["slices"], splits[split]["lesion_slices"]
        if slices and lesion in (0, slices):
            yield split, (f"{'all (100' if lesion else 'none (0'} %) of its slices have a lesion; training and "
                          "calibration need both kinds: check the segmentations, or add cases")


def _plan_nifti(
    source: Path, modalities: Sequence[str], image_size: int, train_fraction: float, val_fraction: float, seed: int
) -> _Plan:
    cases = {case.name: case for case in find_cases(source, modalities)
             if case.segmentation is not None or case.folder.name != _WITHOUT_LABELS}
    split = split_patients(list(cases), train_fraction, val_fraction, seed,
                           {name: case.patient for name, case in cases.items()})
    settings = {
        "image_size": image_size,
        "normalisation": "divided by the 99th percentile of the positive voxels, per case and modality",
        "orientation": ORIENTATION,
        "train_fraction": train_fraction, "val_fraction": val_fraction, "split_seed": seed,
    }
    return _Plan("NIfTI cases", settings, {name: [cases[case] for case in chosen] for name, chosen in split.items()},
                 functools.partial(_load_nifti, image_size=image_size))


def _load_nifti(files: CaseFiles, image_size: int) -> _Loaded:
    if files.segmentation is None and not files.problem:
        raise UserError(f"{files.images[0].path}: no segmentation; a case without one can be translated, "
                        f"but neither trained nor measured on ({looked_for(files)})")
    case = read_case(files)
    if files.segmentation is not None and case.mask is not None:
        refuse_head_mask(files.segmentation, case.mask, case.volumes)
    return _Loaded(case_slices(case, image_size), case.affine, case.warnings)


def _plan_npz(source: Path, modalities: Sequence[str], image_size: int) -> _Plan:
    split = {name: [_NpzCase(path.name.removeprefix("patient_"), path) for path in _patients(source / folder)]
             for name, folder in _NPZ_SPLITS.items()}
    counts = collections.Counter(case.name for cases in split.values() for case in cases)
    if not counts:
        raise UserError(f"{source}: no patient_<case> folders in {', '.join(_NPZ_SPLITS.values())}")
    twice = sorted(name for name, count in counts.items() if count > 1)
    if twice:
        raise UserError(f"{source}: patient {twice[0]} is in more than one split; move all its slices into one")
    settings = {"image_size": image_size, "normalisation": "as found"}
    load = functools.partial(_load_npz, modalities=modalities, image_size=image_size)
    return _Plan("PyTorch slices", settings, split, load)


def _patients(folder: Path) -> list[Path]:
    """The folders patient_<case> of a split, including those that cannot be listed."""
    if not is_there(folder):
        return []
    if reason := absence(folder):
        raise UserError(f"{folder}: {reason}")
    return sorted(path for path in folder.glob("patient_*") if absence(path) or path.is_dir())


def _load_npz(case: _NpzCase, modalities: Sequence[str], image_size: int) -> _Loaded:
    if reason := absence(case.folder):
        raise UserError(f"{case.folder}: {reason}")
    paths = {}
    for path in case.folder.glob("slice_*.npz"):
        position = path.stem.removeprefix("slice_")
        if not position.isdecimal():
            raise UserError(f"{path}: the name must be slice_<number>.npz")
        paths[int(position)] = path
    if not paths:
        raise UserError(f"{case.folder}: holds no slice_<k>.npz")
    index = sorted(paths)
    images, masks = zip(*(_read_npz(paths[k], image_size) for k in index), strict=True)
    if len({image.shape for image in images}) > 1:
        raise UserError(f"{case.folder}: the slices differ in their number of channels")
    channels = images[0].shape[-1]
    if channels != len(modalities):
        raise UserError(f"{case.folder}: the slices have {channels} channels, not {len(modalities)} "
                        f"({', '.join(modalities)}); say with --modalities what they are")
    return _Loaded(CaseSlices(np.stack(images), np.stack(masks), np.asarray(index, np.int32), None), None)


def _read_npz(path: Path, image_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Reads a slice of the PyTorch layout: x (1, C, H, W) and y (1, 1, H, W) -> [H, W, C] and [H, W] float32."""
    if reason := absence(path):
        raise UserError(f"{path}: {reason}")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            x, y = arrays["x"].astype(np.float32), arrays["y"].astype(np.float32)
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError,
            NotImplementedError, RuntimeError, SyntaxError, IndexError, struct.error, zlib.error,
            zipfile.BadZipFile, tokenize.TokenError) as error:  # all that a damaged file can raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: x and y cannot be read ({reason}); copy it again") from error
    square = (image_size, image_size)
    if x.ndim != 4 or len(x) != 1 or x.shape[2:] != square or y.shape != (1, 1, *square):
        raise UserError(f"{path}: x is {x.shape}, y {y.shape}; expected (1, C, {image_size}, {image_size}) and "
                        f"(1, 1, {image_size}, {image_size}); set --image-size to the slices' own")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise UserError(f"{path}: holds NaN or infinite values; repair or remove the case")
    if y.min() < 0:
        raise UserError(f"{path}: y holds {y.min():g}; a lesion mask is 0 outside and positive inside")
    return np.ascontiguousarray(x[0].transpose(1, 2, 0)), y[0, 0]


def _attempt(load: Callable[[Any], Any], item: Any) -> Any:
    """Returns `load(item)`, or the message of its `UserError`, so that a broken case does not stop the others."""
    try:
        return load(item)
    except UserError as error:
        return str(error)


def _must_replace(output: Path, overwrite: bool) -> bool:
    """Whether `output` holds a dataset that must be replaced."""
    if not os.path.lexists(output) or (output.is_dir() and not any(output.iterdir())):
        return False
    if not (output / MANIFEST).is_file():
        raise UserError(f"{output}: exists and is not a prepared dataset; choose another --output")
    if not overwrite:
        raise UserError(f"{output}: exists; give --overwrite to replace it, or choose another --output")
    return True
