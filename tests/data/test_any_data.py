"""Images, tables and datasets with arbitrary content are read correctly, or an error of one line names the file."""

import gzip
import io
import json
import math

import nibabel as nib
import numpy as np
import pytest
from any_input import changed, changed_bytes, few, right_or_one_line
from hypothesis import example, given
from hypothesis import strategies as st

from hae_jax.data.cases import Case, find_cases, read_case
from hae_jax.data.nifti import header_warnings, read_volume
from hae_jax.data.prepare import _read_npz
from hae_jax.data.store import MANIFEST, open_store

AFFINE = np.diag([-1.0, -1.0, 3.0, 1.0])
VALUES = np.random.default_rng(0).integers(1, 99, (5, 4, 3)).astype(np.int16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("any")


PLAIN = nib.Nifti1Image(VALUES, AFFINE).to_bytes()


@few
@given(st.data(), st.booleans())
def test_nifti_headers(folder, data, compressed):
    content = changed_bytes(PLAIN, data.draw, where=352)
    path = folder / ("a.nii.gz" if compressed else "a.nii")
    path.write_bytes(gzip.compress(content, 1) if compressed else content)
    found = right_or_one_line(lambda: read_volume(path), path)
    if found is not None:
        values, grid = found
        assert values.dtype == np.float32
        assert np.isfinite(values).all()
        assert np.isfinite(grid.affine).all()
        assert values.shape == grid.reoriented_shape
        assert all(math.isfinite(s) and s > 0 for s in np.linalg.norm(grid.affine[:3, :3], axis=0))
        header_warnings(grid)


FIELDS = {"datatype": st.sampled_from([0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 768, 1024, 1280, 1536, 1792, 2304, 7]),
          "xyzt_units": st.integers(0, 255), "scl_slope": st.floats(width=32), "scl_inter": st.floats(width=32),
          "sform_code": st.integers(-5, 9), "qform_code": st.integers(-5, 9), "quatern_b": st.floats(width=32),
          "vox_offset": st.floats(width=32), "pixdim": st.lists(st.floats(width=32), min_size=8, max_size=8),
          "srow_x": st.lists(st.floats(width=32), min_size=4, max_size=4), "bitpix": st.integers(-5, 99),
          "dim": st.lists(st.integers(-3, 300), min_size=8, max_size=8), "magic": st.binary(max_size=4),
          "intent_code": st.integers(-9, 3000), "sizeof_hdr": st.integers(0, 600)}


@few
@given(st.dictionaries(st.sampled_from(sorted(FIELDS)), st.none(), min_size=1, max_size=3), st.data())
def test_fields_of_nifti_headers(folder, names, data):
    header = nib.Nifti1Image(VALUES, AFFINE).header.copy()
    header.set_data_offset(352)
    raw = header.structarr.copy()
    raw["magic"] = b"n+1"
    for name in names:
        raw[name] = data.draw(FIELDS[name])
    path = folder / "b.nii"
    path.write_bytes(raw.tobytes() + bytes(4) + VALUES.tobytes(order="F"))
    found = right_or_one_line(lambda: read_volume(path), path)
    if found is not None:
        assert np.isfinite(found[0]).all()
        header_warnings(found[1])


@few
@given(st.data())
def test_dataset_json(folder, data):
    root = folder / "set"
    (root / "imagesTr").mkdir(parents=True, exist_ok=True)
    for k in range(2):
        nib.save(nib.Nifti1Image(VALUES, AFFINE), root / "imagesTr" / f"a_{k:04d}.nii")
    good = {"channel_names": {"0": "T1", "1": "FLAIR"}, "modality": {"0": "T2"}, "labels": {"0": "background"}}
    text = json.dumps(changed(good, data.draw)).encode(data.draw(st.sampled_from(["utf-8", "utf-16", "utf-8-sig"])))
    (root / "dataset.json").write_bytes(changed_bytes(text, data.draw) if data.draw(st.booleans()) else text)
    cases = right_or_one_line(lambda: find_cases(root, ("flair", "t1")), root)
    for case in cases or ():
        read = right_or_one_line(lambda case=case: read_case(case))
        assert read is None or isinstance(read, Case)


CELLS = st.sampled_from(["a", "b", "x.nii", "y.nii", "", " ", "..", "/", "x.nii.gz", ".", "P,1", '"', "é", "a" * 300,
                         "\n", "\0", "case", "t1", "patient", "segmentation", ";"]) | st.text(max_size=6)
HEADERS = st.sampled_from(["case,t1", "case,patient,t1,segmentation", None])


@few
@given(st.lists(st.lists(CELLS, max_size=4), max_size=4), HEADERS, st.sampled_from(["utf-8", "utf-16", "latin-1"]))
@example([["a", "x.nii"], ["b", "y.nii"]], "case,t1", "utf-8")
def test_tables_of_cases(folder, rows, header, encoding):
    for name in ("x", "y"):
        nib.save(nib.Nifti1Image(VALUES, AFFINE), folder / f"{name}.nii")
    lines = ([header] if header else []) + [",".join(row) for row in rows]
    path = folder / "cases.csv"
    path.write_bytes("\n".join(lines).encode(encoding, errors="replace"))
    for case in right_or_one_line(lambda: find_cases(path, ("t1",)), path) or ():
        read = right_or_one_line(lambda case=case: read_case(case), path if case.problem else None)
        assert (read is None) == (case.problem is not None) or case.segmentation is not None
        assert "/" not in case.name
        assert len(case.name.encode()) <= 255


MANIFEST_OF_NOTHING = {
    "format": "hae-jax prepared slices", "format_version": 1, "source": "cases", "modalities": ["t1"], "split": {},
    "slice_shape": [4, 4, 1], "splits": {split: {"cases": 1, "slices": 3, "lesion_slices": 1} for split in (
        "train", "val", "test")},
    "cases": [{"name": "a", "split": "train", "shape": [4, 4, 3], "affine": np.eye(4).tolist()}], "files": {}}


@few
@given(st.data())
def test_manifests_of_prepared_data(folder, data):
    path = folder / MANIFEST
    path.write_text(json.dumps(changed(MANIFEST_OF_NOTHING, data.draw)))
    store = right_or_one_line(lambda: open_store(folder), path)
    if store is not None:
        _ = store.modalities, store.cases, [len(store.split(name)) for name in ("train", "val", "test")]


def npz():
    file = io.BytesIO()
    np.savez(file, x=np.ones((1, 2, 4, 4), np.float32), y=np.zeros((1, 1, 4, 4), np.float32))
    return file.getvalue()


@few
@given(st.data())
def test_slices_for_pytorch(folder, data):
    path = folder / "slice_1.npz"
    path.write_bytes(changed_bytes(npz(), data.draw))
    found = right_or_one_line(lambda: _read_npz(path, 4), path)
    assert found is None or (np.isfinite(found[0]).all() and found[0].shape[:2] == (4, 4))
