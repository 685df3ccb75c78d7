# Copyright (c) 2026, the megatron-core gptoss authors.

"""Run Python commands in separate processes, without the seconds that an import of torch takes.

    done = commands.run([sys.executable, 'pretrain_gpt_oss.py', *words], capture_output=True)
    with commands.Popen([sys.executable, '-m', 'megatron.gpt_oss.cli', ...]) as process:

The arguments are those of subprocess. The process is forked from the server of `RankPool`, which
has imported torch and Megatron; its session, argv, environment, directory, streams, `__main__` and
exit status are its own, as are the functions of atexit and the traceback of what it raises.

Two things it cannot show, so that their tests start a Python: what an import does or prints, for
torch and Megatron are imported already; and what Python reads of the environment when it starts,
which is refused (`_READ_AT_START`). TRITON_INTERPRET has a server of its own.
"""

import atexit
import contextlib
import ctypes
import functools
import gc
import io
import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import types
import warnings
from multiprocessing import connection, forkserver, process, reduction
from pathlib import Path
from typing import Callable, Dict, List, Optional, Sequence
from unittest import mock

from tests.harness.ranks import _context, host_store

# `rank_imports` imports this module, so that these are what a Python has that has just started.
_MAIN_PROCESS = type(process.current_process())
_PATH = list(sys.path)
_PYTHONPATH = os.environ.get("PYTHONPATH", "")
# Variables that have been read by the time that a command gets them.
_READ_AT_START = ("PYTHON", "LD_")
_TAKEN = {"PYTHONPATH", "PYTHONUNBUFFERED"}
_FLUSH_FAILED = 120  # the status that Python ends with


class Popen(subprocess.Popen):
    """subprocess.Popen of a command that begins with sys.executable.

    `close()` and the end of a `with` block end the command and all that it has started; so does the
    end of the tests.

    Raises:
        ValueError: for what only a process that starts Python can show.
    """

    def _execute_child(
        self,
        args,
        executable,
        preexec_fn,
        close_fds,
        pass_fds,
        cwd,
        env,
        *startup_and_shell_and_fds,
    ) -> None:
        # startupinfo, creationflags, shell; then the pipes' two ends, -1 where there is none.
        _, _, shell, stdin, _, _, stdout, _, stderr, *_ = startup_and_shell_and_fds
        if shell or executable or preexec_fn or pass_fds:
            raise ValueError("shell, executable, preexec_fn, pass_fds: not for a forked command.")
        args = [os.fsdecode(word) for word in args]
        environ = dict(os.environ if env is None else env)
        _check(args, environ)
        fds = [own if fd == -1 else fd for own, fd in enumerate((stdin, stdout, stderr))]
        folder = os.path.abspath(cwd or os.curdir)
        os.stat(folder)  # raises as subprocess does
        self._process = _context().Process(
            target=_become, args=(args, environ, folder, [_Handle(fd) for fd in fds]), daemon=True
        )
        with _server_of(environ):
            self._process.start()
        self.pid = self._process.pid
        self._child_created = True
        self._close_pipe_fds(*startup_and_shell_and_fds[3:9])

    def _internal_poll(self, *args, **kwargs) -> Optional[int]:
        # Without a process while Popen itself fails.
        if self.returncode is None and hasattr(self, "_process"):
            self.returncode = self._process.exitcode
        return self.returncode

    def _wait(self, timeout: Optional[float]) -> int:
        if self.returncode is None:
            self._process.join(timeout)
            if self._internal_poll() is None:
                raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    @property
    def sentinel(self) -> int:
        """Readable once the command has ended, for multiprocessing.connection.wait."""
        return self._process.sentinel

    def close(self) -> None:
        """End the command and all processes that it started, and close its pipes."""
        self.end_group()
        self.kill()  # should it not have made its session yet
        self.wait()
        for pipe in filter(None, (self.stdin, self.stdout, self.stderr)):
            pipe.close()

    def end_group(self) -> None:
        """End what runs in its session, as what it started may when it has ended itself."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def __exit__(self, *exc_info) -> None:
        self.close()


def run(
    command: Sequence,
    *,
    input: Optional[str] = None,
    capture_output: bool = False,
    timeout: Optional[float] = None,
    check: bool = False,
    **options,
) -> subprocess.CompletedProcess:
    """subprocess.run for a command that begins with sys.executable.

    Raises:
        subprocess.TimeoutExpired: after `timeout` seconds, when the command has been ended with all
            that it started.
    """
    if capture_output:
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    if input is not None:
        options["stdin"] = subprocess.PIPE
    with Popen(command, **options) as started:
        try:
            out, err = started.communicate(input, timeout)
        except subprocess.TimeoutExpired:
            started.end_group()
            raise
    done = subprocess.CompletedProcess(command, started.returncode, out, err)
    if check:
        done.check_returncode()
    return done


def run_ranks(command: Sequence, world_size: int, env: Optional[Dict] = None, **options) -> List:
    """What `run` gives for each rank, started together with the variables that torchrun sets.

    A rank that fails ends the others, as under torchrun.
    """
    timeout = options.pop("timeout", None)
    (store, variables), started = host_store(), []
    deadline = None if timeout is None else time.monotonic() + timeout
    try:
        for rank in range(world_size):
            environ = {
                **(os.environ if env is None else env),
                **rank_variables(rank, world_size, str(store.port)),
                **variables,
            }
            files = [open(os.memfd_create("printed"), "w+") for _ in range(2)]
            streams = dict(zip(("stdout", "stderr"), files))
            started.append((Popen(command, env=environ, **streams, **options), *files))
        running = [process for process, *_ in started]
        while running:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(command, timeout)
            connection.wait([process.sentinel for process in running], timeout=1)
            if any(process.poll() for process in running):
                for process in running:
                    process.terminate()
            running = [process for process in running if process.poll() is None]
        done = []
        for process, *files in started:
            for file in files:
                file.seek(0)
            texts = [file.read() for file in files]
            done.append(subprocess.CompletedProcess(command, process.returncode, *texts))
        return done
    finally:
        for process, *files in started:
            process.close()
            for file in files:
                file.close()


def rank_variables(rank: int, world_size: int, port: str) -> Dict[str, str]:
    """Environment variables of a rank of one machine, as torchrun sets them."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }


