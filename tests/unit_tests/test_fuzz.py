# Copyright (c) 2026, the megatron-core gptoss authors.

"""Fuzz cases that once showed a fault, and a few new ones.

A fresh case that fails prints the command that runs it again; docs/fuzzing.md.
"""

import json
from pathlib import Path
from random import SystemRandom

import pytest

from tests.fuzz.case import Case, Layout, Problem
from tests.fuzz.runner import Runner
from tests.fuzz.shrink import shrunk
from tests.fuzz.workers import CASES_A_PROBLEM, judged

# Cases of one problem follow each other: the runner keeps the reference run of the last problem.
REGRESSIONS = json.loads((Path(__file__).parents[1] / "fuzz" / "regressions.json").read_text())
FRESH = 12


@pytest.fixture(scope="module")
def runner():
    runner = Runner(4)
    yield runner
    runner.close()


@pytest.mark.parametrize("entry", REGRESSIONS, ids=lambda entry: entry["shows"].replace(" ", "-"))
def test_regression(runner, entry):
    verdict = runner.verdict(Case.from_json(json.dumps(entry["case"])))
    assert verdict.kind == entry["ends"], verdict.lines


def test_finds_a_fault(runner, monkeypatch):
    """A moment that is 0.2 % too large on one of two ranks is reported."""
    case, runs, train = Case(Problem(), Layout(dp=2)), [], runner._train
    monkeypatch.setattr(runner, "_train", lambda *args: runs.append(train(*args)) or runs[-1])
    assert runner.verdict(case).kind == "same"
    key = "optimizer.state.exp_avg.output_layer.weight"
    runs[-1].tensors[key] = runs[-1].tensors[key] * 1.002
    monkeypatch.setattr(runner, "_train", lambda *args: runs[-1])
    verdict = runner.verdict(case)
    assert verdict.kind == "differs" and "output_layer.weight" in verdict.lines[0]


def test_fresh_cases(runner):
    """Cases that are drawn at random in each run."""
    seed = str(SystemRandom().randrange(10**6))
    problems = range(FRESH // CASES_A_PROBLEM)
    for case, verdict, _ in judged(runner, seed, problems, (1, 2, 2, 4)):
        command = f"python -m tests.fuzz --case '{case.to_json()}'"
        assert not verdict.is_fault, "\n".join([*verdict.lines, command])


def test_shrinks():
    """Only the fields that the fault needs remain."""
    problem = Problem(num_layers=5, packed=True, topk=3)
    case = Case(problem, Layout(tp=2, dp=2, buckets=3), 1, Layout(cp=2))
    shows = lambda smaller: smaller.layout.buckets == 3 and smaller.problem.packed
    expected = Case(Problem(packed=True), Layout(buckets=3))
    assert shrunk(case, shows) == expected
    assert Case.from_json(case.to_json()) == case
