# Copyright (c) 2026, the megatron-core gptoss authors.

import os
import time

import pytest

from megatron.gpt_oss.data.tokenize.workers import AHEAD, process_map
from megatron.gpt_oss.errors import UsageError

_offset = None


def begin(offset):
    global _offset
    _offset = offset


def slow_first(item):
    time.sleep(0.3 if item == 0 else 0)
    return item + _offset


def die(item):
    os.kill(os.getpid(), 9)


def test_order_and_bounded_reading():
    taken = []

    def items():
        for item in range(40):
            taken.append(item)
            yield item

    results = process_map(slow_first, items(), 2, begin, (100,))
    assert next(results) == (0, 100)
    assert len(taken) <= 2 * AHEAD
    assert list(results) == [(item, item + 100) for item in range(1, 40)]


def test_killed_process():
    with pytest.raises(UsageError, match="One of 2 processes was killed.*--workers"):
        list(process_map(die, range(3), 2, begin, (0,)))
