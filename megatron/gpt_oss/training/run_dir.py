# Copyright (c) 2026, the megatron-core gptoss authors.
"""The directory of a run: created and locked by rank 0; Megatron's own output goes to a file in it."""

import contextlib
import logging
import os
import sys
from argparse import Namespace
from pathlib import Path
from typing import Iterator, TextIO

from megatron.gpt_oss.errors import UsageError
from megatron.gpt_oss.outputs import naming
from megatron.gpt_oss.training.run_lock import RunLock
from megatron.gpt_oss.training.run_record import check_foreign, home


@contextlib.contextmanager
def locked(args: Namespace) -> Iterator[None]:
    """Hold the lock of --run-dir (or --save) on rank 0.

    Raises:
        UsageError: another run uses the directory, or it cannot be created.
    """
    directory = home(args)
    if directory is None or os.environ["RANK"] != "0":
        yield
        return
    _create(directory, "--run-dir" if args.run_dir else "--save")
    check_foreign(directory)
    with RunLock(directory, lambda line: print(line, flush=True)):
        yield


@contextlib.contextmanager
def megatron_output(run_dir: Path | None) -> Iterator[TextIO]:
    """Write what Megatron prints, logs and warns to megatron-rank*.log; yield the console.

    Tracebacks stay on stderr. Without a run directory everything stays on the console.
    """
    if run_dir is None:
        yield sys.stdout
        return
    _create(run_dir, "--run-dir")
    console = sys.stdout
    path = run_dir / f"megatron-rank{int(os.environ['RANK'])}.log"
    # Megatron prints arguments, which may be file names that are not UTF-8.
    log = open(path, "a", encoding="utf-8", errors="backslashreplace", buffering=1)
    with log, contextlib.redirect_stdout(log):
        logging.basicConfig(stream=log, force=True)
        logging.captureWarnings(True)
        yield console


def _create(directory: Path, flag: str) -> None:
    if os.path.lexists(directory) and not directory.is_dir():
        kind = "a link that leads nowhere" if directory.is_symlink() else "not a directory"
        raise UsageError(f"{flag} {directory} exists and is {kind}. Give another path.")
    try:
        with naming(directory):
            directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"{flag} {directory} cannot be created: {error.strerror}. Give another path."
        ) from error
