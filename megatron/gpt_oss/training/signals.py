# Copyright (c) 2026, the megatron-core gptoss authors.
"""SIGTERM and SIGUSR1 both ask a run to save and end.

Megatron listens to one signal (--exit-signal-handler, --exit-signal): after each step every rank
learns whether any of them received it; then all save, and leave with status 0. Slurm sends SIGUSR1
before a time limit (sbatch --signal=USR1@300) and SIGTERM on scancel and preemption.
"""

import os
import signal
from argparse import Namespace


def forward_usr1(args: Namespace) -> None:
    """Let SIGUSR1 do what the signal does that Megatron listens to."""
    if not args.exit_signal_handler or args.exit_signal == signal.SIGUSR1:
        return

    def forward(number, frame):
        # To this process: what Megatron forks inherits the handler.
        os.kill(os.getpid(), args.exit_signal)

    signal.signal(signal.SIGUSR1, forward)
