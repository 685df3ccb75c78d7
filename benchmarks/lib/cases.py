# Copyright (c) 2026, the megatron-core gptoss authors.

"""What the kernel benchmarks have in common: command line, loop over cases, rows, machine."""

import argparse
import math
import platform
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.lib import ranks, report
from megatron.core.transformer.sink_attention.backends.base import package_version
from megatron.gpt_oss.diagnostics.attention_timing import device, quantiles


@dataclass(kw_only=True)
class Row:
    """The time of one implementation in one case.

    Attributes:
        case: its name.
        ms: median milliseconds of forward and backward.
        ms_p20, ms_p80: 20 % and 80 % quantiles.
    """

    case: str
    ms: float
    ms_p20: float
    ms_p80: float


def milliseconds(samples: list[float]) -> dict[str, float]:
    """The fields `ms`, `ms_p20` and `ms_p80` of a row."""
    return dict(zip(("ms_p20", "ms", "ms_p80"), quantiles(samples), strict=True))


def make_parser(
    description: str, names: Iterable[str], seconds: float | None, limit: float = math.inf
) -> argparse.ArgumentParser:
    """The flags of every kernel benchmark.

    Args:
        names: the words that --cases takes.
        seconds, limit: defaults of --seconds and --limit; without seconds there is no --seconds.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", metavar="NAME", help="of " + ", ".join(names))
    if seconds is not None:
        parser.add_argument("--seconds", type=float, default=seconds, help="of measuring a case")
    parser.add_argument(
        "--limit", type=float, default=limit, help="seconds after which no case begins"
    )
    parser.add_argument("--json", metavar="PATH")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, for the CPU")
    return parser


def choose(parser: argparse.ArgumentParser, args: argparse.Namespace, cases, tiny) -> list:
    """The cases of --cases, or all of them; the tiny ones with --smoke or without a GPU."""
    if args.smoke:
        args.seconds = 0.1
    by_name = {case.name: case for case in [*cases, *tiny]}
    default = tiny if args.smoke or device() == "cpu" else cases
    names = args.cases or [case.name for case in default]
    report.check_names(parser, names, by_name)
    return [by_name[name] for name in names]


def run(
    args: argparse.Namespace,
    facts: dict,
    run_case: Callable,
    table: Callable[[list], str],
    launcher: Iterable[str] = ("python",),
) -> list[Row]:
    """Run each case, print its rows and write them; under torchrun rank 0 prints and writes.

    Args:
        args: the command line: `chosen` cases, `limit`, `json`.
        facts: of `machine`.
        run_case: (case, args, left_out) to the case's rows; [name, reason] of what has no row is
            added to left_out.
        table: rows to text.
        launcher: what started this process, for the JSON file.
    Returns:
        The rows of all cases.
    """
    begin, first = time.perf_counter(), ranks.is_first()
    rows, left_out = [], []

    def save() -> None:
        if first and args.json:
            report.write_rows(Path(args.json), facts, [*launcher], rows, left_out)

    if first:
        print(" ".join(f"{name}={value}" for name, value in facts.items()), flush=True)
    for case in args.chosen:
        spent = ranks.from_first(time.perf_counter() - begin)
        if spent > args.limit:
            left_out.append([case.name, f"not run: {spent:.0f} s of --limit {args.limit:.0f}"])
            continue
        try:
            found = run_case(case, args, left_out)
        except torch.OutOfMemoryError:
            if ranks.count() > 1:
                raise  # the other ranks wait in a collective
            left_out.append([case.name, "out of memory"])
            continue
        rows += found
        if first and found:
            print(table(found), flush=True)
        save()  # after every case: a run that is stopped keeps its rows
    save()
    if first:
        for name, reason in left_out:
            print(f"{name}: {reason}")
        print(f"{time.perf_counter() - begin:.0f} s in all")
    return rows


def machine() -> dict[str, str]:
    """GPU, versions and commit of the results."""
    facts = {"python": platform.python_version(), "torch": torch.__version__, "gpu": "none"}
    if device() == "cuda":
        card = torch.cuda.get_device_properties(0)
        facts["gpu"] = card.name.replace(" ", "_")
        facts["capability"] = f"{card.major}.{card.minor}"
        facts["cuda"] = str(torch.version.cuda)
        facts["cudnn"] = str(torch.backends.cudnn.version())
        query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        facts["driver"] = _first_line(*query)
    for name in ("triton", "flash-attn", "flash-attn-4", "transformer-engine"):
        facts[name] = package_version(name) or "none"
    facts["commit"] = _first_line("git", "-C", str(report.ROOT), "rev-parse", "--short", "HEAD")
    return facts


def _first_line(*command: str) -> str:
    """The first line that a command prints; "unknown" if it fails."""
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return found.stdout.split("\n")[0].strip() or "unknown"
