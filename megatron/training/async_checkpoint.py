# Copyright (c) 2026, the megatron-core gptoss authors.

"""Checkpoints of --async-save in the training loop.

Only one is written at a time: two would need two copies of the state in CPU memory. When a run ends,
a checkpoint that is still being written is completed if all ranks still respond, and aborted
otherwise; the manifest of its directory then stays incomplete.
"""

from time import time
from typing import Dict, Optional

from megatron.core.dist_checkpointing.strategies.async_thread import seconds_of_last_write

from . import async_utils, step_callbacks
from .utils import print_rank_0

_iteration_of_last_save: Optional[int] = None


def wait_for_previous(iteration: int) -> None:
    """Before a save, wait for the previous checkpoint, with a warning. Collective."""
    global _iteration_of_last_save
    async_utils.maybe_finalize_async_save(blocking=False)
    if not async_utils.is_empty_async_queue():
        print_rank_0(
            f"WARNING: the checkpoint of iteration {iteration} waits: that of iteration "
            f"{_iteration_of_last_save} is still being written. Save less often (--save-interval)."
        )
        step_callbacks.publish(step_callbacks.CheckpointWaits(iteration, _iteration_of_last_save))
        async_utils.maybe_finalize_async_save(blocking=True)
    _iteration_of_last_save = iteration


def finish() -> None:
    """Complete the checkpoint that is being written, when all ranks end the run. Collective."""
    if not async_utils.is_empty_async_queue():
        async_utils.maybe_finalize_async_save(blocking=True)


def abandon() -> None:
    """Abort the checkpoint that is being written, when other ranks may have exited."""
    if not async_utils.is_empty_async_queue():
        async_utils._get_async_calls_queue().close(abort=True)


class SaveTimer:
    """Seconds that one save blocks training for, and seconds of its background write.

    Args:
        start: time() when the save began.
    """

    def __init__(self, start: float) -> None:
        self._blocked_since = start
        self._blocking_seconds = 0.0
        self._in_background = False

    def scheduled(self) -> None:
        """The background write has begun, and training continues."""
        self._blocking_seconds += time() - self._blocked_since
        self._in_background = True

    def finalizing(self) -> None:
        """Every rank has written; finalization blocks training until `seconds` is called."""
        self._blocked_since = time()

    def seconds(self) -> Dict[str, float]:
        """`blocking_seconds`, and `background_seconds` of this rank (0 without --async-save)."""
        background = (seconds_of_last_write() or 0.0) if self._in_background else 0.0
        return {
            "blocking_seconds": self._blocking_seconds + time() - self._blocked_since,
            "background_seconds": background,
        }
