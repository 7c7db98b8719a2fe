"""The prepared dataset. It is written once, case by case, and then read in random order, slice by slice.

One folder holds `manifest.json` and five Zarr v3 arrays per split. Any Zarr reader can open it as a group:

    images [N, H, W, C] float32   normalised intensities, not yet scaled to the network's range
    masks  [N, H, W]    uint8     1 where the lesion is
    labels [N] int32              1 if any mask pixel is set
    cases  [N] int32              position in the manifest's list of cases
    slices [N] int32              axial position in the case's own volume

A shard of about 128 MiB is one file, and each slice is one inner chunk of it. So there are few files, and reading a
slice is one small read. `prepare` writes stores, `batches` reads them.
"""

import contextlib
import dataclasses
import functools
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from hae_jax.data.presence import absence
from hae_jax.data.slices import CaseSlices
from hae_jax.data.splits import SPLITS
from hae_jax.errors import UserError
from hae_jax.files import read_json, write_json

FORMAT = "hae-jax prepared slices"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SHARD_BYTES = 2**27  # before compression; writing holds as much in memory per array
ROW_ARRAYS = ("labels", "cases", "slices")  # one int32 per slice
_DIMENSIONS = ("slice", "height", "width", "channel")


class StoreWriter:
    """Writes a store into the existing, empty folder `root`. Cases of one split must be added consecutively."""

    def __init__(self, root: Path):
        self._root = root
        self._cases: list[dict[str, Any]] = []
        self._split: _SplitWriter | None = None
        self._item_shape: tuple[int, ...] | None = None
        _write_group(root)

    def add(
        self, name: str, split: str, slices: CaseSlices, affine: np.ndarray | None, patient: str | None = None
    ) -> None:
        """Appends one case, which must have masks. `patient` is needed if its name does not give the patient.

        Raises:
          UserError: its slices differ in size or number of channels from those of earlier cases.
        """
        item_shape = slices.images.shape[1:]
        if self._item_shape not in (None, item_shape):
            raise UserError(f"case {name}: slices are {item_shape} (H, W, channels), those of the cases before it "
                            f"{self._item_shape}; all must agree")
        self._item_shape = item_shape
        if self._split is None or self._split.name != split:
            self._close_split()
            self._split = _SplitWriter(self._root, split, item_shape)
        assert slices.masks is not None
        masks = (slices.masks > 0.5).astype(np.uint8)
        labels = np.any(masks, axis=(1, 2)).astype(np.int32)
        self._split.add(images=slices.images, masks=masks, labels=labels, slices=slices.index,
                        cases=np.full(len(labels), len(self._cases), np.int32))
        self._cases.append({
            "name": name,
            **({"patient": patient} if patient else {}),
            "split": split,
            "shape": None if slices.shape is None else list(slices.shape),
            "affine": None if affine is None else np.asarray(affine).tolist(),
            "slices": len(labels),
            "lesion_slices": int(labels.sum()),
        })

    def totals(self) -> dict[str, dict[str, int]]:
        """Cases, slices and slices with a lesion so far, per split."""
        return {split: _totals(self._cases, split) for split in SPLITS}

    def finish(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Writes buffered slices, then the manifest with `facts` (source, modalities, settings, ...). Returns it."""
        self._close_split()
        manifest = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            **facts,
            "slice_shape": None if self._item_shape is None else list(self._item_shape),
            "splits": self.totals(),
            "cases": self._cases,
            "files": {path.relative_to(self._root).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
                      for path in _data_files(self._root)},
        }
        write_json(self._root / MANIFEST, manifest)
        return manifest

    def _close_split(self) -> None:
        if self._split is not None:
            self._split.close()
        self._split = None


@dataclasses.dataclass(frozen=True)
class Store:
    """An opened prepared dataset.

    root: its folder. manifest: the contents of its manifest. version: identifies the manifest's file.
    """

    root: Path
    manifest: dict[str, Any]
    version: tuple[int, ...]

    def split(self, name: str) -> "SplitReader":
        """The slices of "train", "val" or "test". May have length 0."""
        if name not in SPLITS:
            raise UserError(f"split {name!r}: unknown; choose one of {', '.join(SPLITS)}")
        return SplitReader(self.root / name, self.manifest["splits"][name]["slices"], self.version)

    @property
    def modalities(self) -> tuple[str, ...] | None:
        """The channels in their order; None if the dataset does not name them."""
        names = self.manifest.get("modalities")
        return None if names is None else tuple(names)

    def check_modalities(self, wanted: Sequence[str]) -> None:
        """Refuses other channels, or another order of them, than `data.modalities`.

        Raises:
          UserError: the dataset names its channels, and they differ.
        """
        if self.modalities not in (None, tuple(wanted)):
            raise UserError(f"{self.root}: its channels are {', '.join(self.modalities or ())}, but data.modalities is "
                            f"{', '.join(wanted)}; give --config.data.modalities in the dataset's order")

    @property
    def cases(self) -> list[dict[str, Any]]:
        """Per case: name, patient (if given), split, shape, affine, slices, lesion_slices. Batches hold its indices."""
        return self.manifest["cases"]


class SplitReader:
    """Random access to the slices of one split. It is thread-safe. A pickled copy opens its files again.

    Args:
      folder: the folder of the split.
      length: its number of slices.
      version: `Store.version`.
    """

    def __init__(self, folder: Path, length: int, version: tuple[int, ...]):
        self.folder = Path(folder)
        self._length, self._version = length, version

    def __len__(self) -> int:
        return self._length

    def __reduce__(self):
        return SplitReader, (self.folder, self._length, self._version)

    def read(self, indices: int | Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """Reads one slice (an int) or several at once.

        Returns:
          image [..., H, W, C] float32, normalised but not yet in [-1, 1]; mask [..., H, W] uint8; label, case and slice
          [...] int32. The leading axis exists if `indices` has one.

        Raises:
          IndexError: an index is outside 0 .. len - 1.
          UserError: a file is damaged, or the dataset was replaced or removed after it was opened.
        """
        indices = np.asarray(indices, np.int64)
        if np.any((indices < 0) | (indices >= self._length)):
            raise IndexError(f"{self.folder}: index outside 0..{self._length - 1}")
        with self._readable():
            pending = [self._arrays[name][indices].read() for name in ("images", "masks")]  # reads both at once
            image, mask = [future.result() for future in pending]
        label, case, position = (self.rows[name][indices] for name in ROW_ARRAYS)
        return {"image": image, "mask": mask, "label": label, "case": case, "slice": position}

    @functools.cached_property
    def rows(self) -> dict[str, np.ndarray]:
        """`labels`, `cases` and `slices` of the whole split, [N] int32 each; small enough to stay in memory."""
        if self._length == 0:
            return {name: np.zeros(0, np.int32) for name in ROW_ARRAYS}
        with self._readable():
            return {name: _open_array(self.folder / name).read().result() for name in ROW_ARRAYS}

    @contextlib.contextmanager
    def _readable(self) -> Iterator[None]:
        failed = None
        try:
            yield
        except (ValueError, OSError) as error:  # from TensorStore, for a failed checksum or an unreadable file
            failed = error
        # TensorStore reads missing files as zeros, and the files of another dataset without an error.
        if _version(self.folder.parent) != self._version:
            raise UserError(f"{self.folder.parent}: the dataset was replaced or removed while it was in use; run the "
                            "command again") from failed
        if failed is not None:
            raise UserError(f"{self.folder}: a slice cannot be read; look for damage with "
                            f"tools/prepare_data.py --verify {self.folder.parent}") from failed

    @functools.cached_property
    def _arrays(self) -> dict[str, ts.TensorStore]:
        return {name: _open_array(self.folder / name) for name in ("images", "masks")}


def open_store(root: str | Path) -> Store:
    """Opens a prepared dataset. Checks existence and size of its files, but not their contents.

    Raises:
      UserError: `root` is not a prepared dataset, is damaged, or was written in another format version.
    """
    root = Path(root)
    version = _version(root)
    manifest = _read_manifest(root)
    for name, facts in manifest["files"].items():
        path = root / name
        if not path.is_file() or path.stat().st_size != facts["bytes"]:
            raise UserError(f"{path}: missing or of another size than when written; make the dataset again with "
                            "tools/prepare_data.py --overwrite")
    return Store(root, manifest, version)


def verify_store(root: str | Path) -> list[str]:
    """Compares every file with its checksum.

    Returns:
      One line per file that is missing, changed or not listed; an empty list if all is well.

    Raises:
      UserError: there is no readable manifest in `root`.
    """
    root = Path(root)
    expected = _read_manifest(root)["files"]
    present = {path.relative_to(root).as_posix(): path for path in _data_files(root)}
    problems = [f"{name}: not listed in the manifest" for name in sorted(present.keys() - expected.keys())]
    for name, facts in expected.items():
        if name not in present:
            problems.append(f"{name}: missing")
        elif _sha256(present[name]) != facts["sha256"]:
            problems.append(f"{name}: changed since it was written")
    return problems


def _version(root: Path) -> tuple[int, ...]:
    """Identifies the manifest's file as long as it is not written again; empty if there is none."""
    try:
        found = (root / MANIFEST).stat()
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size


def _read_manifest(root: Path) -> dict[str, Any]:
    path = root / MANIFEST
    again = "make the dataset again with tools/prepare_data.py --overwrite"
    if (reason := absence(root)) not in (None, "missing"):
        raise UserError(f"{root}: {reason}")
    if not os.path.lexists(path):
        raise UserError(f"{root}: no prepared dataset here; make one with tools/prepare_data.py "
                        f"--source FOLDER --output {root}")
    if reason := absence(path):
        raise UserError(f"{path}: {reason}")
    try:
        manifest = read_json(path)
    except UserError as error:
        raise UserError(f"{error}; {again}") from error
    if not isinstance(manifest, dict) or (manifest.get("format"), manifest.get("format_version")) != (
            FORMAT, FORMAT_VERSION):
        raise UserError(f"{path}: not format version {FORMAT_VERSION} of a prepared dataset; {again}")
    if (field := _broken_field(manifest)) is not None:
        raise UserError(f"{path}: field {field} is missing or of a wrong kind; {again}")
    return manifest


def _broken_field(manifest: dict[str, Any]) -> str | None:
    """The first field, of those that the program uses, that is not in the form that `StoreWriter` writes."""
    counts, names = ("cases", "slices", "lesion_slices"), manifest.get("modalities", [])
    shape = manifest.get("slice_shape", ())
    checks = {
        "files": lambda files: all(_is_count(facts["bytes"]) and isinstance(facts["sha256"], str)
                                   for facts in files.values()),
        "splits": lambda splits: all(_is_count(splits[split][key]) for split in SPLITS for key in counts),
        "cases": lambda cases: isinstance(cases, list) and all(
            isinstance(case["name"], str) and _is_grid(case["shape"], case["affine"]) for case in cases),
    }
    for field, check in checks.items():
        try:
            good = check(manifest[field])
        except (KeyError, TypeError, AttributeError):
            good = False
        if not good:
            return field
    if shape is not None and not (isinstance(shape, list) and len(shape) == 3 and all(map(_is_count, shape))):
        return "slice_shape"
    if not isinstance(manifest.get("split", {}), dict):
        return "split"
    return None if isinstance(names, list) and all(isinstance(name, str) for name in names) else "modalities"


def _is_grid(shape: Any, affine: Any) -> bool:
    """Whether `shape` and `affine` are valid for a volume; both may be None."""
    if affine is not None:
        rows = [row for row in affine if len(row) == 4 and all(isinstance(x, int | float) for x in row)]
        if len(rows) != 4 or len(affine) != 4:
            return False
    return shape is None or (isinstance(shape, list) and len(shape) == 3 and all(map(_is_count, shape)))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


class _SplitWriter:
    """Appends to one split's arrays. It writes whole shards only, so that no shard is read back and rewritten."""

    def __init__(self, root: Path, name: str, item_shape: tuple[int, ...]):
        self.name = name
        self._folder = root / name
        self._folder.mkdir()
        _write_group(self._folder)
        self._shards = {
            "images": _ShardedArray(self._folder / "images", item_shape, "float32"),
            "masks": _ShardedArray(self._folder / "masks", item_shape[:2], "uint8"),
        }
        self._rows: dict[str, list[np.ndarray]] = {name: [] for name in ROW_ARRAYS}

    def add(self, **arrays: np.ndarray) -> None:
        for name, values in arrays.items():
            if name in self._shards:
                self._shards[name].append(values)
            else:
                self._rows[name].append(values)

    def close(self) -> None:
        for array in self._shards.values():
            array.flush()
        for name, parts in self._rows.items():
            values = np.concatenate(parts).astype(np.int32)
            metadata = _metadata("int32", values.shape, values.shape)
            _create(self._folder / name, metadata).write(values).result()


class _ShardedArray:
    """An array [N, *item_shape] that grows. Rows are kept in memory until they fill a shard."""

    def __init__(self, path: Path, item_shape: tuple[int, ...], dtype: str):
        item_bytes = int(np.prod(item_shape)) * np.dtype(dtype).itemsize
        self._rows_per_shard = max(1, SHARD_BYTES // item_bytes)
        self._item_shape = tuple(item_shape)
        shard_shape = (self._rows_per_shard, *item_shape)
        self._array = _create(path, _metadata(dtype, (0, *item_shape), shard_shape, sharded=True))
        self._waiting: list[np.ndarray] = []
        self._written = 0

    def append(self, values: np.ndarray) -> None:
        self._waiting.append(values)
        while sum(map(len, self._waiting)) >= self._rows_per_shard:
            values = np.concatenate(self._waiting)
            self._write(values[:self._rows_per_shard])
            self._waiting = [values[self._rows_per_shard:].copy()]  # a view would keep the whole shard

    def flush(self) -> None:
        values = np.concatenate(self._waiting)
        if len(values):
            self._write(values)
        self._waiting = []

    def _write(self, values: np.ndarray) -> None:
        stop = self._written + len(values)
        self._array = self._array.resize(exclusive_max=(stop, *self._item_shape)).result()
        self._array[self._written:stop].write(values).result()
        self._written = stop


def _metadata(dtype: str, shape: Sequence[int], chunk_shape: Sequence[int], sharded: bool = False) -> dict[str, Any]:
    """Zarr v3 metadata of an array: Zstandard compression, and a CRC-32C per chunk to detect damage on reading."""
    to_bytes = {"name": "bytes", "configuration": {"endian": "little"}}
    checksum = {"name": "crc32c"}
    codecs = [to_bytes, {"name": "zstd", "configuration": {"level": 1, "checksum": False}}, checksum]
    if sharded:
        codecs = [{"name": "sharding_indexed", "configuration": {
            "chunk_shape": [1, *chunk_shape[1:]], "codecs": codecs, "index_codecs": [to_bytes, checksum]}}]
    return {
        "shape": list(shape),
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk_shape)}},
        # "." keeps all shards of an array in one folder; the default "/" makes a folder tree per shard.
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "codecs": codecs,
        "fill_value": 0,
        "dimension_names": list(_DIMENSIONS[:len(shape)]),
    }


def _create(path: Path, metadata: dict[str, Any]) -> ts.TensorStore:
    return ts.open(_spec(path) | {"metadata": metadata}, create=True).result()


def _open_array(path: Path) -> ts.TensorStore:
    # A store does not change once it has its final name, so cached data are not checked again after opening.
    return ts.open(_spec(path), read=True, recheck_cached_data="open", recheck_cached_metadata="open").result()


def _spec(path: Path) -> dict[str, Any]:
    return {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path.absolute())}}


def _write_group(folder: Path) -> None:
    write_json(folder / "zarr.json", {"zarr_format": 3, "node_type": "group", "attributes": {}})


def _data_files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file() and path.name != MANIFEST)


def _totals(cases: list[dict[str, Any]], split: str) -> dict[str, int]:
    own = [case for case in cases if case["split"] == split]
    return {"cases": len(own), "slices": sum(case["slices"] for case in own),
            "lesion_slices": sum(case["lesion_slices"] for case in own)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
