"""The order of training slices depends only on (seed, position). Evaluation uses every slice once."""

import itertools
import multiprocessing
import signal
import time

import numpy as np
import pytest

from hae_jax.data import batches as batches_module
from hae_jax.data.batches import train_batches
from hae_jax.data.slices import CaseSlices, to_model_range
from hae_jax.data.store import StoreWriter, open_store
from hae_jax.errors import UserError

COUNT, SIZE = 23, 8


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    root = tmp_path_factory.mktemp("store")
    rng, writer = np.random.default_rng(0), StoreWriter(root)
    masks = np.zeros((COUNT, SIZE, SIZE), np.float32)
    masks[::3, 4, 4] = 1
    images = rng.random((COUNT, SIZE, SIZE, 4)).astype(np.float32)
    writer.add("a", "train", CaseSlices(images, masks, np.arange(COUNT, dtype=np.int32), None), None)
    writer.finish({})
    return open_store(root)


@pytest.fixture(scope="module")
def reader(store):
    return store.split("train")


def take(batches, count):
    return list(itertools.islice(batches, count))


def order(batches, count):
    """Positions of the slices in the first `count` batches; a slice's number identifies it in this store."""
    return np.concatenate([batch["slice"] for batch in take(batches, count)])


def assert_equal(left, right):
    assert left.keys() == right.keys()
    for key in left:
        np.testing.assert_array_equal(left[key], right[key], err_msg=key)


def test_a_batch_is_what_the_store_holds(reader):
    batch = next(train_batches(reader, batch_size=6, seed=3))
    rows = reader.read(batch["slice"])
    np.testing.assert_array_equal(batch["image"], to_model_range(rows["image"]))
    np.testing.assert_array_equal(batch["label"], rows["label"])
    assert batch["image"].dtype == np.float32
    assert batch["image"].shape == (6, SIZE, SIZE, 4)
    assert batch["label"].dtype == np.int32
    assert "mask" not in batch
    by_volume = next(train_batches(reader, batch_size=6, seed=3, scaling="volume"))["image"]
    np.testing.assert_array_equal(by_volume, to_model_range(rows["image"], "volume"))


