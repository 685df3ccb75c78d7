# Copyright (c) 2026, the megatron-core gptoss authors.

"""benchmarks/context_parallel_model.py runs from end to end on two CPU ranks, and its check holds."""

import json
import os
import sys
from pathlib import Path

import torch

from tests.harness import commands

ROOT = Path(__file__).resolve().parents[3]


def test_smoke(tmp_path):
    """Split over ranks and chunked logits, against the whole sequence and whole logits on one."""
    out = tmp_path / 'out.json'
    command = [sys.executable, 'benchmarks/context_parallel_model.py', '--smoke']
    environ = {**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}
    done = commands.run_ranks(
        [*command, '--json', str(out)], 2, cwd=ROOT, env=environ, text=True, timeout=300
    )
    assert not any(rank.returncode for rank in done), done[0].stderr[-3000:]
    data = json.loads(out.read_text())
    (check,) = data['check']
    assert check['equal'] and check['loss_error'] < 1e-6 and check['grad_norm_error'] < 1e-5
    assert [row['length'] for row in data['run']] == [96, 256]
    for row in data['run']:
        assert row['losses'][-1] < row['losses'][0]
        assert row['tokens_per_second_per_rank'] > 0
        assert 1 <= row['expert_load'] <= 2  # of two ranks
        planned, loaded = (sum(row[k].values()) for k in ('expected', 'expected_at_load'))
        assert loaded > planned or row['expert_load'] == 1
    assert data['command'].startswith(
        'torchrun --nproc-per-node 2 benchmarks/context_parallel_model.py --smoke'
    )
    assert data['machine']['ranks'] == 2 and data['arguments']['layers'] == 4


def test_load():
    """Of four experts on two ranks, and in another layer on one of them."""
    from benchmarks.context_parallel_model import load_of

    counts = torch.tensor([[3, 1, 2, 2], [0, 0, 5, 1]])
    assert load_of(counts[:1], 2) == 1.0
    assert load_of(counts, 2) == 2.0
    assert load_of(counts[:1], 4) == 1.5
