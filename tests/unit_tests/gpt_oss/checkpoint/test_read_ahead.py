# Copyright (c) 2026, the megatron-core gptoss authors.

"""Prefetch: order, number of prefetched items, and errors."""

import threading
import time

import pytest

from megatron.gpt_oss.checkpoint.read_ahead import read_ahead


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_order_and_number_ahead(num_threads):
    begun, taken, most = [], 0, 0

    def read(item):
        begun.append(item)
        time.sleep(0.002 * (item % 3))  # the later one is done first
        return item * item

    for item, value in enumerate(read_ahead(read, range(20), num_threads)):
        assert value == item * item
        taken += 1
        most = max(most, len(begun) - taken)
    assert taken == 20 and sorted(begun) == list(range(20))
    assert most <= num_threads


def test_two_at_a_time():
    both = threading.Barrier(2, timeout=10)
    assert list(read_ahead(lambda item: both.wait() * 0 + item, range(4), 2)) == [0, 1, 2, 3]


def test_error_comes_in_its_turn_and_ends_it():
    begun = []

    def read(item):
        begun.append(item)
        if item == 3:
            raise ValueError("three")
        return item

    found = []
    with pytest.raises(ValueError, match="three"):
        for value in read_ahead(read, range(100), 2):
            found.append(value)
    assert found == [0, 1, 2] and len(begun) < 10


def test_nothing_is_read_for_nobody():
    begun = []
    values = read_ahead(begun.append, range(100), 2)
    next(values)
    values.close()
    assert len(begun) <= 3
