# Copyright (c) 2026, the megatron-core gptoss authors.

"""Two ranks for a test module (one that needs more has a `ranks` of its own), poisoned memory."""

import os

import pytest
import torch

from tests.unit_tests import missing_packages
from tests.unit_tests.distributed import RankPool


def pytest_sessionfinish(session):
    """In CI no test may be skipped because a package is missing: nobody would see it."""
    reporter = session.config.pluginmanager.get_plugin('terminalreporter')
    if not os.environ.get('CI') or reporter is None:
        return
    skipped = reporter.stats.get('skipped', [])
    lines = missing_packages.complaints(str(report.longrepr) for report in skipped)
    for line in lines:
        reporter.write_line(line, red=True)
    if lines:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope='module')
def ranks():
    with RankPool(2) as pool:
        yield pool


@pytest.fixture
def poisoned(monkeypatch):
    """What a kernel does not write is NaN."""
    empty, empty_like = torch.Tensor.new_empty, torch.empty_like

    def nan(tensor):
        return tensor.fill_(float('nan')) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch.Tensor, 'new_empty', lambda *a, **k: nan(empty(*a, **k)))
    monkeypatch.setattr(torch, 'empty_like', lambda *a, **k: nan(empty_like(*a, **k)))
