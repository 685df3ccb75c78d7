# Copyright (c) 2026, the megatron-core gptoss authors.

"""Errors for the user, each as one sentence."""

import atexit
import contextlib
import errno
import functools
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import traceback
from typing import Callable, Iterator, NoReturn

EXIT_FAULT = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 128 + signal.SIGINT  # as shells report it
SECONDS_FOR_RANK_0 = 6.0
# A failed process exits at most this long after its message.
SECONDS_TO_EXIT = 12


# Words longer than any path: names from damaged files, which are shortened.
_LONG_WORD = re.compile(r"\S{400,}")


def _shortened(message: object) -> str:
    return _LONG_WORD.sub(lambda word: f"{word[0][:200]}...{word[0][-60:]}", str(message))


class UsageError(ValueError):
    """A mistake of the user: the message names what is wrong, the value, and what to do."""

    def __init__(self, message: object = ""):
        super().__init__(_shortened(message))


class PresetError(UsageError):
    """An unknown preset, or a flag that contradicts the chosen one."""


class CheckpointError(UsageError):
    """A checkpoint is missing, incomplete, or of another model."""


class RunError(RuntimeError):
    """An error with a known cause that ended a run.

    Args:
        message: what happened, what is saved, what to do.
        everywhere: every rank has the same message, so only rank 0 prints it.
    """

    def __init__(self, message: str, everywhere: bool = False):
        super().__init__(_shortened(message))
        self.everywhere = everywhere


def as_refusal(
    error: BaseException, by: str = "Megatron refuses these arguments"
) -> UsageError | None:
    """A refusal of Megatron while it validates arguments or builds the model, as UsageError.

    Megatron uses assert and ValueError; for an assert without a message, the failed condition is
    named.

    Args:
        by: begins the message.
    Returns:
        None for a UsageError, and for any other error.
    """
    if isinstance(error, UsageError) or not isinstance(error, (AssertionError, ValueError)):
        return None
    text = " ".join(str(error).split())
    if not text:
        line = traceback.extract_tb(error.__traceback__)[-1].line or ""
        text = f"this condition must hold: {line.removeprefix('assert ')}{_values_in(line, error)}"
    return UsageError(f"{by}: {text}")


def _values_in(line: str, error: BaseException) -> str:
    """The values of `args.NAME` in the line that raised, in parentheses."""
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


# Errors of the operating system and what to do. Any other errno is a defect of this code.
_MAKE_ROOM = "Free disk space there, or give a path on another disk."
_CAUSES = {
    errno.ENOSPC: ("no space left on the disk", _MAKE_ROOM),
    errno.EDQUOT: ("the disk quota is exceeded", _MAKE_ROOM),
    errno.EFBIG: (
        "the file is larger than the file system or `ulimit -f` allows",
        "Raise the limit, or give a path on another disk.",
    ),
    errno.EROFS: ("the file system is read-only", "Give a writable path."),
    errno.EACCES: ("permission denied", "Change its permissions, or give another path."),
    errno.EPERM: ("the operation is not permitted", "Change its owner, or give another path."),
    errno.EIO: ("an input/output error occurred on the disk", "Check the disk, then rerun."),
    errno.ESTALE: ("the network file system lost the file", "Rerun the command."),
    errno.ENOENT: ("no such file or directory", "Check the path."),
    errno.ENOTDIR: ("a part of the path is a file, not a directory", "Check the path."),
    errno.EISDIR: ("it is a directory", "Give the path of a file."),
    errno.ENOTEMPTY: ("the directory is not empty", "Give another one, or empty it."),
    errno.EEXIST: ("it already exists", "Give another path."),
    errno.ELOOP: ("the symbolic links of the path form a loop", "Remove them."),
    errno.ENAMETOOLONG: ("the name is too long for the file system", "Give a shorter one."),
    errno.EBUSY: ("it is in use, or a mount point", "Give another path, or retry later."),
    errno.ETXTBSY: ("it is a running program", "Give another path."),
    errno.EXDEV: ("it is on another file system", "Give a path on the same one."),
    errno.EMFILE: ("this process has too many open files", "Raise `ulimit -n`."),
    errno.ENFILE: ("the machine has too many open files", "Close some, then rerun."),
    errno.ENXIO: ("the device does not exist", "Give another path."),
    errno.ENODEV: ("the device does not exist", "Give another path."),
    errno.ENOTCONN: ("the file system is not connected", "Remount it."),
    errno.EHOSTDOWN: ("the file server does not respond", "Retry when it does."),
    errno.ETIMEDOUT: ("the file server does not respond", "Retry when it does."),
    errno.ENOLCK: ("the file system has no locks left", "Retry later."),
    errno.EOPNOTSUPP: ("the file system does not support the operation", "Give another path."),
}
# Errors with which libraries pass on an error of the operating system: as text or, in torch.save,
# as the error's context.
_WRAPPERS = (
    "RuntimeError",
    "Exception",
    "SafetensorError",
    "CheckpointException",
    "ArrowException",
)

# What PyTorch's CPU allocator says in a RuntimeError.
_ALLOCATION_FAILED = re.compile(r"can't allocate memory: you tried to allocate \d+ bytes")
_WRITE_FAILED = re.compile("PytorchStreamWriter|inline_container|file write failed|unexpected pos")


