# Copyright (c) 2026, the megatron-core gptoss authors.

"""Read and compute the next pieces in threads while the present one is written."""

import collections
import ctypes
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Callable, Iterable, Iterator, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

# While one thread waits for the disk the other computes; on two cores a third only waits for them.
NUM_THREADS = 2


def read_ahead(
    read: Callable[[Item], Result], items: Iterable[Item], num_threads: int = NUM_THREADS
) -> Iterator[Result]:
    """`map(read, items)`, as many items ahead as there are threads.

    Args:
        read: called in other threads, in order, for `num_threads` items at a time.
        items: what to read.
        num_threads: 1 or more.
    """
    pending: collections.deque[Future[Result]] = collections.deque()
    with ThreadPoolExecutor(num_threads, thread_name_prefix="read-ahead") as threads:
        try:
            for item in items:
                pending.append(threads.submit(read, item))
                if len(pending) > num_threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


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
