# Copyright (c) 2026, the megatron-core gptoss authors.

"""Write counts of the cases of a run to benchmarks/results."""

import json
import sys
from collections import Counter
from pathlib import Path

from benchmarks.lib.report import machine
from tests.fuzz.case import Case
from tests.fuzz.runner import Verdict


def append_run(path: Path, seed: str, results: list[tuple[Case, Verdict]]) -> None:
    """Add a run to a file of results; creates the file if it does not exist."""
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"runs": []}
    ranks = Counter(case.world_size for case, _ in results)
    options = Counter(option for case, _ in results for option in case.options())
    run = {
        "command": " ".join(["python -m tests.fuzz", *_without_paths(sys.argv[1:])]),
        "machine": machine("torch", "transformers", "triton"),
        "seed": seed,
        "cases": len(results),
        "verdicts": dict(Counter(verdict.kind for _, verdict in results)),
        "ranks": {str(size): count for size, count in sorted(ranks.items())},
        "options": dict(sorted(options.items())),
    }
    found["runs"].append(run)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _without_paths(words: list[str]) -> list[str]:
    own = ("--report", "--results")
    return [b for a, b in zip(["", *words], words) if a not in own and b not in own]
