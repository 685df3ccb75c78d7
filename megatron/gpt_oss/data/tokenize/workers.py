# Copyright (c) 2026, the megatron-core gptoss authors.

"""Map a function over an iterator in several processes, in order and with bounded memory."""

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

AHEAD = 3  # items per process: one in work, one queued, one returned


def process_map(
    function: Callable,
    items: Iterable,
    processes: int,
    initializer: Callable,
    initargs: tuple,
) -> Iterator[tuple[object, object]]:
    """Yield (item, function(item)) in order; items are read from the iterator as needed.

    Args:
        function, initializer: module-level functions, which are pickled by name.
        processes: at least 1. They exit with this process, even if it is killed.
    Raises:
        UsageError: a process was killed, for example because memory ran out.
    """
    context = multiprocessing.get_context(
        "spawn"
    )  # fork is unsafe with the threads of torch and tokenizers
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
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    threading.Thread(target=_follow_parent, daemon=True).start()
    initializer(*initargs)


def _follow_parent() -> None:
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
