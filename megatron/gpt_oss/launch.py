# Copyright (c) 2026, the megatron-core gptoss authors.

"""`gptoss launch`: torchrun with the exit status of the failed rank and without a traceback.

Three things differ from torchrun. torchrun exits with status 1 and prints its own stack of 25
lines, except for pretrain_gpt_oss.py (`torchrun_exit.py`); this command exits with the status of
the rank that failed first, for every script. SIGUSR1 ends torchrun; here it is forwarded to the
ranks. torchrun kills the ranks 30 s after SIGTERM; here they have `SECONDS_TO_SAVE`.
"""

import argparse
import logging
import os
import re
import signal
from typing import NoReturn, Sequence

from megatron.gpt_oss.errors import UsageError, as_refusal
from megatron.gpt_oss.torchrun_exit import AGENT_LOGGERS, exit_status

SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1")
SECONDS_TO_SAVE = 600


def launch(words: Sequence[str]) -> None:
    """Start the ranks of this machine, as `torchrun WORDS` does, and wait for them.

    Args:
        words: options of torchrun, the script, and arguments of the script.
    Raises:
        UsageError: torchrun rejects the options.
        SystemExit: a rank failed. The status is that of the rank that failed first, or 128 + the
            number of the signal that killed it.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser, parse_min_max_nnodes, run

    for name in ("torch.distributed.elastic", *AGENT_LOGGERS):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SECONDS_TO_SAVE))  # PyTorch 2.13
    parser = get_args_parser()
    parser.prog = "gptoss launch"
    parser.error = _raise_usage_error
    if "--signals-to-handle" in parser._option_string_actions:  # since PyTorch 2.10
        parser.set_defaults(signals_to_handle=",".join(_handled_signals()))
    args = parser.parse_args(list(words))
    try:
        machines = parse_min_max_nnodes(args.nnodes)[1]
    except (ValueError, RuntimeError) as error:
        raise UsageError(f"torchrun refuses these options: {error}") from error
    _check(args, machines)
    os.environ.setdefault("OMP_NUM_THREADS", str(_threads(args.nproc_per_node)))
    try:
        run(args)
    except (ChildFailedError, SignalException) as ended:
        raise SystemExit(exit_status(ended)) from ended
    except (ValueError, AssertionError) as error:  # of --nproc-per-node, --nnodes and their like
        raise as_refusal(error, "torchrun refuses these options") from error


def _handled_signals() -> list[str]:
    """SIGNALS, without those that this process ignores: nohup ignores SIGHUP."""
    ignored = signal.SIG_IGN
    return [name for name in SIGNALS if signal.getsignal(getattr(signal, name)) != ignored]


def _check(args: argparse.Namespace, machines: int) -> None:
    """Refuse what torchrun asserts without a message, or waits for."""
    for name in ("nproc_per_node", "monitor_interval"):
        value = str(getattr(args, name))
        if re.fullmatch(r"-?[0-9.]+", value) and float(value) <= 0:
            raise UsageError(f"--{name.replace('_', '-')} {value}: expected more than 0.")
    if args.standalone and machines > 1:
        raise UsageError(
            f"--standalone is for one machine, but --nnodes is {args.nnodes}. Drop one of them; "
            "several machines need --rdzv-endpoint."
        )


def _threads(processes: str) -> int:
    """OMP_NUM_THREADS of each rank; torchrun's 1 is slow for a CPU-offloaded optimizer."""
    cores = os.cpu_count() or 1
    return max(1, min(8, cores // int(processes) if re.fullmatch("[1-9][0-9]*", processes) else 1))


def _raise_usage_error(message: str) -> NoReturn:
    raise UsageError(
        f"{message[:1].upper()}{message[1:]}. `gptoss launch --help` lists all options."
    )
