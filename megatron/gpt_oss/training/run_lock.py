# Copyright (c) 2026, the megatron-core gptoss authors.

"""run.lock: only one run at a time uses a directory, on any machine.

Rank 0 holds a POSIX record lock on the file. Linux releases it when the process ends, and child
processes do not inherit it. Some network file systems do not show the lock to other machines.
Therefore run.lock.json names the holder, which increments a counter in it every BEAT seconds. If
the counter of another machine does not change for PATIENCE seconds, its run is dead. The counter is
in a second file, because closing any handle of run.lock would release the lock.
"""

import fcntl
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Callable

from megatron.gpt_oss.errors import EXIT_FAULT, UsageError
from megatron.gpt_oss.json_file import read_json
from megatron.gpt_oss.outputs import NO_LOCKS, naming, write_file

LOCK_FILE, HOLDER_FILE = "run.lock", "run.lock.json"
BEAT = 10.0
PATIENCE = 40.0
# Time for a killed run to exit.
GRACE = 10.0


class RunLock:
    """Context manager that holds the lock of a directory.

    Args:
        directory: an existing directory.
        tell: called with a line about an earlier or another holder.
    Raises:
        UsageError: another run holds the lock (names machine, process and start time), or the file
            is a symbolic link.
    """

    def __init__(self, directory: Path, tell: Callable[[str], None]):
        self._path, self._holder_path = directory / LOCK_FILE, directory / HOLDER_FILE
        self._tell = tell
        self._ended = threading.Event()

    def __enter__(self) -> "RunLock":
        if self._path.is_symlink():
            raise UsageError(
                f"{self._path} is a symbolic link, which another run may lock too. Remove it, or "
                "give another directory."
            )
        with naming(self._path):
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            self._take()
            self._holder = _this_process()
            self._write(self._holder)
        except BaseException:
            os.close(self._file)
            raise
        self._beats = threading.Thread(target=self._beat, name="run.lock", daemon=True)
        self._beats.start()
        return self

    def __exit__(self, *error) -> None:
        self._ended.set()
        self._beats.join()
        if self._read().get("token") == self._holder["token"]:
            self._holder_path.unlink(missing_ok=True)
        os.close(self._file)  # releases the lock

    def _take(self) -> None:
        deadline = time.monotonic() + GRACE
        while not self._lock():
            if time.monotonic() > deadline:
                raise UsageError(self._in_use(self._read()))
            time.sleep(0.2)
        holder = self._read()
        if not holder:
            return
        if holder.get("boot") != _boot() or not self._locks:
            self._wait_for_beat(holder)
        self._tell(
            f"the previous run in {self._path.parent} ended without releasing its lock: "
            f"{_named(holder)}. This run takes the lock over."
        )

    def _lock(self) -> bool:
        self._locks = True
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in NO_LOCKS:
                self._locks = False
                return True
            if isinstance(error, (BlockingIOError, PermissionError)):
                return False
            raise
        return True

    def _wait_for_beat(self, holder: dict) -> None:
        """Wait whether the counter of a holder on another machine changes."""
        self._tell(
            f"{self._path} belongs to {_named(holder)}: waiting {PATIENCE:.0f} s to see whether it "
            "is alive"
        )
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            time.sleep(min(1.0, PATIENCE / 10))
            found = self._read()
            if found and found != holder:  # the counter changed, or another run took over
                raise UsageError(self._in_use(found))

    def _in_use(self, holder: dict) -> str:
        return (
            f"{self._path.parent} is in use by another run: {_named(holder)}. Wait for it to "
            "end, or give another directory."
        )

    def _beat(self) -> None:
        writes = True
        while not self._ended.wait(BEAT):
            found = self._read()
            if found and found.get("token") != self._holder["token"]:
                # This process was suspended for so long that another machine considered it dead.
                print(
                    f"error: {_named(found)} took over {self._path.parent} while this process was "
                    "suspended. This process exits: two runs would write the same checkpoints.",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(EXIT_FAULT)
            self._holder["count"] += 1
            try:
                self._write(self._holder)
                writes = True
            except OSError as error:
                if writes:
                    self._tell(f"{self._holder_path} cannot be written: {error.strerror}")
                writes = False

    def _write(self, holder: dict) -> None:
        write_file(self._holder_path, json.dumps(holder) + "\n")

    def _read(self) -> dict:
        """The holder of the lock; {} if there is none."""
        try:
            holder = read_json(self._holder_path)
        except UsageError:
            return {}
        return holder


def _this_process() -> dict:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "boot": _boot(),
        "token": os.urandom(8).hex(),
        "count": 0,
    }


def _named(holder: dict) -> str:
    if not holder:
        return f"{HOLDER_FILE} does not name it"
    return f"process {holder.get('pid')} on {holder.get('host')}, started {holder.get('since')}"


def _boot() -> str:
    """ID of the running kernel, which all containers of a machine share."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()
