# Copyright (c) 2026, the megatron-core gptoss authors.

"""One start of the run: torchrun and its ranks, what they log, and what is left of them."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

from megatron.training import checkpoint_integrity
from tests.soak.disk import Disk

ROOT = Path(__file__).resolve().parents[2]
SECONDS_TO_BE_GONE = 20.0
_LONGEST = 3600.0


class SoakError(AssertionError):
    """A guarantee does not hold."""


class Attempt:
    """A start of `gptoss launch ... pretrain_gpt_oss.py ...` with two ranks.

    Args:
        words: the flags of pretrain_gpt_oss.py, the same at every start.
        run_dir: of them.
        disk: on which it lies.
        printed: file to which all output goes.
        stop_seconds: of a rank that is stopped.
    """

    def __init__(
        self, words: list[str], run_dir: Path, disk: Disk, printed: Path, stop_seconds: float
    ):
        self.run_dir, self.disk, self.stop_seconds = run_dir, disk, stop_seconds
        self._printed = printed
        command = [sys.executable, "-W", "ignore", "-c"]
        command += ["from megatron.gpt_oss.cli import main; main()", "launch", "--standalone"]
        command += ["--nproc-per-node", "2", str(ROOT / "pretrain_gpt_oss.py"), *words]
        environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with open(printed, "w", encoding="utf-8") as out:
            self._process = subprocess.Popen(
                command, env=environ, stdout=out, stderr=subprocess.STDOUT
            )
        self.launcher = self._process.pid

    def ranks(self) -> list[int]:
        """Processes of the ranks, once there are two."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(psutil.NoSuchProcess):
                children = psutil.Process(self.launcher).children()
                found = [child.pid for child in children if str(self.run_dir) in _words(child)]
                if len(found) == 2:
                    return sorted(found)
            if self.ended():
                break
            time.sleep(0.05)
        raise SoakError(f"no two ranks: {self.output()[-2000:]}")

    def signal(self, pid: int, number: int) -> None:
        """Send a signal to a process that may be gone."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    def ended(self) -> bool:
        """Whether torchrun has ended."""
        return self._process.poll() is not None

    def output(self) -> str:
        """Output of torchrun and its ranks so far."""
        return self._printed.read_text(encoding="utf-8", errors="replace")

    def logged(self) -> int:
        """The last step in metrics.jsonl; 0 without one."""
        last = 0
        with contextlib.suppress(OSError):
            for line in (self.run_dir / "metrics.jsonl").read_bytes().splitlines():
                with contextlib.suppress(ValueError, AttributeError):
                    record = json.loads(line)
                    last = record["step"] if "loss" in record else last
        return last

    def wait_for_steps(self) -> bool:
        """Wait until this start logs its first step; False if it ends before."""
        deadline = time.monotonic() + _LONGEST
        while time.monotonic() < deadline:
            text = self.output()
            if "\nstep " in text:
                return True
            if self.ended():
                return False
            time.sleep(0.05)
        raise SoakError(f"no step in {_LONGEST:.0f} s: {self.output()[-2000:]}")

    def wait_until_gone(self) -> float:
        """Wait until no process of the run is left; returns the seconds that took.

        Raises:
            SoakError: it takes longer than SECONDS_TO_BE_GONE from the first one that ended, or the
                run does not end at all.
        """
        start, first_ended = time.monotonic(), None
        while True:
            left = [process.pid for process in psutil.process_iter() if self._is_of_run(process)]
            now = time.monotonic()
            if not left and self.ended():
                return now - start
            if first_ended is None and (self.ended() or "\nerror: " in self.output()):
                first_ended = now
            if first_ended is not None and now - first_ended > SECONDS_TO_BE_GONE:
                raise SoakError(f"processes {left} are left: {self.output()[-2000:]}")
            if now - start > _LONGEST:
                raise SoakError(f"the run does not end: {self.output()[-2000:]}")
            time.sleep(0.1)

    def _is_of_run(self, process: psutil.Process) -> bool:
        with contextlib.suppress(psutil.NoSuchProcess):
            is_zombie = process.status() == psutil.STATUS_ZOMBIE
            return not is_zombie and str(self.run_dir) in _words(process)
        return False

    @property
    def status(self) -> int:
        """Exit status of torchrun, once it has ended."""
        return self._process.wait()

    def newest_checkpoint(self) -> Path:
        """The newest complete checkpoint.

        Raises:
            LookupError: there is none.
        """
        choice = checkpoint_integrity.choose(str(self.run_dir / "checkpoints"))
        if choice.iteration < 0:
            raise LookupError("no checkpoint")
        return self.run_dir / "checkpoints" / f"iter_{choice.iteration:07d}"


def _words(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.AccessDenied, psutil.ZombieProcess):
        return process.cmdline()
    return []


def kill_all(folder: Path) -> None:
    """End whatever still runs in a directory, also where the soak was interrupted."""
    for process in psutil.process_iter():
        if process.pid != os.getpid() and any(str(folder) in word for word in _words(process)):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
