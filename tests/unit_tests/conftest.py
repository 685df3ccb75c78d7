# Copyright (c) 2026, the megatron-core gptoss authors.

"""Fixtures of all tests: rank pool, poisoned memory, environment checks."""

import contextlib
import os
import sys

import pytest
import torch

from megatron.gpt_oss.training.launcher_variables import LAUNCHER_VARIABLES
from tests.harness import missing_packages
from tests.harness.ranks import RankPool


def pytest_sessionfinish(session):
    """In CI no test may be skipped because a package is missing."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if not os.environ.get("CI") or reporter is None:
        return
    skipped = reporter.stats.get("skipped", [])
    lines = missing_packages.complaints(str(report.longrepr) for report in skipped)
    for line in lines:
        reporter.write_line(line, red=True)
    if lines:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


# Modules that take longest. xdist hands out modules in this order, so that none of these is the
# last one while the other worker is idle (--no-loadscope-reorder in the Makefile).
_LONGEST = (
    "test_fuzz.py",
    "test_documented_commands.py",
    "test_grouped_experts.py",
    "test_parallel_losses.py",
    "test_context_parallel.py",
    "test_packaging.py",
    "test_text_to_model.py",
    "test_commands.py",
)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in _LONGEST)


@pytest.fixture(autouse=True)
def _no_launcher_left():
    """A test that leaves a launcher's variables fails, not the later one that starts a process."""
    before = {name: os.environ.get(name) for name in LAUNCHER_VARIABLES}
    yield
    after = {name: os.environ.get(name) for name in LAUNCHER_VARIABLES}
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    assert after == before


@pytest.fixture(autouse=True)
def _parser_is_built_quickly():
    """Megatron's parser, from which every model's config comes, reads each source once in a run."""
    if "megatron.training.argument_utils" in sys.modules:
        # Not in each of the releases that the patches are proved on.
        with contextlib.suppress(ImportError, AttributeError):
            from tests.harness.command_lines import docstrings_read_once

            docstrings_read_once(for_good=True)


@pytest.fixture(scope="module")
def ranks(request):
    """The rank pool of a module: two ranks, or as `pytestmark = pytest.mark.ranks(4)` says."""
    marker = request.node.get_closest_marker("ranks")
    args, options = (marker.args, marker.kwargs) if marker else ((2,), {})
    with RankPool(*args, **options) as pool:
        yield pool


@pytest.fixture
def poisoned(monkeypatch):
    """Fill new tensors with NaN, to detect elements that a kernel does not write."""
    empty, empty_like = torch.Tensor.new_empty, torch.empty_like

    def nan(tensor):
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: nan(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: nan(empty_like(*a, **k)))
