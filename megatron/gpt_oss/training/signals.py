# Copyright (c) 2026, the megatron-core gptoss authors.
"""SIGTERM and SIGUSR1 make a run save and exit; a rank exits when its launcher is gone.

Megatron handles one signal (--exit-signal-handler, --exit-signal): after each step the ranks check
whether any of them received it; then all save and exit with status 0. Slurm sends SIGUSR1 before a
time limit (sbatch --signal=USR1@300) and SIGTERM on scancel and preemption.
"""

import ctypes
import os
import signal
import sys
from argparse import Namespace

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_launcher() -> None:
    """Under torchrun, let Linux kill this rank when torchrun exits or is killed.

    Otherwise the rank would continue to train, next to the ranks of the next start. Without
    torchrun the parent may be a shell, which a run may outlive. Call it first: Linux does not
    report a parent that has already exited.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def forward_usr1(args: Namespace) -> None:
    """Forward SIGUSR1 as the signal that Megatron handles."""
    if not args.exit_signal_handler or args.exit_signal == signal.SIGUSR1:
        return

    def forward(number, frame):
        # To this process only: processes that Megatron forks inherit the handler.
        os.kill(os.getpid(), args.exit_signal)

    signal.signal(signal.SIGUSR1, forward)
