# Copyright (c) 2026, the megatron-core gptoss authors.

"""Machines of a run: the torchrun command for them, and their CPU memory."""

import argparse
import os
import re
from dataclasses import dataclass
from pathlib import Path

import psutil

from megatron.gpt_oss.errors import UsageError

PER_MACHINE = 8
# Variables that launch.sh reads too. The shell exits with the text after :? if one is not set.
RENDEZVOUS = '"${RENDEZVOUS:?HOST:PORT of one of the machines}"'
JOB = '"${JOB:?a word that only this run has}"'
_CGROUP_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


@dataclass(frozen=True)
class Machines:
    """The machines of a run; torchrun starts the same number of ranks on each.

    Attributes:
        count: number of machines.
        gpus: ranks per machine.
        idle: GPUs per machine without a rank, if there are several machines.
    """

    count: int
    gpus: int
    idle: int = 0

    @classmethod
    def of(cls, gpus: int, per_machine: int = PER_MACHINE) -> "Machines":
        """The smallest number of machines for so many GPUs.

        Raises:
            UsageError: the GPUs do not divide evenly over the machines.
        """
        count = _machines(gpus, per_machine)
        if gpus % count:
            raise UsageError(_uneven(gpus, per_machine))
        each = gpus // count
        return cls(count, each, per_machine - each if count > 1 else 0)

    @classmethod
    def guessed(cls, gpus: int) -> "Machines":
        """The machines of a dry run that is given only the number of GPUs."""
        count = next(n for n in range(_machines(gpus, PER_MACHINE), gpus + 1) if gpus % n == 0)
        return cls(count, gpus // count)

    @property
    def ranks(self) -> int:
        """Number of ranks of the run."""
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
        """The value of --dry-run for these machines."""
        return f"{self.count}x{self.gpus}" if self.count > 1 else str(self.gpus)

    def __str__(self) -> str:
        """Description for messages; '' for one machine."""
        if self.count == 1:
            return ""
        idle = f"; {self.idle} of each machine's GPUs stay idle" if self.idle else ""
        return f"{self.count} machines, {self.gpus} GPUs on each{idle}"


def _machines(gpus: int, per_machine: int) -> int:
    return -(-gpus // per_machine)


def _uneven(gpus: int, per_machine: int) -> str:
    """The error for a number of GPUs that does not divide evenly, with the nearest valid ones."""

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


def this_machine_memory() -> int:
    """Bytes of CPU memory, or the limit of the container."""
    total = psutil.virtual_memory().total
    for path in _CGROUP_LIMITS:
        try:
            total = min(total, int(path.read_text()))
        except (OSError, ValueError):  # another version of cgroups, or "max"
            continue
    return total


def has_gpu() -> bool:
    """Whether this machine has a GPU, without importing torch."""
    return os.path.exists("/dev/nvidia0")


# --dry-run without a value.
TORCHRUN = Machines(0, 0)


def parse_machines(word: str) -> Machines:
    """Parse the value of --dry-run: GPUS or MACHINESxGPUS.

    Raises:
        ArgumentTypeError: the value has another form.
    """
    found = re.fullmatch(r"(?:([1-9][0-9]{0,5})x)?([1-9][0-9]{0,5})", word)
    if found is None:
        raise argparse.ArgumentTypeError(
            f"'{word}': expected a number of GPUs (16), MACHINESxGPUS (2x8), or no value for the "
            "number of ranks of torchrun"
        )
    machines, gpus = found.groups()
    return Machines(int(machines), int(gpus)) if machines else Machines.guessed(int(gpus))
