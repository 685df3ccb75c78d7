# Copyright (c) 2026, the megatron-core gptoss authors.

"""What a command line asks for, once it is read and checked."""

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from megatron.gpt_oss.planner.machines import Machines
from megatron.gpt_oss.presets import Preset


@dataclass(frozen=True)
class RunSpec:
    """One run: what --dry-run, the planner, the log and the resume read.

    Made by `arguments.read` alone, so that whoever holds one holds checked arguments.

    Attributes:
        words: the command line, its recipes' flags before its own.
        given: by dest, what the command line itself says, and no defaults.
        args: all arguments by dest: what is given, over --memory, --data-blend, --run-dir and the
            preset, over Megatron's defaults. `arguments.validate` brings them to what Megatron's
            own validation makes of them.
        preset: the model; None with --preset none.
        untested: flags that --allow-untested-flags let through.
        names: of the arguments that a command line has; validation adds what it derives.
    """

    words: tuple[str, ...]
    given: Namespace
    args: Namespace
    preset: Preset | None
    untested: tuple[str, ...] = ()
    names: tuple[str, ...] = ()

    @property
    def run_dir(self) -> Path | None:
        """--run-dir."""
        return None if self.args.run_dir is None else Path(self.args.run_dir)

    @property
    def dry_run(self) -> Machines | None:
        """Of --dry-run, TORCHRUN where it says nothing; None for a run that trains."""
        return self.args.dry_run

    def untested_line(self) -> str | None:
        """What the log says of flags that --allow-untested-flags let through, if any."""
        if not self.untested:
            return None
        return f"Allowed although not tested here: {', '.join(self.untested)} (docs/flags.md)."
