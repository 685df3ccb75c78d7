# Copyright (c) 2026, the megatron-core gptoss authors.

"""Command lines of pages and tools as data, and a training command as a dry run in this process."""

import contextlib
import functools
import io
import os
import re
import shlex
import sys
from pathlib import Path
from unittest import mock

from megatron.gpt_oss.planner.machines import JOB, RENDEZVOUS
from megatron.gpt_oss.training.launcher_variables import LAUNCHER_VARIABLES

ROOT = Path(__file__).resolve().parents[2]


def joined_lines(text: str) -> list[str]:
    """The lines of shell text, each with those that continue it; comments and empty ones are left out."""
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]


def torchrun_parts(words: list[str]) -> tuple[int, int, str, list[str]]:
    """(machines, ranks per machine, script, its arguments) of a torchrun command.

    `gptoss launch` takes the same arguments.
    """
    from torch.distributed.run import get_args_parser

    first = 2 if words[:2] == ["gptoss", "launch"] else 1
    assert first == 2 or words[0] == "torchrun", words
    args = get_args_parser().parse_args(words[first:])
    if args.standalone:
        assert args.nnodes in ("1", "1:1")
    else:
        machines = int(args.nnodes.split(":")[0])
        assert machines == 1 or (args.rdzv_endpoint and args.rdzv_id and args.rdzv_backend)
    machines = int(args.nnodes.split(":")[0])
    return machines, int(args.nproc_per_node), args.training_script, args.training_script_args


def planned_command(text: str) -> list[str]:
    """The arguments of the command that `gptoss plan` prints, with its variables expanded."""
    command = text[text.index("torchrun ") :]
    command = command.replace(RENDEZVOUS, "host:29500").replace(JOB, "7")
    return shlex.split(command.replace("\\\n", " "))


@functools.cache
def _docstrings():
    """Megatron's reader of its dataclasses' sources, which takes nine tenths of a dry run, cached."""
    from megatron.training.argument_utils import ArgumentGroupFactory

    original, found = ArgumentGroupFactory._get_field_docstrings, {}

    def read(self, given: type) -> dict:
        if given not in found:
            found[given] = original(self, given)
        return dict(found[given])

    return ArgumentGroupFactory, read


def docstrings_read_once(for_good: bool = False):
    """A context in which building Megatron's parser again is quick.

    Args:
        for_good: all else in this process is in it from now on.
    """
    factory, read = _docstrings()
    if for_good:
        factory._get_field_docstrings = read
    return mock.patch.object(factory, "_get_field_docstrings", read)


def dry_run(argv: list[str], machines: str | None = None) -> str:
    """What pretrain_gpt_oss.py prints with --dry-run.

    Args:
        argv: its words. machines: the value of --dry-run; None: the words have it.
    Raises:
        UsageError: as the command does.
    """
    from megatron.gpt_oss.training.pretrain import main
    from megatron.training.training import destroy_global_state

    words = [*argv, "--dry-run", machines] if machines else list(argv)
    environ = {name: text for name, text in os.environ.items() if name not in LAUNCHER_VARIABLES}
    out = io.StringIO()
    try:
        with (
            docstrings_read_once(),
            mock.patch.dict(os.environ, environ, clear=True),
            mock.patch.object(sys, "argv", ["pretrain_gpt_oss.py", *words]),
            contextlib.redirect_stdout(out),
        ):
            main(words)
    finally:
        destroy_global_state()
    return out.getvalue()
