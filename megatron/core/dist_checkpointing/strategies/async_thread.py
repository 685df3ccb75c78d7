# Copyright (c) 2026, the megatron-core gptoss authors.

"""A checkpoint's files written by a thread of the training process, while the training goes on.

Why a thread. A forked process inherits the locks that gloo's, NCCL's, autograd's and OpenMP's
threads hold at that moment but not the threads, and must not touch the CUDA context that it also
inherits. A spawned one needs CUDA in a second process on every GPU, and gets tensors of the host
through /dev/shm, which containers limit to 64 MB; what it gets is moreover the training's own
memory, which the next update changes. A thread shares neither problem: what costs time in it,
copying bytes to files and syncing them, is done without the interpreter's lock.

What it writes is a copy in host memory, made before schedule_async_call() returns, and so before
the next update: one copy of what this rank saves, until the checkpoint is finalised.
"""

import threading
from time import monotonic
from typing import Any, List, Optional

from megatron.core import device_utils

from .async_utils import AsyncCaller, AsyncRequest

_seconds_of_last_write: Optional[float] = None


class Abandoned(RuntimeError):
    """The write was given up: the run ends without this checkpoint."""


def seconds_of_last_write() -> Optional[float]:
    """How long this process' last finished background write took; None: there was none."""
    return _seconds_of_last_write


class ThreadAsyncCaller(AsyncCaller):
    """Runs one AsyncRequest in a thread; finalisation stays with the training, on all ranks.

    The thread is no daemon: an interpreter that ends waits for it, instead of tearing down the
    memory that it writes. close(abort=True) ends it after the tensor that it is at.
    """

    def __init__(self) -> None:
        self._thread: Optional[threading.Thread] = None
        self._error: Optional[BaseException] = None
        self._abandoned = threading.Event()
        # Also kept here, so that pinned memory is freed by the thread that uses the device.
        self._buckets: List[Any] = []

    def schedule_async_call(self, async_req: AsyncRequest) -> None:
        """Copy what the request writes, and start to write it. Collective by contract, not in fact.

        Args:
            async_req: with `preload_fn`, its second argument is the list of write buckets, which
                this empties: it holds the only reference to what was gathered for the save.
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
                # A new thread is at device 0, where freeing memory must not open a context.
                device_utils.set_device(device)
                async_req.async_fn(*args, **async_req.async_fn_kwargs)
            except BaseException as error:  # Raised where the training looks after the request.
                self._error = error
            finally:
                _seconds_of_last_write = monotonic() - start

        self._thread = threading.Thread(target=write, name='checkpoint-writer')
        self._thread.start()

    def is_current_async_call_done(self, blocking: bool = False, no_dist: bool = False) -> bool:
        """Whether every rank has written its files. Collective, unless `no_dist`.

        Args:
            blocking: wait until it is so.
            no_dist: ask for this rank alone.
        Raises:
            Whatever ended the write without a result; what the file system's writer meets is a
            result, which the finalisation raises on all ranks.
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
        """Wait for the thread; with `abort`, until the tensor that it writes is written."""
        if abort:
            self._abandoned.set()
        if self._thread is not None:
            self._thread.join()
        self._thread = None
        self._buckets = []

    def __del__(self) -> None:
        pass

    def _snapshot(self, preloaded: List[Any], originals: List[Any]) -> List[Any]:
        """Write buckets whose tensors are this caller's own, in host memory.

        `preloaded` holds copies of the tensors of a device, but host tensors themselves: those may
        be the optimizer's state, or the model on a CPU. One original after the other is let go,
        so that no more than one copy exists of what was made for this save.
        """
        buckets = []
        for (path, key, (objects, tensors)), (_, _, (_, sources)) in zip(preloaded, originals):
            is_preloaded_list = tensors is not sources
            copies = _Until(self._abandoned)
            for index, (item, tensor) in enumerate(tensors):
                copies.append((item, tensor.clone() if tensor is sources[index][1] else tensor))
                sources[index] = (item, None)
                if is_preloaded_list:
                    tensors[index] = (item, None)
            sources.clear()
            buckets.append((path, key, (objects, copies)))
        return buckets


class _Until(list):
    """A list that is not gone through to its end once an event is set."""

    def __init__(self, event: threading.Event) -> None:
        super().__init__()
        self._event = event

    def __iter__(self):
        for item in super().__iter__():
            if self._event.is_set():
                raise Abandoned('the checkpoint was given up')
            yield item