def test_every_epoch_has_every_slice_once_in_another_order(reader):
    epochs = order(train_batches(reader, batch_size=5, seed=0), COUNT * 4 // 5 + 1)[:COUNT * 4].reshape(4, COUNT)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(COUNT))
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_seeds_differ_and_do_not_borrow_each_others_epochs(reader):
    first = order(train_batches(reader, batch_size=COUNT, seed=0), 3).reshape(3, COUNT)
    second = order(train_batches(reader, batch_size=COUNT, seed=1), 3).reshape(3, COUNT)
    assert not {tuple(epoch) for epoch in first} & {tuple(epoch) for epoch in second}
    np.testing.assert_array_equal(first, order(train_batches(reader, batch_size=COUNT, seed=0), 3).reshape(3, COUNT))


def test_order_does_not_depend_on_the_batch_size(reader):
    np.testing.assert_array_equal(order(train_batches(reader, batch_size=4, seed=7), 15),
                                  order(train_batches(reader, batch_size=12, seed=7), 5))


@pytest.mark.parametrize("start", [1, 4, 57])  # 57 steps of 5 are more than 10 epochs in
def test_resuming_continues_the_sequence(reader, start):
    whole = take(train_batches(reader, batch_size=5, seed=2), start + 3)
    for expected, batch in zip(whole[start:], train_batches(reader, batch_size=5, seed=2, start_step=start),
                               strict=False):
        assert_equal(batch, expected)


def test_resuming_far_in_costs_nothing(reader):
    far = 10**12
    started = time.monotonic()
    resumed = order(train_batches(reader, batch_size=8, seed=5, start_step=far), 3)
    assert time.monotonic() - started < 2
    # The same positions with another batch size, so that the large offset itself is checked.
    np.testing.assert_array_equal(resumed, order(train_batches(reader, batch_size=2, seed=5, start_step=4 * far), 12))


@pytest.mark.parametrize("start", [0, 59])
def test_two_processes_share_the_same_global_batches(reader, start):
    options = {"batch_size": 6, "seed": 1, "start_step": start}
    shares = [take(train_batches(reader, **options, process_index=p, process_count=2), 9) for p in range(2)]
    for step, expected in enumerate(take(train_batches(reader, **options), 9)):
        joined = {key: np.concatenate([share[step][key] for share in shares]) for key in expected}
        assert_equal(joined, expected)


def test_worker_processes_and_no_prefetch_change_nothing(reader):
    options = {"batch_size": 4, "seed": 9, "start_step": 12}
    expected = take(train_batches(reader, **options), 5)
    for batch, same in zip(expected, train_batches(reader, **options, prefetch=0), strict=False):
        assert_equal(same, batch)
    workers = train_batches(reader, **options, workers=2)
    try:
        for batch in expected:
            assert_equal(next(workers), batch)
        for child in multiprocessing.active_children():
            child.kill()
        with pytest.raises(UserError, match=r"one of 2 data workers was killed \(SIGKILL\).*set data\.workers=0"):
            take(workers, 20)  # what was read ahead comes first
    finally:
        workers.close()


BALANCED_LESIONS = np.arange(0, COUNT, 3)  # the store's slices with a lesion: 8 of 23


def test_balanced_classes_take_turns_each_in_its_own_epochs(reader):
    positions = order(train_batches(reader, batch_size=6, seed=4, balance=True), 16)
    healthy, lesion = positions[::2], positions[1::2]
    for drawn, expected in ((healthy, np.setdiff1d(np.arange(COUNT), BALANCED_LESIONS)), (lesion, BALANCED_LESIONS)):
        epochs = drawn[:len(drawn) // len(expected) * len(expected)].reshape(-1, len(expected))
        np.testing.assert_array_equal(np.sort(epochs), np.tile(expected, (len(epochs), 1)))
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs) > 2
    batch = next(train_batches(reader, batch_size=6, seed=4, balance=True))
    assert batch["label"].tolist() == [0, 1] * 3


@pytest.mark.parametrize("start", [0, 3, 10**12])
def test_a_balanced_order_depends_on_seed_and_position_alone(reader, start):
    options = {"seed": 1, "balance": True, "start_step": start}
    expected = order(train_batches(reader, batch_size=6, **options), 4)
    shares = [take(train_batches(reader, batch_size=6, **options, process_index=p, process_count=2), 4)
              for p in range(2)]
    np.testing.assert_array_equal(np.concatenate([s["slice"] for step in zip(*shares, strict=True) for s in step]),
                                  expected)
    np.testing.assert_array_equal(
        order(train_batches(reader, batch_size=3, seed=1, balance=True, start_step=2 * start + 2), 6), expected[6:])
    assert not np.array_equal(order(train_batches(reader, batch_size=6, **options | {"seed": 2}), 4), expected)


def test_a_class_without_slices_cannot_be_balanced(tmp_path):
    writer = StoreWriter(tmp_path)
    images = np.zeros((4, SIZE, SIZE, 4), np.float32)
    writer.add("a", "train", CaseSlices(images, images[..., 0], np.arange(4, dtype=np.int32), None), None)
    writer.finish({})
    with pytest.raises(UserError, match=r"data\.balance: .*train has no lesion slices"):
        train_batches(open_store(tmp_path).split("train"), batch_size=2, seed=0, balance=True)


@pytest.mark.parametrize(("options", "says"), [
    ({"batch_size": 0}, "batch_size 0"),
    ({"batch_size": -4}, "batch_size -4"),
    ({"batch_size": 5, "process_count": 2}, "multiple of 2"),
    ({"batch_size": 4, "seed": -1}, "seed -1"),
    ({"batch_size": 4, "start_step": -1}, "start_step -1"),
])
def test_numbers_that_do_not_fit(reader, options, says):
    with pytest.raises(UserError, match=says):
        train_batches(reader, **{"seed": 0, **options})


def test_empty_split_is_named(store):
    with pytest.raises(UserError, match=r"val: the split has no slices"):
        train_batches(store.split("val"), batch_size=2, seed=0)


@pytest.mark.parametrize(("error", "says"), [
    (RuntimeError(f"Worker process was terminated unexpectedly with exit code {-signal.SIGBUS}."), "/dev/shm"),
    (RuntimeError("terminated unexpectedly with exit code 3."), "exit status 3"),
    (OSError(28, "No space left on device"), "no space in /dev/shm"),
])
def test_a_worker_s_death_is_one_line(reader, monkeypatch, error, says):
    def died():
        raise error
        yield

    monkeypatch.setattr(batches_module.grain.IterDataset, "mp_prefetch", lambda *_, **__: died())
    with pytest.raises(UserError, match=rf"one of 2 data workers .*{says}.*set data\.workers=0"):
        next(train_batches(reader, batch_size=6, seed=3, workers=2))
    error = RuntimeError("ours")
    with pytest.raises(RuntimeError, match="ours"):
        next(train_batches(reader, batch_size=6, seed=3, workers=2))
