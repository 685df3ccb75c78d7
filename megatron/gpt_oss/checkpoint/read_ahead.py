# Copyright (c) 2026, the megatron-core gptoss authors.

"""Read and convert the next items in threads while the current one is written."""

import collections
import ctypes
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Callable, Iterable, Iterator, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

# One thread computes while the other waits for the disk. A third is no faster on two cores.
NUM_THREADS = 2


def read_ahead(
    read: Callable[[Item], Result], items: Iterable[Item], num_threads: int = NUM_THREADS
) -> Iterator[Result]:
    """`map(read, items)` that prefetches as many items as there are threads.

    Args:
        read: called in threads, in the order of the items.
        items: arguments of `read`.
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
    """Let glibc keep freed memory for the next matrix instead of returning it to the system.

    A page fault costs 1 to 2 us: without this, an export takes 1.7 times the CPU time. Only for
    processes that convert.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return  # not glibc
    trim_threshold, mmap_threshold, arena_max = -1, -3, -8  # malloc.h
    mallopt(arena_max, 1)
    mallopt(mmap_threshold, 32 * 2**20)  # the largest that it takes
    mallopt(trim_threshold, 2**30)
