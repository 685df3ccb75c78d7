# Copyright (c) 2026, the megatron-core gptoss authors.
"""Messages for runs that fail for a known cause: what happened, what is saved, what to do."""

import contextlib
import errno
import os
import re
import sys
import traceback
from argparse import Namespace

import torch
from torch.distributed.checkpoint.api import CheckpointException

from megatron.core.dist_checkpointing.checkpoint_names import TRACKER
from megatron.core.dist_checkpointing.restricted_pickle import RestrictedPickleError
from megatron.gpt_oss.errors import RunError, as_os_sentence, os_cause
from megatron.training import checkpoint_integrity
from megatron.training.non_finite import NonFiniteError
from megatron.training.saved_schedule import ScheduleError

# Messages of gloo, NCCL and PyTorch's store when another rank has exited.
_LOST = re.compile(
    "Connection (closed|reset) by (remote )?peer|[Bb]roken pipe|Timed out waiting \\d+ *ms|"
    "[Ss]ocket[ A-Za-z]*(closed|Timeout)|remote process exited|NCCL error|heartbeat|"
    "failed to recv, got 0 bytes|[Cc]onnection (was )?(refused|likely broken)|Application timeout"
)
_UNREAD_METADATA = re.compile(r"global metadata read failed: (.*?); rank local")
# Errors of the operating system that end the write of a checkpoint.
_WRITE_ERRORS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EIO,
    errno.ENOENT,
    errno.ESTALE,
    errno.EISDIR,
)


def as_run_error(error: BaseException, args: Namespace) -> RunError | None:
    """The error as one message for the user; None if the cause is unknown.

    Args:
        error: the error that ended pretrain().
        args: Megatron's arguments.
    """
    if isinstance(error, (NonFiniteError, checkpoint_integrity.CheckpointLoadError, ScheduleError)):
        return RunError(str(error), everywhere=True)
    chain = list(checkpoint_integrity.causes(error))
    for cause in chain:
        # PyTorch passes on only the text of an error while reading .metadata.
        unread = _UNREAD_METADATA.search(" ".join(str(cause).split()))
        if unread or isinstance(cause, RestrictedPickleError):
            return RunError(unread[1] if unread else str(cause))
    for cause in map(_written_error, chain):
        if (
            isinstance(cause, OSError)
            and cause.errno in _WRITE_ERRORS
            and _is_of_checkpoint(cause, args)
        ):
            where = f" ({cause.filename})" if cause.filename else ""
            return RunError(
                f"A checkpoint could not be written: {_write_cause(cause)}{where}. "
                f"{_what_is_saved(args)} {_write_hint(cause)}, then rerun the same command."
            )
    if any(isinstance(cause, CheckpointException) and not cause.failures for cause in chain):
        return RunError(  # every rank gets this error, but only rank 0 its cause
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


def _write_cause(error: OSError) -> str:
    if error.errno == errno.ENOENT:
        return "a file or directory disappeared during the write"
    if error.errno == errno.EISDIR:
        return "a directory has the name of one of its files"
    return os_cause(error.errno)


def _write_hint(error: OSError) -> str:
    return "Move the directory away" if error.errno == errno.EISDIR else "Free disk space"


def print_traceback(error: BaseException) -> None:
    """Print the traceback to Megatron's own output."""
    with contextlib.suppress(OSError):  # the disk may be full, which is reported then
        traceback.print_exception(error, file=sys.stdout)
        sys.stdout.flush()


def _written_error(error: BaseException) -> BaseException:
    """The OSError of a checkpoint writer, from the text that its process passes on."""
    found = re.search(r"[Ww]orker.*\[Errno (\d+)\] ([^'\n]*)(?:'([^']*)')?", str(error))
    if isinstance(error, OSError) or found is None:
        return error
    return OSError(int(found[1]), found[2], found[3])


def _is_of_checkpoint(error: OSError, args: Namespace) -> bool:
    """Whether an OSError is of a checkpoint that is being written, or of the tracker file.

    --save may also hold run.json and the dataset cache.
    """
    if not error.filename:
        return error.errno != errno.ENOENT
    name, save = (
        os.path.abspath(os.fsdecode(error.filename)),
        os.path.abspath(args.save or os.devnull),
    )
    within = os.path.relpath(name, save)
    return within == "." or within.startswith("iter_") or within == TRACKER


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
