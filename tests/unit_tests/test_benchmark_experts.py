# Copyright (c) 2026, the megatron-core gptoss authors.

"""benchmarks/experts.py in the size that a CPU does in a second."""

import json
import sys
from pathlib import Path

from tests.harness import commands

ROOT = Path(__file__).resolve().parents[2]


def test_tiny(tmp_path):
    """Every implementation is checked and timed; the JSON holds the table."""
    out = tmp_path / 'experts.json'
    command = [sys.executable, 'benchmarks/experts.py', '--cases', 'tiny', '--seconds', '0.1']
    done = commands.run(
        [*command, '--json', str(out)], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(out.read_text())
    assert report['left_out'] == []  # a wrong implementation is named there
    rows = {row['implementation']: row for row in report['rows']}
    products = {'products', 'products-mm', 'dense'}
    assert set(rows) == products | {'grouped', 'recompute', 'grouped-mm', 'sequential'}
    assert all(row['ms'] > 0 for row in rows.values())
    # Fused, the values are rounded once where SequentialMLP rounds after every operation.
    assert 0 < rows['grouped']['error'] <= 1.2 * rows['sequential']['error']
    assert all(row in done.stdout for row in rows)
