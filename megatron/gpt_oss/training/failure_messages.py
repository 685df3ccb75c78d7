# Copyright (c) 2026, the megatron-core gptoss authors.
"""What ends a run from outside, each as one message: what happened, what is saved, what to do."""

import errno
import os
import re
import sys
import traceback
from argparse import Namespace

import torch
from torch.distributed.checkpoint.api import CheckpointException

from megatron.core.dist_checkpointing.restricted_pickle import RestrictedPickleError
from megatron.gpt_oss.errors import RunError, as_os_sentence
from megatron.training import checkpoint_integrity
from megatron.training.non_finite import NonFiniteError
from megatron.training.saved_schedule import ScheduleError

# What gloo, NCCL and PyTorch's store say when the other end is gone.
_LOST = re.compile(
    "Connection (closed|reset) by (remote )?peer|[Bb]roken pipe|Timed out waiting \\d+ *ms|"
    "[Ss]ocket[ A-Za-z]*(closed|Timeout)|remote process exited|NCCL error|heartbeat|"
    "failed to recv, got 0 bytes|[Cc]onnection (was )?(refused|likely broken)|Application timeout"
)
_UNREAD_METADATA = re.compile(r"global metadata read failed: (.*?); rank local")
_DISK = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is exceeded",
    errno.EFBIG: "a file is larger than this file system or `ulimit -f` allows",
    errno.EROFS: "the file system is read-only",
    errno.EIO: "an input/output error occurred on the disk",
    errno.ENOENT: "a file or directory disappeared during the write",
    errno.ESTALE: "the network file system lost the file",
}


def as_run_error(error: BaseException, args: Namespace) -> RunError | None:
    """The error in one message for the user, or None: let the traceback speak.

    Args:
        error: that ended pretrain().
        args: Megatron's, for what was saved and where.
    """
    if isinstance(error, (NonFiniteError, checkpoint_integrity.CheckpointLoadError, ScheduleError)):
        return RunError(str(error), everywhere=True)
    chain = list(checkpoint_integrity.causes(error))
    for cause in chain:
        # PyTorch hands on the text alone of what kept it from reading .metadata.
        unread = _UNREAD_METADATA.search(" ".join(str(cause).split()))
        if unread or isinstance(cause, RestrictedPickleError):
            return RunError(unread[1] if unread else str(cause))
    for cause in map(_written_error, chain):
        if isinstance(cause, OSError) and cause.errno in _DISK and _is_of_checkpoint(cause, args):
            where = f" ({cause.filename})" if cause.filename else ""
            return RunError(
                f"A checkpoint could not be written: {_DISK[cause.errno]}{where}. "
                f"{_what_is_saved(args)} Free disk space, then rerun the same command."
            )
    if any(isinstance(cause, CheckpointException) and not cause.failures for cause in chain):
        return RunError(  # every rank learns that there was a failure, the first one of what kind
            "A checkpoint could not be written: rank 0 reports the cause. "
            f"{_what_is_saved(args)} Fix the cause, then rerun the same command.",
            everywhere=True,
        )
    for cause in chain:
        text = " ".join(str(cause).split())
        is_lost = _LOST.search(text) is not None
        if isinstance(cause, torch.distributed.DistError) or (
            isinstance(cause, (RuntimeError, ConnectionError)) and is_lost
        ):
            return RunError(
                f"Rank {args.rank} lost contact with another rank, which exited or hangs. See that "
                f"rank's output for the cause. Error on this rank: {text[:200]}. "
                f"{_what_is_saved(args)} Rerun the same command."
            )
    sentence = as_os_sentence(error)
    return RunError(f"{sentence} {_what_is_saved(args)}") if sentence is not None else None


def print_traceback(error: BaseException) -> None:
    """Into Megatron's own output, for whoever wants to know more."""
    traceback.print_exception(error, file=sys.stdout)
    sys.stdout.flush()


def _written_error(error: BaseException) -> BaseException:
    """The OSError of a checkpoint's writer, of which its process hands on the text alone."""
    found = re.search(r"[Ww]orker.*\[Errno (\d+)\] ([^'\n]*)(?:'([^']*)')?", str(error))
    if isinstance(error, OSError) or found is None:
        return error
    return OSError(int(found[1]), found[2], found[3])


def _is_of_checkpoint(error: OSError, args: Namespace) -> bool:
    """A named file may be another one; one that is not there may be one that was to be read."""
    name = str(error.filename or "")
    if not name:
        return error.errno != errno.ENOENT
    inside = bool(args.save) and os.path.abspath(name).startswith(os.path.abspath(args.save))
    return inside and (error.errno != errno.ENOENT or "iter_" in name)


def _what_is_saved(args: Namespace) -> str:
    if not args.save:
        return "Nothing was saved (no --save or --run-dir)."
    try:
        choice = checkpoint_integrity.choose(args.save)
    except (checkpoint_integrity.CheckpointLoadError, OSError):
        return f"{args.save} has no complete checkpoint."
    if choice.iteration < 0:
        return f"{args.save} has no complete checkpoint yet."
    directory = checkpoint_integrity.iteration_dir(args.save, choice.iteration)
    return f"The last complete checkpoint is {directory}."
