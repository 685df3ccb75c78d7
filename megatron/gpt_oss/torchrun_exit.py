# Copyright (c) 2026, the megatron-core gptoss authors.

"""How torchrun ends when a rank fails: exit status and message.

`gptoss launch` uses this module. A plain torchrun loads it through the entry point group
`torchrun.handlers` (PyTorch's plug-ins that register rendezvous backends), and then ends in the
same way, but only if the script is pretrain_gpt_oss.py. Imports neither torch nor Megatron, because
torchrun loads the plug-in for every script.
"""

import functools
import logging
import socket
import sys
from pathlib import Path
from typing import Callable, NoReturn

from megatron.gpt_oss.errors import EXIT_FAULT

SCRIPT = "pretrain_gpt_oss.py"
# They log every process that torchrun ends; `exit_status` reports why the first rank failed.
AGENT_LOGGERS = (
    "torch.distributed.elastic.agent.server.api",
    "torch.distributed.elastic.multiprocessing.api",
)


def exit_status(error: BaseException) -> int | None:
    """Exit status for an error of torchrun's agent; prints a message if a signal killed the rank.

    Returns:
        For failed ranks the status of the one that failed first, or 128 + the number of the signal
        that killed it. For a signal that ended torchrun 128 + its number. None for other errors.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if isinstance(error, SignalException):
        return 128 + error.sigval
    if not isinstance(error, ChildFailedError):
        return None
    rank, first = error.get_first_failure()
    if first.exitcode > 0:
        return first.exitcode
    number = -first.exitcode
    print(
        f"error: rank {rank}, process {first.pid} on {socket.gethostname()}, "
        f"was killed by {first.signal_name()}. Rerun the same command: the run resumes from its "
        "last checkpoint.",
        file=sys.stderr,
        flush=True,
    )
    return 128 + number if number else EXIT_FAULT


def load_plugin() -> Callable:
    """Entry point that torchrun calls when it starts.

    Returns:
        Constructor of a rendezvous backend, which the entry point group requires. It raises
        ValueError, because no such backend exists.
    """
    # The exact check needs torchrun's parser, which is not imported yet.
    if any(Path(word).name == SCRIPT for word in sys.argv[1:]):
        sys.excepthook = functools.partial(_exit, sys.excepthook)
        for name in AGENT_LOGGERS:
            logging.getLogger(name).addFilter(_keeps)
    return _no_rendezvous


def _no_rendezvous(params) -> NoReturn:
    raise ValueError(f"{params.backend} is not a rendezvous backend.")


@functools.cache
def _runs_script() -> bool:
    """Whether this process is torchrun and starts SCRIPT."""
    from torch.distributed.run import parse_args

    try:
        return Path(parse_args(sys.argv[1:]).training_script).name == SCRIPT
    except SystemExit:  # not a command line of torchrun
        return False


def _exit(excepthook: Callable, kind, error: BaseException, traceback) -> None:
    """sys.excepthook: exit with the rank's status, without torchrun's traceback."""
    status = exit_status(error) if _runs_script() else None
    if status is None:
        return excepthook(kind, error, traceback)
    raise SystemExit(status)


def _keeps(record: logging.LogRecord) -> bool:
    """Filter of AGENT_LOGGERS: drops warnings and errors, keeps what LOGLEVEL=INFO asks for."""
    return record.levelno < logging.WARNING or not _runs_script()
