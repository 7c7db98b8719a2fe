"""Batches that are read ahead."""

import pytest

from hae_jax.errors import UserError
from hae_jax.training.ahead import ReadAhead


@pytest.mark.parametrize("count", [1, 2, 5])
def test_batches_come_in_order_and_no_more_are_read_than_wanted(count):
    endless = iter(range(1000))
    ahead = ReadAhead(lambda: next(endless), count)
    assert [ahead.next() for _ in range(count)] == list(range(count))
    assert next(endless) == count


def test_there_are_two_more_batches_when_reading_fails():
    def reads():
        yield from range(4)
        raise UserError("gone")

    batches = reads()
    ahead = ReadAhead(lambda: next(batches), 100)
    assert [(ahead.next(), str(ahead.error)) for _ in range(4)] == [(0, "None"), (1, "None"), (2, "gone"), (3, "gone")]


def test_without_a_first_batch_nothing_begins():
    def fails():
        raise UserError("gone")

    with pytest.raises(UserError, match="gone"):
        ReadAhead(fails, 100)
