# Copyright (c) 2026, the megatron-core gptoss authors.

"""The errors that reach a user, each as one sentence."""

import os
import sys
import time
from typing import Callable, NoReturn

EXIT_USAGE = 2
SECONDS_FOR_RANK_0 = 3.0


class UsageError(ValueError):
    """A mistake in what the user asked for: says what is wrong, the value found, what to do."""


class PresetError(UsageError):
    """An unknown preset, or a flag that contradicts the chosen one."""


class CheckpointError(UsageError):
    """A checkpoint that is missing, incomplete, or of another model."""


def exit_with(error: Exception) -> NoReturn:
    """Print an error as one line and leave with exit code 2.

    Under torchrun every rank meets the same mistake; only rank 0 prints it. The others leave it
    the time to: torchrun ends all ranks when the first one leaves.
    """
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"error: {error}", file=sys.stderr, flush=True)
    else:
        time.sleep(SECONDS_FOR_RANK_0)
    raise SystemExit(EXIT_USAGE)


def run_main(main: Callable[[], object]) -> None:
    """Run an entry point; a UsageError becomes one sentence on stderr and exit code 2."""
    try:
        main()
    except UsageError as error:
        exit_with(error)
