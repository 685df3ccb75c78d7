# Copyright (c) 2026, the megatron-core gptoss authors.

"""A parsed and checked command line."""

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from megatron.gpt_oss.planner.machines import Machines
from megatron.gpt_oss.presets import Preset


@dataclass(frozen=True)
class RunSpec:
    """The arguments of a run, for training, --dry-run, the planner and the run record.

    Only `parse.read` creates one, after its checks.

    Attributes:
        words: the command line, with the flags of its recipes first.
        given: the arguments that the command line gives, without defaults.
        args: all arguments: those given, then defaults of --memory, --data-blend, --run-dir and the
            preset, then Megatron's. `megatron_validation.validate` adds the values that it derives.
        preset: the model; None with --preset none.
        untested: flags that --allow-untested-flags allows.
        names: names of the arguments before validation.
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
        """Machines of --dry-run, TORCHRUN if it has no value; None for a training run."""
        return self.args.dry_run

    def untested_line(self) -> str | None:
        """A line for the log with the flags that --allow-untested-flags allows, if any."""
        if not self.untested:
            return None
        return f"Allowed although not tested here: {', '.join(self.untested)} (docs/flags.md)."
