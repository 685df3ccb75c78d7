# Copyright (c) 2026, the megatron-core gptoss authors.

"""GPUs as machines: how torchrun is started on them, and what memory a machine has."""

import argparse
import os
import re
from dataclasses import dataclass
from pathlib import Path

import psutil

from megatron.gpt_oss.errors import UsageError

PER_MACHINE = 8
# Names that launch.sh reads too. The shell ends with the words after :? where one is not set.
RENDEZVOUS = '"${RENDEZVOUS:?HOST:PORT of one of the machines}"'
JOB = '"${JOB:?a word that only this run has}"'
_CGROUP_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


@dataclass(frozen=True)
class Machines:
    """The ranks of a run by machine; torchrun starts as many on each.

    Attributes:
        count: machines.
        gpus: ranks of each.
        idle: GPUs of each that get no rank, where there are several machines.
    """

    count: int
    gpus: int
    idle: int = 0

    @classmethod
    def of(cls, gpus: int, per_machine: int = PER_MACHINE) -> "Machines":
        """The fewest machines that hold so many GPUs.

        Raises:
            UsageError: they do not spread evenly over these.
        """
        count = _machines(gpus, per_machine)
        if gpus % count:
            raise UsageError(_uneven(gpus, per_machine))
        each = gpus // count
        return cls(count, each, per_machine - each if count > 1 else 0)

    @classmethod
    def guessed(cls, gpus: int) -> "Machines":
        """Those of a dry run on so many GPUs of which nothing else is known."""
        count = next(n for n in range(_machines(gpus, PER_MACHINE), gpus + 1) if gpus % n == 0)
        return cls(count, gpus // count)

    @property
    def ranks(self) -> int:
        """Of the run."""
        return self.count * self.gpus

    def holds(self, span: int) -> bool:
        """Whether groups of so many consecutive ranks each lie within one machine."""
        return self.gpus % span == 0

    def torchrun(self, script: str) -> list[str]:
        """The lines of the command that starts a script, without the backslashes between them."""
        ranks = f"--nproc-per-node {self.gpus}"
        if self.count == 1:
            return [f"torchrun {ranks} {script}"]
        return [
            f"torchrun --nnodes {self.count} {ranks} --rdzv-backend c10d",
            f"    --rdzv-endpoint {RENDEZVOUS}",
            f"    --rdzv-id {JOB} {script}",
        ]

    def as_if(self) -> str:
        """The value of --dry-run that stands for them."""
        return f"{self.count}x{self.gpus}" if self.count > 1 else str(self.gpus)

    def __str__(self) -> str:
        """In words, '' for one machine."""
        if self.count == 1:
            return ""
        idle = f"; {self.idle} of each machine's GPUs stay idle" if self.idle else ""
        return f"{self.count} machines, {self.gpus} GPUs on each{idle}"


def _machines(gpus: int, per_machine: int) -> int:
    return -(-gpus // per_machine)


def _uneven(gpus: int, per_machine: int) -> str:
    """The sentence for a number of GPUs that is refused, with the nearest that are not."""

    def fits(number: int) -> bool:
        return number % _machines(number, per_machine) == 0

    below = next(number for number in range(gpus - 1, 0, -1) if fits(number))
    above = next(number for number in range(gpus + 1, 2 * gpus + per_machine) if fits(number))
    other = next((n for n in range(per_machine - 1, 1, -1) if gpus % n == 0), None)
    hint = f"Give --gpus {below} or {above}"
    if other is not None:
        hint += f", or --gpus-per-machine {other} for {gpus // other} machines of {other}"
    return (
        f"--gpus {gpus} with --gpus-per-machine {per_machine}: torchrun starts equally many "
        f"ranks on each machine, but {_machines(gpus, per_machine)} do not divide {gpus}. {hint}."
    )


def memory_of_this_machine() -> int:
    """Bytes of main memory, or of the container's limit."""
    total = psutil.virtual_memory().total
    for path in _CGROUP_LIMITS:
        try:
            total = min(total, int(path.read_text()))
        except (OSError, ValueError):  # another version of cgroups, or "max"
            continue
    return total


def has_gpu() -> bool:
    """Whether this is a machine of the kind that trains, without importing torch."""
    return os.path.exists("/dev/nvidia0")


# --dry-run without a value.
TORCHRUN = Machines(0, 0)


def as_machines(word: str) -> Machines:
    """The value of --dry-run: GPUs, or machines and the GPUs of each.

    Raises:
        ArgumentTypeError: it is neither.
    """
    found = re.fullmatch(r"(?:([1-9][0-9]{0,5})x)?([1-9][0-9]{0,5})", word)
    if found is None:
        raise argparse.ArgumentTypeError(
            f"'{word}': expected a number of GPUs (16), MACHINESxGPUS (2x8), or no value for the "
            "number of ranks of torchrun"
        )
    machines, gpus = found.groups()
    return Machines(int(machines), int(gpus)) if machines else Machines.guessed(int(gpus))
