# Copyright (c) 2026, the megatron-core gptoss authors.

"""Read and compute the next piece in a thread while the present one is written."""

import ctypes
from concurrent.futures import ThreadPoolExecutor
from typing import Callable, Iterable, Iterator, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

# Larger pieces (an embedding) are read when it is their turn: two of them would double the memory.
LARGEST_AHEAD = 256 * 2**20


def read_ahead(
    read: Callable[[Item], Result], items: Iterable[Item], size: Callable[[Item], int]
) -> Iterator[Result]:
    """`map(read, items)`, one small item ahead.

    Args:
        read: called in one other thread, for one item at a time, in order.
        items: what to read.
        size: bytes of an item.
    """
    items = list(items)
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead") as thread:
        ahead = None
        for number, item in enumerate(items):
            result = (ahead or thread.submit(read, item)).result()
            ahead = None
            if number + 1 < len(items) and size(items[number + 1]) <= LARGEST_AHEAD:
                ahead = thread.submit(read, items[number + 1])
            yield result
            del result


def keep_freed_memory() -> None:
    """Let glibc use the memory of one piece again for the next, in whatever thread.

    By default it goes back to the system with every matrix of an expert, and a page of fresh memory
    costs 1 to 2 us: the fifth of 1.6 GB/s at which a core brings MXFP4 into Megatron's layout.
    For a process that only converts.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return  # not glibc
    trim_threshold, mmap_threshold, arena_max = -1, -3, -8  # malloc.h
    mallopt(arena_max, 1)
    mallopt(mmap_threshold, 32 * 2**20)  # the largest that it takes
    mallopt(trim_threshold, 2**30)
