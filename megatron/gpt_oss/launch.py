# Copyright (c) 2026, the megatron-core gptoss authors.

"""`gptoss launch`: torchrun, with the exit status of the rank that failed and no traceback of its own.

torchrun ends with status 1 and 25 lines of its own stack whatever the ranks said. It leaves a signal
the ranks do not get (SIGUSR1) to end it, and 30 s to a save that SIGTERM asked for.
"""

import logging
import os
import socket
import sys
from typing import NoReturn, Sequence

from megatron.gpt_oss.errors import EXIT_FAULT, UsageError

SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
SECONDS_TO_SAVE = 600


def launch(words: Sequence[str]) -> None:
    """Start the ranks of this machine, as `torchrun WORDS` does, and wait for them.

    Args:
        words: torchrun's options, the script, and what belongs to the script.
    Raises:
        UsageError: torchrun does not know these options.
        SystemExit: a rank failed. The status is that of the first one; of a signal, 128 + its number.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser, run

    # They warn of every process that torchrun ends; what a rank died of is said below.
    for name in ("torch.distributed.elastic", "torch.distributed.elastic.agent.server.api"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SECONDS_TO_SAVE))  # PyTorch 2.13
    parser = get_args_parser()
    parser.prog = "gptoss launch"
    parser.error = _refuse
    if "--signals-to-handle" in parser._option_string_actions:  # since PyTorch 2.10
        parser.set_defaults(signals_to_handle=SIGNALS)
    args = parser.parse_args(list(words))
    os.environ.setdefault("OMP_NUM_THREADS", str(_threads(args.nproc_per_node)))
    try:
        run(args)
    except ChildFailedError as failed:
        raise SystemExit(_status(failed)) from failed
    except SignalException as ended:
        raise SystemExit(128 + ended.sigval) from ended
    except ValueError as error:  # of --nproc-per-node, --nnodes and their like
        raise UsageError(f"torchrun refuses these options: {error}") from error


def _threads(processes: str) -> int:
    """Of each rank: torchrun gives them one, and an optimizer on the host wants more."""
    cores = os.cpu_count() or 1
    return max(1, min(8, cores // int(processes) if processes.isdigit() and int(processes) else 1))


def _status(failed) -> int:
    """Exit status of the rank that failed first; one that a signal ended said nothing itself."""
    rank, first = failed.get_first_failure()
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


def _refuse(message: str) -> NoReturn:
    raise UsageError(
        f"{message[:1].upper()}{message[1:]}. `gptoss launch --help` lists all options."
    )
