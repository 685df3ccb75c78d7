# Copyright (c) 2026, the megatron-core gptoss authors.

"""A checkpoint that is written while the training goes on, as the training loop meets it.

One at a time: two would hold two copies of the state in host memory. What is unfinished when a run
ends is finished where all ranks still answer, else given up: the folder's manifest says so then.
"""

from time import time
from typing import Dict, Optional

from megatron.core.dist_checkpointing.strategies.async_thread import seconds_of_last_write

from . import async_utils, step_callbacks
from .utils import print_rank_0

_iteration_of_last_save: Optional[int] = None


def wait_for_previous(iteration: int) -> None:
    """Before a save: wait until the one before is complete, and say so. Collective."""
    global _iteration_of_last_save
    async_utils.maybe_finalize_async_save(blocking=False)
    if not async_utils.is_empty_async_queue():
        print_rank_0(
            f'WARNING: the checkpoint of iteration {iteration} waits: that of iteration '
            f'{_iteration_of_last_save} is still being written. Save less often (--save-interval).'
        )
        step_callbacks.checkpoint_waits(iteration=iteration, waits_for=_iteration_of_last_save)
        async_utils.maybe_finalize_async_save(blocking=True)
    _iteration_of_last_save = iteration


def finish() -> None:
    """Complete what is being written, at the end of a run that all ranks end. Collective."""
    if not async_utils.is_empty_async_queue():
        async_utils.maybe_finalize_async_save(blocking=True)


def abandon() -> None:
    """Give up what is being written, in a run of which other ranks may be gone."""
    if not async_utils.is_empty_async_queue():
        async_utils._get_async_calls_queue().close(abort=True)


class SaveClock:
    """Seconds of one save: of the training, which stands still, and of the write beside it.

    Args:
        since: time() at the save's beginning.
    """

    def __init__(self, since: float) -> None:
        self._since = since
        self._held_up = 0.0
        self._in_background = False

    def scheduled(self) -> None:
        """The training goes on, the write has begun."""
        self._held_up += time() - self._since
        self._in_background = True

    def finalising(self) -> None:
        """Every rank has written; the training stands still again, until seconds() is asked."""
        self._since = time()

    def seconds(self) -> Dict[str, float]:
        """`seconds_held_up`, and `seconds_in_background`: of this rank's write, 0 in the
        foreground."""
        background = (seconds_of_last_write() or 0.0) if self._in_background else 0.0
        return {
            'seconds_held_up': self._held_up + time() - self._since,
            'seconds_in_background': background,
        }
