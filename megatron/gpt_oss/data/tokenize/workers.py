# Copyright (c) 2026, the megatron-core gptoss authors.

"""A function over an iterator in many processes, results in order, memory bounded."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Callable, Iterable, Iterator

from megatron.gpt_oss.errors import UsageError

AHEAD = 3  # items a process: one in work, one waiting for it, one on its way back


def process_map(
    function: Callable,
    items: Iterable,
    processes: int,
    initializer: Callable,
    initargs: tuple,
) -> Iterator[tuple[object, object]]:
    """(item, function(item)) in the order of the items, which are taken as they are needed.

    Args:
        function, initializer: of a module's top level; they are pickled by name.
        processes: at least 1; end with this one, even when it is killed.
    Raises:
        UsageError: a process was killed, for example for its memory.
    """
    context = multiprocessing.get_context("spawn")  # torch and tokenizers have threads: no fork
    pool = ProcessPoolExecutor(processes, context, _begin, (initializer, initargs))
    pending = deque()
    try:
        for item in items:
            pending.append((item, pool.submit(function, item)))
            if len(pending) >= AHEAD * processes:
                item, future = pending.popleft()
                yield item, future.result()
        while pending:
            item, future = pending.popleft()
            yield item, future.result()
    except BrokenProcessPool as error:
        raise UsageError(
            f"One of {processes} processes was killed, most likely out of memory. Give fewer "
            "with --workers."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(initializer: Callable, initargs: tuple) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends us
    threading.Thread(target=_follow_parent, daemon=True).start()
    initializer(*initargs)


def _follow_parent() -> None:
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
