# Copyright (c) 2026, the megatron-core gptoss authors.

"""Draw cases, run them, and print each fault with the command that reproduces it.

    python -m tests.fuzz --count 200 --seed 7          # `make fuzz N=200 SEED=7`
    python -m tests.fuzz --case '{"problem": {}, "layout": {"tp": 2}}'

Exit code 1 if there was a fault. What may be drawn is in `draw.py`; docs/fuzzing.md says more.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections import Counter
from pathlib import Path
from random import SystemRandom
from typing import Iterator

from tests.fuzz.case import Case
from tests.fuzz.report import append_run
from tests.fuzz.runner import Runner, Verdict
from tests.fuzz.workers import CASES_A_PROBLEM, in_processes, in_this_process, smallest


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=100, help="Cases to draw.")
    parser.add_argument("--seed", default=None, help="Of the draws; a random one by default.")
    parser.add_argument("--ranks", type=int, default=8, help="World size at most.")
    parser.add_argument("--fewest-ranks", type=int, default=1, help="World size at least.")
    parser.add_argument("--workers", type=int, default=1, help="Cases that run at once.")
    parser.add_argument("--seconds", type=float, default=None, help="Draw no more after these.")
    parser.add_argument("--case", default=None, help="Run this one, as a fault prints it.")
    parser.add_argument("--shrink", action="store_true", help="Make each fault's case smaller.")
    parser.add_argument("--report", type=Path, default=None, help="Append a JSON line a case.")
    parser.add_argument("--results", type=Path, default=None, help="Add the counts to this JSON.")
    options = parser.parse_args()
    seed = options.seed or str(SystemRandom().randrange(10**6))
    if options.case is not None:
        return _one(Case.from_json(options.case), options)
    print(f"{options.count} cases, seed {seed}", flush=True)
    results = list(_all(options, seed))
    _summarise(results)
    if options.results is not None:
        append_run(options.results, seed, results)
    return int(any(verdict.is_fault for _, verdict in results))


def _one(case: Case, options) -> int:
    runner = Runner(max(case.world_size, 1))
    try:
        verdict = runner.verdict(case)
        print(f"{verdict.kind}", *verdict.lines, sep="\n  ")
        if verdict.is_fault and options.shrink:
            print(_command(smallest(runner, case, verdict)))
        return int(verdict.is_fault)
    finally:
        runner.close()


def _all(options, seed: str) -> Iterator[tuple[Case, Verdict]]:
    problems = -(-options.count // CASES_A_PROBLEM)
    if options.workers == 1:
        results = in_this_process(options, seed, range(problems))
    else:
        results = in_processes(options, seed, problems)
    for number, (case, verdict, seconds) in enumerate(results, 1):
        print(f"{number} {verdict.kind} {seconds:.1f} s", flush=True)
        if verdict.is_fault:
            print("  " + "\n  ".join(verdict.lines), _command(case), sep="\n", flush=True)
        if options.report is not None:
            record = {**json.loads(case.to_json()), **dataclasses.asdict(verdict), "seed": seed}
            with open(options.report, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        yield case, verdict


def _command(case: Case) -> str:
    return f"  {os.path.basename(sys.executable)} -m tests.fuzz --case '{case.to_json()}'"


def _summarise(results: list[tuple[Case, Verdict]]) -> None:
    kinds = Counter(verdict.kind for _, verdict in results)
    print(", ".join(f"{count} {kind}" for kind, count in kinds.most_common()))
    refusals = Counter(verdict.lines[0] for _, verdict in results if verdict.kind == "refused")
    for sentence, count in refusals.most_common():
        print(f"  refused {count}: {sentence[:160]}")


if __name__ == "__main__":
    sys.exit(main())
