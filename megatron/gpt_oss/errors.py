# Copyright (c) 2026, the megatron-core gptoss authors.

"""The errors that reach a user, each as one sentence."""

import atexit
import os
import re
import signal
import sys
import time
import traceback
from typing import Callable, NoReturn

EXIT_FAULT = 1
EXIT_USAGE = 2
SECONDS_FOR_RANK_0 = 3.0
# For what a failed process still does after its message; a communicator that nobody took down can
# wait for ever in its destructor, and torchrun for the process.
SECONDS_TO_EXIT = 30


class UsageError(ValueError):
    """A mistake in what the user asked for: says what is wrong, the value found, what to do."""


class PresetError(UsageError):
    """An unknown preset, or a flag that contradicts the chosen one."""


class CheckpointError(UsageError):
    """A checkpoint that is missing, incomplete, or of another model."""


class RunError(RuntimeError):
    """What ended a run that was well begun, in words for the user.

    Args:
        message: what happened, what is saved, what to do.
        everywhere: every rank has the same message, so that rank 0 alone need print it.
    """

    def __init__(self, message: str, everywhere: bool = False):
        super().__init__(message)
        self.everywhere = everywhere


def as_refusal(error: BaseException) -> UsageError | None:
    """What Megatron refuses while it reads arguments and builds the model, as one sentence.

    It checks both with assert or ValueError; a bare assert says only which condition failed.

    Returns:
        None for what is a sentence already, and for any other error.
    """
    if isinstance(error, UsageError) or not isinstance(error, (AssertionError, ValueError)):
        return None
    text = " ".join(str(error).split())
    if not text:
        line = traceback.extract_tb(error.__traceback__)[-1].line or ""
        text = f"this must hold: {line.removeprefix('assert ')}{_values_in(line, error)}"
    return UsageError(f"Megatron refuses these arguments: {text}")


def _values_in(line: str, error: BaseException) -> str:
    """The values of `args.NAME` in the line that raised, in brackets."""
    last = error.__traceback__
    while last.tb_next is not None:
        last = last.tb_next
    args = last.tb_frame.f_locals.get("args")
    names = dict.fromkeys(re.findall(r"\bargs\.(\w+)", line))
    values = [
        f"--{name.replace('_', '-')} is {getattr(args, name)}"
        for name in names
        if hasattr(args, name)
    ]
    return f" ({', '.join(values)})" if values else ""


def exit_with(error: Exception, code: int = EXIT_USAGE, everywhere: bool = True) -> NoReturn:
    """Print an error as one line and leave with an exit code.

    Under torchrun every rank may meet the same one (`everywhere`); only rank 0 prints it then. The
    others leave it the time to: torchrun ends all ranks when the first one leaves. Whoever is still
    there after that met it alone, and prints it.
    """
    if everywhere and int(os.environ.get("RANK", "0")) != 0:
        time.sleep(SECONDS_FOR_RANK_0)
    print(f"error: {error}", file=sys.stderr, flush=True)
    raise SystemExit(code)


def run_main(main: Callable[[], object]) -> None:
    """Run an entry point; a UsageError is one sentence on stderr and exit code 2, a RunError 1.

    A process that failed ends, whatever its process groups wait for: by SIGALRM, SECONDS_TO_EXIT
    after the interpreter began to.
    """
    try:
        main()
    except UsageError as error:
        atexit.register(_exit_in_time)
        exit_with(error)
    except RunError as error:
        atexit.register(_exit_in_time)
        exit_with(error, EXIT_FAULT, error.everywhere)
    except Exception:
        atexit.register(_exit_in_time)
        raise


def _exit_in_time() -> None:
    """Not a thread: the interpreter stops those before C++ takes down what may wait."""
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(SECONDS_TO_EXIT)
