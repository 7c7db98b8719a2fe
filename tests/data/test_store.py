"""The prepared dataset: TensorStore and zarr-python read the values that were written, and damage is detected."""

import json
import pickle
import shutil

import numpy as np
import pytest
import zarr

from hae_jax.data import store as store_module
from hae_jax.data.slices import CaseSlices
from hae_jax.data.store import MANIFEST, StoreWriter, open_store, verify_store
from hae_jax.errors import UserError

SIZE = 16


def make_slices(rng, count, start, lesion):
    masks = np.zeros((count, SIZE, SIZE), np.float32)
    if lesion:
        masks[count // 2, 3:6, 3:6] = 1
        masks[0, 2, 2] = 0.5  # exactly one half is not lesion
    index = np.arange(start, start + count, dtype=np.int32)
    return CaseSlices(rng.random((count, SIZE, SIZE, 4)).astype(np.float32), masks, index, (30, 31, 32))


@pytest.fixture
def written(tmp_path, monkeypatch):
    """A store with three shards of training slices, and the written slices: (root, {split: [CaseSlices]})."""
    monkeypatch.setattr(store_module, "SHARD_BYTES", 8 * SIZE * SIZE * 4 * 4)  # eight images
    root = tmp_path / "store"
    root.mkdir()
    rng, writer = np.random.default_rng(0), StoreWriter(root)
    parts = {"train": [make_slices(rng, n, n, n % 2) for n in (5, 9, 6)], "val": [make_slices(rng, 3, 0, True)]}
    for split, cases in parts.items():
        for i, slices in enumerate(cases):
            writer.add(f"{split}{i}", split, slices, np.diag([1, 2, 3, 1]))
    writer.finish({"source": "made up"})
    return root, parts


def test_reads_back_what_was_written(written):
    root, parts = written
    store = open_store(root)
    for split, cases in parts.items():
        reader = store.split(split)
        assert len(reader) == sum(len(case.index) for case in cases)
        rows = reader.read(np.arange(len(reader)))
        np.testing.assert_array_equal(rows["image"], np.concatenate([case.images for case in cases]))
        masks = np.concatenate([case.masks for case in cases]) > 0.5
        np.testing.assert_array_equal(rows["mask"], masks)
        np.testing.assert_array_equal(rows["label"], masks.any((1, 2)))
        np.testing.assert_array_equal(rows["slice"], np.concatenate([case.index for case in cases]))
        names = [store.cases[i]["name"] for i in rows["case"]]
        assert names == [f"{split}{i}" for i, case in enumerate(cases) for _ in case.index]
        assert {key: value.dtype.name for key, value in rows.items()} == {
            "image": "float32", "mask": "uint8", "label": "int32", "case": "int32", "slice": "int32"}
    assert len(store.split("test")) == 0


def test_any_order_and_single_slices(written):
    reader = open_store(written[0]).split("train")
    everything = reader.read(range(len(reader)))
    some = reader.read([19, 0, 7, 7])
    for key, values in everything.items():
        np.testing.assert_array_equal(some[key], values[[19, 0, 7, 7]])
        np.testing.assert_array_equal(reader.read(13)[key], values[13])
    for outside in (-1, 20, [0, 20]):
        with pytest.raises(IndexError):
            reader.read(outside)


def test_reader_survives_pickling(written):
    reader = open_store(written[0]).split("train")
    expected = reader.read([3, 1])
    copy = pickle.loads(pickle.dumps(reader))
    for key, values in copy.read([3, 1]).items():
        np.testing.assert_array_equal(values, expected[key])


def test_zarr_python_reads_the_same(written):
    root, parts = written
    group = zarr.open_group(root, mode="r")
    assert sorted(group["train"].array_keys()) == ["cases", "images", "labels", "masks", "slices"]
    images = group["train/images"]
    np.testing.assert_array_equal(images[:], np.concatenate([case.images for case in parts["train"]]))
    assert images.chunks == (1, SIZE, SIZE, 4)
    assert images.shards == (8, SIZE, SIZE, 4)
    assert images.metadata.dimension_names == ("slice", "height", "width", "channel")
    assert group["train/masks"][:].sum() == 18
    np.testing.assert_array_equal(group["val/slices"][:], [0, 1, 2])


def test_shards_are_few_files_in_one_folder(written):
    names = sorted(path.name for path in (written[0] / "train" / "images").iterdir())
    assert names == ["c.0.0.0.0", "c.1.0.0.0", "c.2.0.0.0", "zarr.json"]


def test_manifest_has_the_facts_per_case(written):
    manifest = open_store(written[0]).manifest
    assert manifest["source"] == "made up"
    assert manifest["splits"]["train"] == {"cases": 3, "slices": 20, "lesion_slices": 2}
    assert manifest["splits"]["test"] == {"cases": 0, "slices": 0, "lesion_slices": 0}
    assert manifest["cases"][1] == {
        "name": "train1", "split": "train", "shape": [30, 31, 32], "affine": np.diag([1, 2, 3, 1]).tolist(),
        "slices": 9, "lesion_slices": 1}
    assert open_store(written[0]).modalities is None  # none were given to `StoreWriter`


def test_a_case_of_another_size_is_refused_and_leaves_no_trace(tmp_path):
    rng, writer = np.random.default_rng(0), StoreWriter(tmp_path)
    first = make_slices(rng, 4, 0, True)
    writer.add("a", "train", first, None)
    odd = CaseSlices(np.zeros((2, 8, 8, 4), np.float32), np.zeros((2, 8, 8), np.float32), np.arange(2), None)
    with pytest.raises(UserError, match="case b"):
        writer.add("b", "train", odd, None)
    writer.finish({})
    assert [case["name"] for case in open_store(tmp_path).cases] == ["a"]


def test_verify_names_each_damaged_file(written):
    root = written[0]
    assert verify_store(root) == []
    flipped, gone = root / "train/images/c.1.0.0.0", root / "val/labels/c.0"
    content = bytearray(flipped.read_bytes())
    content[100] ^= 1
    flipped.write_bytes(content)
    gone.unlink()
    (root / "train/extra").write_text("?")
    problems = verify_store(root)
    assert [problem.split(":")[0] for problem in sorted(problems)] == [
        "train/extra", "train/images/c.1.0.0.0", "val/labels/c.0"]


def test_flipped_bit_does_not_pass_for_data(written):
    path = written[0] / "train/images/c.1.0.0.0"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    reader = open_store(written[0]).split("train")
    with pytest.raises(UserError, match="--verify"):
        reader.read(range(8, 16))


def test_damaged_labels_are_named(written):
    path = written[0] / "train/labels/c.0"
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(UserError, match="--verify"):
        open_store(written[0]).split("train").rows  # noqa: B018


@pytest.mark.parametrize("replaced", [True, False])
def test_a_dataset_replaced_or_removed_in_use_is_an_error(written, replaced):
    root, parts = written
    reader = open_store(root).split("train")
    copy = pickle.loads(pickle.dumps(reader))
    assert reader.read(0)["image"].any()
    shutil.rmtree(root)
    if replaced:
        root.mkdir()
        writer = StoreWriter(root)
        writer.add("other", "train", parts["val"][0], None)
        writer.finish({})
    for own in (reader, copy):
        with pytest.raises(UserError, match="the dataset was replaced or removed"):
            own.read([1, 2])


def test_opening_what_is_no_store(written, tmp_path):
    root = written[0]
    with pytest.raises(UserError, match=r"prepare_data\.py"):
        open_store(tmp_path / "absent")
    with pytest.raises(UserError, match="split 'dev'"):
        open_store(root).split("dev")
    (root / "val/masks/c.0.0.0").unlink()  # would be read as zeros if it were not detected
    with pytest.raises(UserError, match=r"c\.0\.0\.0: missing"):
        open_store(root)
    manifest = json.loads((root / MANIFEST).read_text())
    for broken in ("{", "[]", json.dumps(manifest | {"format_version": 99}), json.dumps({"format": "other"})):
        (root / MANIFEST).write_text(broken)
        with pytest.raises(UserError, match=MANIFEST):
            open_store(root)
