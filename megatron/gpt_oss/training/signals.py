# Copyright (c) 2026, the megatron-core gptoss authors.
"""SIGTERM and SIGUSR1 both ask a run to save and end; a rank whose launcher is gone ends at once.

Megatron listens to one signal (--exit-signal-handler, --exit-signal): after each step every rank
learns whether any of them received it; then all save, and leave with status 0. Slurm sends SIGUSR1
before a time limit (sbatch --signal=USR1@300) and SIGTERM on scancel and preemption.
"""

import ctypes
import os
import signal
import sys
from argparse import Namespace

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_launcher() -> None:
    """Under torchrun, let Linux end this rank when torchrun is gone, killed or not.

    Nobody would end it otherwise, or start it again: it trains on, and its next start beside it.
    Without torchrun the parent may be a shell, which a run may well outlive. Call it first of all:
    of a launcher that is gone already, Linux says nothing.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def forward_usr1(args: Namespace) -> None:
    """Let SIGUSR1 do what the signal does that Megatron listens to."""
    if not args.exit_signal_handler or args.exit_signal == signal.SIGUSR1:
        return

    def forward(number, frame):
        # To this process: what Megatron forks inherits the handler.
        os.kill(os.getpid(), args.exit_signal)

    signal.signal(signal.SIGUSR1, forward)
