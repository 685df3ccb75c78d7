# Copyright (c) 2026, the megatron-core gptoss authors.

"""Delay the checkpoint writer, for tests of events during a background write."""

import contextlib
import threading
import time
from pathlib import Path
from typing import Callable, List, Tuple

from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

SECONDS = 20


class HeldWriter:
    """Calls `before(iteration)` before every write of a shard in this process.

    Attributes:
        writes: (iteration, begin, end, thread) of every write, in seconds of time.monotonic().
        most_at_once: maximum number of concurrent writes.
    """

    def __init__(self, before: Callable[[int], None]):
        self._before = before
        self._lock = threading.Lock()
        self._now = 0
        self.most_at_once = 0
        self.writes: List[Tuple[int, float, float, str]] = []

    @contextlib.contextmanager
    def installed(self):
        """While this is entered."""
        original = FileSystemWriterAsync.__dict__["write_preloaded_data"]
        write = original.__func__

        def held(transform_list, local_proc_idx, write_bucket, *args, **kwargs):
            iteration = int(Path(write_bucket[0]).parent.name.removeprefix("iter_"))
            begin = time.monotonic()
            with self._lock:
                self._now += 1
                self.most_at_once = max(self.most_at_once, self._now)
            try:
                self._before(iteration)
                return write(transform_list, local_proc_idx, write_bucket, *args, **kwargs)
            finally:
                with self._lock:
                    self._now -= 1
                    name = threading.current_thread().name
                    self.writes.append((iteration, begin, time.monotonic(), name))

        FileSystemWriterAsync.write_preloaded_data = staticmethod(held)
        try:
            yield self
        finally:
            FileSystemWriterAsync.write_preloaded_data = original


class Gate:
    """A write waits for the gate until the training opens it; `wait` times out."""

    def __init__(self):
        self._event = threading.Event()

    def open(self) -> None:
        self._event.set()

    def wait(self) -> None:
        if not self._event.wait(SECONDS):
            raise TimeoutError("the training did not go on while the checkpoint was written")