_CLIENT = """#!{python} -SE
import json, os, socket, sys
server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
server.connect({address!r})
asked = json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]).encode()
socket.send_fds(server, [asked], [0, 1, 2])
status = int(server.recv(64) or 1)
if status < 0:
    os.kill(os.getpid(), -status)
sys.exit(status)
"""


@contextlib.contextmanager
def stand_in(script: Path, folder: Path):
    """Write a program into `folder` that runs the Python script of the same name as `run` does.

    For shell scripts that start it: put the directory first on PATH. Signals are not forwarded.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        address = str(folder / "socket")
        server.bind(address)
        server.listen()
        started: List[Popen] = []

        def answer(asker):
            message, fds, *_ = socket.recv_fds(asker, 1 << 20, 3)
            words, environ, cwd = json.loads(message)
            command = [sys.executable, str(script), *words]
            streams = dict(zip(("stdin", "stdout", "stderr"), fds))
            started.append(Popen(command, env=environ, cwd=cwd, **streams))
            for fd in fds:
                os.close(fd)
            asker.send(str(started[-1].wait()).encode())

        def serve():
            with contextlib.suppress(OSError):  # closed
                while True:
                    with server.accept()[0] as asker:
                        answer(asker)

        threading.Thread(target=serve, daemon=True).start()
        program = folder / script.name
        program.write_text(_CLIENT.format(python=sys.executable, address=address))
        program.chmod(0o755)
        try:
            yield
        finally:
            server.shutdown(socket.SHUT_RDWR)
            for process in started:
                process.close()


def _check(command: List[str], environ: Dict[str, str]) -> None:
    if command[0] != sys.executable or len(command) < 2:
        raise ValueError(f"{command[0]} is not this Python: start it with subprocess.")
    if _context().get_start_method() != "forkserver":
        raise ValueError("Processes are not forked where CUDA is: use subprocess.")
    for name in environ.keys() | os.environ.keys():
        if name.startswith(_READ_AT_START) and name not in _TAKEN:
            if environ.get(name) != os.environ.get(name):
                raise ValueError(f"{name} is read when Python starts: use subprocess.")
    _parts(command)


def _parts(command: List[str]) -> tuple:
    """(warning filters, '-c' or '-m' or a script, the arguments from there on)."""
    words, filters = list(command[1:]), []
    while words and words[0] == "-W":
        filters.append(words[1])
        del words[:2]
    if not words or (words[0].startswith("-") and (words[0] not in ("-c", "-m") or not words[1:])):
        raise ValueError(f"{words[:1]}: only -W, -c, -m and a script are known here.")
    return filters, words


_INTERPRET = "TRITON_INTERPRET"


@contextlib.contextmanager
def _server_of(environ: Dict[str, str]):
    """Where processes start from another server, if Triton is to be imported otherwise."""
    if environ.get(_INTERPRET) == os.environ.get(_INTERPRET):
        yield
        return
    start = _interpreting().connect_to_new_process
    changed = {_INTERPRET: environ.get(_INTERPRET, "")}
    with mock.patch.object(forkserver, "connect_to_new_process", start):
        with mock.patch.dict(os.environ, changed):
            yield


@functools.cache
def _interpreting() -> forkserver.ForkServer:
    server = forkserver.ForkServer()
    server.set_forkserver_preload(["tests.harness.rank_imports"])
    return server


class _Handle:
    """A file descriptor that is sent to another process."""

    def __init__(self, fd: int):
        self._fd = fd

    def __reduce__(self):
        return _detached, (reduction.DupFd(self._fd),)


def _detached(duplicate) -> int:
    return duplicate.detach()


def _become(command: List[str], environ: Dict[str, str], folder: str, fds: List[int]) -> None:
    """Run a command in the new process until it ends."""
    os.setsid()
    _end_with_the_server()
    for own, fd in enumerate(fds):
        os.dup2(fd, own)
        os.close(fd)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environ)
    filters, words = _parts(command)
    _look_started(environ, filters)
    sys.orig_argv = list(command)
    status = _status_of(lambda: _run_main(words))
    _finish(status)


def _end_with_the_server() -> None:
    """End the server when the tests close their pipe."""
    server = forkserver._forkserver
    os.close(server._forkserver_alive_fd)
    server._forkserver_address = server._forkserver_alive_fd = server._forkserver_pid = None
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _look_started(environ: Dict[str, str], filters: List[str]) -> None:
    """What a Python that starts makes of its environment and streams; nobody's child."""
    process._current_process, process._parent_process = _MAIN_PROCESS(), None
    multiprocessing.set_start_method(None, force=True)  # until the command asks or says
    sys.modules.pop("__mp_main__", None)
    sys.stdin = sys.__stdin__ = open(0, closefd=False)
    unbuffered = bool(environ.get("PYTHONUNBUFFERED"))
    for name, fd in (("stdout", 1), ("stderr", 2)):
        servers = getattr(sys, f"__{name}__")
        stream = io.TextIOWrapper(
            open(fd, "wb", buffering=0 if unbuffered else -1, closefd=False),
            encoding=servers.encoding,
            errors=servers.errors,
            line_buffering=fd == 2 or os.isatty(fd),
            write_through=unbuffered,
        )
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    sys.path[:] = _folders(environ.get("PYTHONPATH", ""))
    sys.path += [path for path in _PATH[1:] if path not in _folders(_PYTHONPATH)]
    for text in filters:
        warnings._setoption(text)
        sys.warnoptions.append(text)
    if "numpy" in sys.modules:  # its generator is the server's
        sys.modules["numpy"].random.seed()
    if "torch" in sys.modules and environ.get("OMP_NUM_THREADS"):
        sys.modules["torch"].set_num_threads(int(environ["OMP_NUM_THREADS"]))