def os_error_in(error: BaseException | None) -> OSError | None:
    """The OSError that an error is, or that a library wrapped in it; None for other errors."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in _CAUSES:
            return error
        wraps = type(error).__name__ in _WRAPPERS
        found = re.search(r"\(os error (\d+)\)|\[Errno (\d+)\]", str(error)) if wraps else None
        if found is not None and int(found[1] or found[2]) in _CAUSES:
            code = int(found[1] or found[2])
            return OSError(code, os.strerror(code), getattr(error, "path", None))
        is_write = wraps and _WRITE_FAILED.search(str(error)) is not None
        error = error.__cause__ or (error.__context__ if is_write else None)
    return None


def os_cause(code: int) -> str:
    """The cause of an OSError in words, for an errno that `os_error_in` finds."""
    return _CAUSES[code][0]


def as_os_sentence(error: BaseException, path: str | os.PathLike | None = None) -> str | None:
    """An error of the operating system as one sentence with path and cause.

    Args:
        path: used if the error has no path.
    Returns:
        None for any other error.
    """
    found = os_error_in(error)
    if found is None:
        return None
    cause, hint = _CAUSES[found.errno]
    name = found.filename if found.filename is not None else path
    name = os.fsdecode(name) if isinstance(name, (str, bytes, os.PathLike)) else "A file"
    return f"{name}: {cause}. {hint}"


def environment_rank() -> int:
    """The rank that torchrun gave this process; 0 without torchrun, or for what is no number."""
    rank = os.environ.get("RANK", "")
    return int(rank) if re.fullmatch("[0-9]{1,6}", rank) else 0


def exit_with(error: Exception | str, code: int = EXIT_USAGE, everywhere: bool = True) -> NoReturn:
    """Print an error as one line and exit.

    Under torchrun every rank may have the same error (`everywhere`); then only rank 0 prints it.
    The other ranks wait, because torchrun ends all ranks when the first one exits. A rank that is
    still running after the wait has the error alone, and prints it.
    """
    if everywhere and environment_rank() != 0:
        with contextlib.suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun's, once rank 0 has left
        time.sleep(SECONDS_FOR_RANK_0)
    print(f"error: {error}", file=sys.stderr, flush=True)
    raise SystemExit(code)


def run_main(main: Callable[[], object]) -> None:
    """Run an entry point and report known errors as one sentence on stderr.

    A stream that is closed (`command >&-`) becomes /dev/null: the next file that the process opens would
    get its number, and what native code prints would go there.

    Exit codes: 2 for a UsageError and for errors of the operating system (a full disk, a read-only
    file system), 1 for a RunError and for a lack of memory, 130 for Ctrl-C. A closed output pipe
    ends the process silently. Text that is not valid UTF-8 is printed with backslashes.

    A failed process exits at most SECONDS_TO_EXIT after its message.
    """
    try:
        _run(main)
    except SystemExit as end:
        if end.code:
            _leave(end.code)
        raise
    except BaseException:
        if _has_process_groups():
            traceback.print_exc()
            _leave(EXIT_FAULT)
        atexit.register(_end_in_time)
        raise


def _run(main: Callable[[], object]) -> None:
    _open_closed_streams()
    sys.unraisablehook = functools.partial(_interrupt_again, sys.unraisablehook)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
        with _standard_output():
            sys.stdout.flush()
    except KeyboardInterrupt:
        exit_with("interrupted (SIGINT)", EXIT_INTERRUPTED)
    except MemoryError as error:
        reason = " ".join(str(error).split())[:200] or "an allocation failed"
        exit_with(f"out of memory: {reason}", EXIT_FAULT, everywhere=False)
    except BrokenPipeError:
        _drop_output()
        raise SystemExit(EXIT_FAULT)
    except UsageError as error:
        exit_with(error)
    except RunError as error:
        exit_with(error, EXIT_FAULT, error.everywhere)
    except Exception as error:
        if found := _ALLOCATION_FAILED.search(str(error)):
            exit_with(f"out of memory: {found[0]}", EXIT_FAULT, everywhere=False)
        line = (traceback.extract_tb(error.__traceback__) or [None])[-1]
        full = _drop_output_if_full() or (line and (line.line or "").startswith("print("))
        sentence = as_os_sentence(error, "The standard output" if full else None)
        if sentence is None:
            raise
        exit_with(UsageError(sentence))


def _interrupt_again(unraisablehook: Callable, unraisable) -> None:
    """sys.unraisablehook: Python drops a Ctrl-C during os.fork or in a finalizer; send it again."""
    if unraisable.exc_type is not KeyboardInterrupt:
        return unraisablehook(unraisable)
    again = threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGINT))
    again.daemon = True
    again.start()


def _open_closed_streams() -> None:
    number = os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    while number <= 2:
        os.set_inheritable(number, True)
        number = os.open(os.devnull, os.O_RDWR)
    os.close(number)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))


def _leave(code: int | str) -> None:
    """Exit from a failed process that has process groups; other processes exit normally.

    Data workers would wait for their reader, and the destructor of a communicator for ranks that
    have exited. torchrun would wait for the process, which even SIGTERM does not end then.
    """
    if not _has_process_groups():
        atexit.register(_end_in_time)
        return
    _end_in_time()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's raises where a data worker dies
    for child in multiprocessing.active_children():
        child.kill()
    with contextlib.suppress(BaseException):  # log writers flush at exit
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code if isinstance(code, int) else EXIT_FAULT)


def _has_process_groups() -> bool:
    distributed = getattr(sys.modules.get("torch"), "distributed", None)
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


@contextlib.contextmanager
def _standard_output() -> Iterator[None]:
    """Name the standard output in an OSError of writing to it."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OSError(error.errno, os.strerror(error.errno or 0), "The standard output") from error


def _drop_output() -> None:
    """Avoid a second error when the interpreter flushes the output at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _drop_output_if_full() -> bool:
    """Whether the standard output cannot be written."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        _drop_output()
        return True
    return False


def _end_in_time() -> None:
    """Use SIGALRM, because threads end before the C++ destructors that may wait."""
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(SECONDS_TO_EXIT)
