# Copyright (c) 2026, the megatron-core gptoss authors.

"""Draw cases, run them, and print each fault with the command that shows it again.

    python -m tests.fuzz --count 200 --seed 7          # `make fuzz N=200 SEED=7`
    python -m tests.fuzz --case '{"problem": {}, "layout": {"tp": 2}}'

Exit code 1 if there was a fault. What may be drawn is in `draw.py`; docs/fuzzing.md says more.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import sys
import time
from collections import Counter
from pathlib import Path
from random import Random, SystemRandom
from typing import Iterator

from tests.fuzz.case import WORLD_SIZES, Case
from tests.fuzz.draw import draw_cases
from tests.fuzz.runner import Runner, Verdict
from tests.fuzz.shrink import shrunk

CASES_A_PROBLEM = 4
CHECKED_SEEDS = 2


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=100, help="Cases to draw.")
    parser.add_argument("--seed", default=None, help="Of the draws; a random one by default.")
    parser.add_argument("--ranks", type=int, default=8, help="World size at most.")
    parser.add_argument("--workers", type=int, default=1, help="Cases that run at once.")
    parser.add_argument("--seconds", type=float, default=None, help="Draw no more after these.")
    parser.add_argument("--case", default=None, help="Run this one, as a fault prints it.")
    parser.add_argument("--shrink", action="store_true", help="Make each fault's case smaller.")
    parser.add_argument("--report", type=Path, default=None, help="Append a JSON line a case.")
    options = parser.parse_args()
    seed = options.seed or str(SystemRandom().randrange(10**6))
    if options.case is not None:
        return _one(Case.from_json(options.case), options)
    print(f"{options.count} cases, seed {seed}", flush=True)
    results = list(_all(options, seed))
    _summarise(results)
    return int(any(verdict.is_fault for _, verdict in results))


def _one(case: Case, options) -> int:
    runner = Runner(max(case.world_size, 1))
    try:
        verdict = runner.verdict(case)
        print(f"{verdict.kind}", *verdict.lines, sep="\n  ")
        if verdict.is_fault and options.shrink:
            print(_command(_smallest(runner, case, verdict)))
        return int(verdict.is_fault)
    finally:
        runner.close()


def _all(options, seed: str) -> Iterator[tuple[Case, Verdict]]:
    problems = -(-options.count // CASES_A_PROBLEM)
    if options.workers == 1:
        streams = [_worker_results(options, seed, range(problems))]
        results = (result for stream in streams for result in stream)
    else:
        results = _from_processes(options, seed, problems)
    for number, (case, verdict, seconds) in enumerate(results, 1):
        print(f"{number} {verdict.kind} {seconds:.1f} s", flush=True)
        if verdict.is_fault:
            print("  " + "\n  ".join(verdict.lines), _command(case), sep="\n", flush=True)
        if options.report is not None:
            record = {**json.loads(case.to_json()), **dataclasses.asdict(verdict), "seed": seed}
            with open(options.report, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        yield case, verdict


def _worker_results(options, seed: str, problems) -> Iterator[tuple[Case, Verdict, float]]:
    started = time.monotonic()
    runner = Runner(options.ranks)
    sizes = [size for size in WORLD_SIZES if size <= options.ranks]
    sizes += [size for size in (2, 2, 4) if size <= options.ranks]  # small ones show as much
    try:
        for number in problems:
            for case in draw_cases(Random(f"{seed}-{number}"), CASES_A_PROBLEM, sizes):
                begun = time.monotonic()
                if options.seconds is not None and begun - started > options.seconds:
                    return
                verdict = runner.verdict(case)
                if verdict.kind == "differs" and not _confirmed(runner, case):
                    verdict.kind = "seed"
                if verdict.is_fault and options.shrink:
                    case = _smallest(runner, case, verdict)
                yield case, verdict, time.monotonic() - begun
    finally:
        runner.close()


def _confirmed(runner: Runner, case: Case) -> bool:
    """Whether the same differs with other numbers too.

    Two of a token's experts may score so alike that the order of additions decides; that is one
    case in some hundreds, and not the same one with another seed.
    """
    for offset in range(1, CHECKED_SEEDS + 1):
        problem = dataclasses.replace(case.problem, seed=case.problem.seed + offset)
        if runner.verdict(dataclasses.replace(case, problem=problem)).is_fault:
            return True
    return False


def _from_processes(options, seed: str, problems: int) -> Iterator[tuple[Case, Verdict, float]]:
    context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
    queue = context.Queue()
    workers = [
        context.Process(
            target=_fill, args=(queue, options, seed, range(first, problems, options.workers))
        )
        for first in range(options.workers)
    ]
    for worker in workers:
        worker.start()
    running = len(workers)
    while running:
        result = queue.get()
        if result is None:
            running -= 1
        else:
            yield result


def _fill(queue, options, seed: str, problems) -> None:
    try:
        for result in _worker_results(options, seed, problems):
            queue.put(result)
    finally:
        queue.put(None)


def _smallest(runner: Runner, case: Case, verdict: Verdict) -> Case:
    def shows(smaller: Case) -> bool:
        found = runner.verdict(smaller)
        return found.kind == verdict.kind and _where(found) == _where(verdict)

    return shrunk(case, shows)


def _where(verdict: Verdict) -> str:
    """What kind of fault: the frame of a traceback, or that numbers differ."""
    return verdict.lines[0].split(":")[0] if verdict.kind == "failed" else ""


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