def _folders(python_path: str) -> List[str]:
    return [os.path.abspath(path) for path in python_path.split(os.pathsep) if path]


def _run_main(words: List[str]) -> None:
    """Run the arguments after Python's options, as `__main__`."""
    kind = words[0]
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    main.__dict__.update(__builtins__=__builtins__, __annotations__={})
    if kind == "-m":
        sys.argv = words[1:]  # its first word becomes the module's file
        sys.path.insert(0, os.getcwd())
        runpy._run_module_as_main(words[1])
        return
    if kind == "-c":
        sys.argv = ["-c", *words[2:]]
        sys.path.insert(0, "")
        code = compile(words[1], "<string>", "exec")
    else:
        sys.argv = list(words)
        sys.path.insert(0, os.path.dirname(os.path.realpath(kind)))
        main.__file__ = kind
        try:
            with open(kind, "rb") as file:
                text = file.read()
        except OSError as error:
            path, reason = os.path.abspath(kind), f"[Errno {error.errno}] {error.strerror}"
            print(f"{sys.executable}: can't open file {path!r}: {reason}", file=sys.stderr)
            raise SystemExit(2)
        code = compile(text, kind, "exec")
    exec(code, main.__dict__)


def _status_of(call: Callable) -> int:
    """The status that Python ends with, SIGINT's as a negative number."""
    try:
        call()
    except SystemExit as stop:
        if stop.code is None:
            return 0
        if isinstance(stop.code, int):
            return stop.code & 0xFF
        sys.stdout.flush()
        print(stop.code, file=sys.stderr)
    except BaseException as error:
        frames = error.__traceback__
        while frames and frames.tb_frame.f_code.co_filename == __file__:
            frames = frames.tb_next
        sys.excepthook(type(error), error.with_traceback(frames), frames)
        if isinstance(error, KeyboardInterrupt):
            return -signal.SIGINT
    else:
        return 0
    return 1


def _finish(status: int) -> None:
    """Exit as the interpreter does: join threads, run atexit functions, flush streams."""
    try:
        threading._shutdown()
        atexit._run_exitfuncs()
        for found in gc.get_objects():
            if issubclass(type(found), (io.TextIOWrapper, io.BufferedWriter)) and not found.closed:
                if found not in (sys.stdout, sys.stderr) and found.writable():
                    found.flush()
    except BaseException:
        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None and not stream.closed:
                stream.flush()
        except OSError as error:
            status = _FLUSH_FAILED
            said = f"Exception ignored in: {stream!r}\n{type(error).__name__}: {error}"
            with contextlib.suppress(OSError):
                print(said, file=sys.stderr)
    if status == -signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(status)
