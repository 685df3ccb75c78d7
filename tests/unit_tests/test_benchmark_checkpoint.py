# Copyright (c) 2026, the megatron-core gptoss authors.

"""The benchmark of checkpoints runs, and tells a step that a write goes on beside from the others."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks.checkpoint import row
from tests.harness import commands

ROOT = Path(__file__).resolve().parents[2]


def test_row():
    """Saves at 4, 8 and 12: the first is left out, and steps 5 and 9 have a write beside them."""
    save = dict(background_seconds=2.0)
    run = {
        'bytes': 3e9,
        'load': 0.5,
        'disk': 7.0,
        'steps': {step: 1.0 + (step in (5, 9)) + 50 * (step == 1) for step in range(1, 13)},
        'saves': {
            4: dict(save, blocking_seconds=90.0),
            8: dict(save, blocking_seconds=0.2),
            12: dict(save, blocking_seconds=0.4),
        },
    }
    found = row('asynchronous', [run], interval=4)
    assert (found.saves, found.gigabytes, found.held_up_worst_s) == (2, 3.0, 0.4)
    assert found.held_up_s == pytest.approx(0.3)
    assert (found.step_s, found.step_beside_s, found.write_s) == (1.0, 2.0, 2.0)


@pytest.mark.slow
def test_smoke(tmp_path):
    path = tmp_path / 'checkpoint.json'
    command = [sys.executable, 'benchmarks/checkpoint.py', '--smoke', '--json', str(path)]
    command += ['--folder', str(tmp_path / 'bench')]
    done = commands.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = {row['case']: row for row in json.loads(path.read_text())['rows']}
    assert rows['synchronous']['write_s'] == 0 < rows['asynchronous']['write_s']
    assert all(row['saves'] == 2 and row['held_up_s'] > 0 for row in rows.values())
    assert not (tmp_path / 'bench').exists()
