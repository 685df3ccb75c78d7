# Copyright (c) 2026, the megatron-core gptoss authors.

"""benchmarks/elementwise.py in the size that a CPU does in a second."""

import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from tests.harness import commands

ROOT = Path(__file__).resolve().parents[2]


def test_tiny(tmp_path):
    """Upstream's paths are checked and timed; what needs a device is named with the reason."""
    out = tmp_path / 'elementwise.json'
    command = [sys.executable, 'benchmarks/elementwise.py', '--cases', 'tiny', '--seconds', '0.1']
    done = commands.run(
        [*command, '--json', str(out)], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(out.read_text())
    rows = {(row['case'].split('-')[0], row['implementation']): row for row in report['rows']}
    names = {name for _, name in rows}
    assert names >= {'copy', 'eager'}
    assert {case for case, _ in rows} == {'rope', 'residual', 'norm'}
    for (_, name), row in rows.items():
        assert row['ms'] > 0 and row['gb_per_s'] > 0
        if name != 'copy':
            assert 0 < row['error'] < 1e-2
            assert row['forward_ms'] < row['ms']
    if not torch.cuda.is_available():
        reasons = dict(map(lambda item: (item['case'], item['reason']), report['left_out']))
        assert reasons['rope-65x2 triton'] == 'needs a CUDA device'


def test_wrong_values_get_no_figure(monkeypatch):
    """A rotation without YaRN's factor is named, not timed."""
    elementwise = pytest.importorskip('benchmarks.elementwise')
    right = elementwise.rope

    def wrong(case):
        problem, calls, reference = right(case)
        eager = calls['eager']

        def without_factor(qkv):
            query, key, value = eager(qkv)
            return query / elementwise.MSCALE, key / elementwise.MSCALE, value

        return problem, {'eager': without_factor}, reference

    monkeypatch.setitem(elementwise.OPERATIONS, 'rope', wrong)
    left_out = []
    args = Namespace(only=['eager'], seconds=0.01)
    rows = elementwise.run_case(elementwise.Case('rope', 9), args, left_out)
    assert [row.implementation for row in rows] == ['copy']
    ((name, reason),) = left_out
    assert name == 'rope-9 eager' and reason.startswith('WRONG: relative error')
