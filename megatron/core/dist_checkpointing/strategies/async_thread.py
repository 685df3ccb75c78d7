# Copyright (c) 2026, the megatron-core gptoss authors.

"""Write the files of a checkpoint in a thread of the training process, during training.

Why a thread:

- A forked process inherits locks that threads of gloo, NCCL, autograd and OpenMP hold, but not the
  threads, and must not use the inherited CUDA context.
- A spawned process needs a second CUDA context on every GPU. It receives CPU tensors through
  /dev/shm, which containers limit to 64 MB, and they share memory with the training, which the next
  update changes.
- A thread has neither problem. The slow parts, write and fsync, release the GIL.

The thread writes a copy in CPU memory. schedule_async_call() makes it before it returns, so before
the next update. There is one copy of what this rank saves, until the checkpoint is finalised.
"""

import threading
from time import monotonic
from typing import Any, List, Optional

from megatron.core import device_utils

from .async_utils import AsyncCaller, AsyncRequest

_seconds_of_last_write: Optional[float] = None


class WriteAborted(RuntimeError):
    """The write was aborted: the run ends without this checkpoint."""


def seconds_of_last_write() -> Optional[float]:
    """Seconds that the last finished background write of this process took; None: no write."""
    return _seconds_of_last_write


class ThreadAsyncCaller(AsyncCaller):
    """Runs one AsyncRequest in a thread; the main thread of every rank finalises the checkpoint.

    The thread is not a daemon: the interpreter waits for it at exit instead of freeing the memory
    that it writes. close(abort=True) ends it after the current tensor.
    """

    def __init__(self) -> None:
        self._thread: Optional[threading.Thread] = None
        self._error: Optional[BaseException] = None
        self._aborted = threading.Event()
        # A reference in the main thread, which uses the device, so that it frees pinned memory.
        self._buckets: List[Any] = []

    def schedule_async_call(self, async_req: AsyncRequest) -> None:
        """Copy the tensors of the request, and start the write.

        The interface calls it collective; this implementation does not communicate.

        Args:
            async_req: with `preload_fn`, its second argument is the list of write buckets. This
                method empties it, because it holds the only reference to tensors that were
                gathered for the save.
        """
        if async_req.async_fn is None:
            return  # This rank has nothing to write.
        args = list(async_req.async_fn_args)
        if async_req.preload_fn is not None:
            self._buckets = args[1] = self._snapshot(async_req.preload_fn(), args[1])
        device = device_utils.current_device()

        def write() -> None:
            global _seconds_of_last_write
            start = monotonic()
            try:
                # A new thread is on device 0, where freeing memory would create a CUDA context.
                device_utils.set_device(device)
                async_req.async_fn(*args, **async_req.async_fn_kwargs)
            except BaseException as error:  # is_current_async_call_done() raises it.
                self._error = error
            finally:
                _seconds_of_last_write = monotonic() - start

        self._thread = threading.Thread(target=write, name="checkpoint-writer")
        self._thread.start()

    def is_current_async_call_done(self, blocking: bool = False, no_dist: bool = False) -> bool:
        """Whether every rank has written its files. Collective, unless `no_dist`.

        Args:
            blocking: wait for the thread.
            no_dist: check this rank only.
        Raises:
            BaseException: the write ended without a result. Errors of the file system writer are a
                result, which finalisation raises on all ranks.
        """
        if blocking and self._thread is not None:
            self._thread.join()
        is_alive = self._thread is not None and self._thread.is_alive()
        is_done = not is_alive if no_dist else bool(self.sync_all_async_calls(int(is_alive)))
        if is_done:
            self.close()
            if self._error is not None:
                raise self._error
        return is_done

    def close(self, abort: bool = False) -> None:
        """Wait for the thread; with `abort`, only until it has written the current tensor."""
        if abort:
            self._aborted.set()
        if self._thread is not None:
            self._thread.join()
        self._thread = None
        self._buckets = []

    def __del__(self) -> None:
        pass

    def _snapshot(self, preloaded: List[Any], originals: List[Any]) -> List[Any]:
        """Copy the write buckets to CPU memory that only this caller uses.

        `preloaded` holds copies of device tensors, but the CPU tensors themselves, such as
        optimizer state. References to the originals are dropped one by one, so that tensors that
        were made for this save exist only once.
        """
        buckets = []
        for (path, key, (objects, tensors)), (_, _, (_, sources)) in zip(preloaded, originals):
            is_preloaded_list = tensors is not sources
            copies = _AbortableList(self._aborted)
            for index, (item, tensor) in enumerate(tensors):
                copies.append((item, tensor.clone() if tensor is sources[index][1] else tensor))
                sources[index] = (item, None)
                if is_preloaded_list:
                    tensors[index] = (item, None)
            sources.clear()
            buckets.append((path, key, (objects, copies)))
        return buckets


class _AbortableList(list):
    """A list whose iteration raises WriteAborted once an event is set."""

    def __init__(self, event: threading.Event) -> None:
        super().__init__()
        self._event = event

    def __iter__(self):
        for item in super().__iter__():
            if self._event.is_set():
                raise WriteAborted("the checkpoint was aborted")
            yield item
