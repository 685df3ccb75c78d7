# Copyright (c) 2026, the megatron-core gptoss authors.

"""The smallest case that still shows a fault."""

import dataclasses
from typing import Callable, Iterator

from tests.fuzz.case import Case, Layout, Problem


def shrunk(case: Case, shows: Callable[[Case], bool], attempts: int = 60) -> Case:
    """Reset fields to their defaults one at a time, while the fault remains.

    Args:
        shows: whether a case has the fault; it is asked `attempts` times at most.
    """
    changed = True
    while changed:
        changed = False
        for smaller in _smaller(case):
            if attempts == 0:
                return case
            attempts -= 1
            if shows(smaller):
                case, changed = smaller, True
                break
    return case


def _smaller(case: Case) -> Iterator[Case]:
    """Each case that is one step simpler, largest steps first."""
    if case.resumed is not None:
        yield dataclasses.replace(case, save_at=0, resumed=None)
        if case.resumed != case.layout:
            yield dataclasses.replace(case, layout=case.resumed)
            yield dataclasses.replace(case, resumed=case.layout)
        for resumed in _plainer(case.resumed, Layout()):
            yield dataclasses.replace(case, resumed=resumed)
    for layout in _plainer(case.layout, Layout()):
        yield dataclasses.replace(case, layout=layout)
    for problem in _plainer(case.problem, Problem()):
        yield dataclasses.replace(case, problem=problem)


def _plainer(part, default) -> Iterator:
    for field in dataclasses.fields(part):
        if getattr(part, field.name) != getattr(default, field.name):
            yield dataclasses.replace(part, **{field.name: getattr(default, field.name)})
