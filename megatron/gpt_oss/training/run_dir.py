# Copyright (c) 2026, the megatron-core gptoss authors.
"""The directory of a run: created and locked by rank 0; Megatron's own output goes to a file in it."""

import contextlib
import io
import logging
import os
import sys
from argparse import Namespace
from pathlib import Path
from typing import Iterable, Iterator, TextIO

from megatron.core.dist_checkpointing.checkpoint_names import TRACKER
from megatron.gpt_oss.errors import UsageError
from megatron.gpt_oss.outputs import naming
from megatron.gpt_oss.training.run_file import RUN_FILE
from megatron.gpt_oss.training.run_lock import HOLDER_FILE, LOCK_FILE, RunLock
from megatron.gpt_oss.training.run_record import check_foreign, home


@contextlib.contextmanager
def locked(args: Namespace) -> Iterator[None]:
    """Hold the locks of --run-dir and --save on rank 0.

    Raises:
        UsageError: another run uses the directory, or it cannot be created.
    """
    directory = home(args)
    if directory is None or os.environ["RANK"] != "0":
        yield
        return
    _create(directory, "--run-dir" if args.run_dir else "--save")
    own = [directory / name for name in (RUN_FILE, LOCK_FILE, HOLDER_FILE, "metrics.jsonl")]
    _check_not_in_the_way(own + ([Path(args.save) / TRACKER] if args.save else []))
    check_foreign(directory)
    with contextlib.ExitStack() as locks:
        for path in _lock_directories(directory, args.save):
            locks.enter_context(RunLock(path, lambda line: print(line, flush=True)))
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
    _check_not_in_the_way([path], allow_device=True)
    log = _open_log(path)
    try:
        with contextlib.redirect_stdout(log):
            logging.basicConfig(stream=log, force=True)
            logging.captureWarnings(True)
            yield console
    finally:
        with contextlib.suppress(OSError):  # a full disk, which the error of the run reports
            log.close()


def _lock_directories(directory: Path, save: str | None) -> list[Path]:
    """The directory of a run, and each other one that a run with the same --save locks."""
    found = [directory]
    if save is not None and "://" not in save:  # not object storage
        path = Path(save).resolve()
        if path != directory.resolve() / "checkpoints":
            _create(Path(save), "--save")
            found.append(path)
        elif (path / LOCK_FILE).exists():  # of a run with --save alone
            found.append(path)
        if path.name == "checkpoints" and (path.parent / LOCK_FILE).exists():
            found.append(path.parent)
    return list({path.resolve(): path for path in reversed(found)}.values())[::-1]


def _check_not_in_the_way(paths: Iterable[Path], allow_device: bool = False) -> None:
    """Refuse what a run can neither read nor replace: it would wait for the other end of a pipe."""
    for path in paths:
        is_device = path.is_char_device() or path.is_block_device()
        if path.is_file() or not path.exists() or (is_device and allow_device):
            continue
        kind = "directory" if path.is_dir() else "named pipe or socket"
        raise UsageError(
            f"{path} is a {'device' if is_device else kind}; a run writes a file of this name. "
            "Move it away, or give another directory."
        )


class _LogFile(io.FileIO):
    """A file whose errors of writing have its path."""

    def write(self, data) -> int:
        """See `io.FileIO`."""
        with naming(self.name):
            return super().write(data)


def _open_log(path: Path) -> TextIO:
    """Open the log file, line by line; file names that are not UTF-8 are written with backslashes."""
    return io.TextIOWrapper(
        io.BufferedWriter(_LogFile(path, "a")),
        encoding="utf-8",
        errors="backslashreplace",
        line_buffering=True,
    )


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
