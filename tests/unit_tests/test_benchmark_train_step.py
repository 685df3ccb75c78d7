# Copyright (c) 2026, the megatron-core gptoss authors.

"""The step benchmark runs and extrapolates from its three models."""

import json
import sys
from pathlib import Path

import torch

from benchmarks.activation_offload import ActivationOffload
from benchmarks.work import num_parameters
from megatron.gpt_oss.presets import get_preset
from tests.harness import commands

ROOT = Path(__file__).resolve().parents[2]


def test_smoke(tmp_path):
    path = tmp_path / "step.json"
    command = [sys.executable, "benchmarks/train_step.py", "--smoke", "--json", str(path)]
    command += ["--cases", "4k", "4k-skewed", "32k-offload", "--growing", "lean"]
    done = commands.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(path.read_text())
    assert [row["case"] for row in found["rows"]] == ["4k", "4k-skewed", "32k-offload"]
    assert [row["offloaded_gib"] > 0 for row in found["rows"]] == [False, False, True]
    assert found["rows"][2]["planned_gib"] is None
    tiny = get_preset("tiny")
    for row in found["rows"]:
        ms = row["head_ms"] + tiny.num_layers / 2 * (row["windowed_ms"] + row["full_ms"])
        seconds = ms / 1e3 * 65_536 / row["tokens"] + row["adamw_s"]
        assert abs(row["tokens_per_second"] * seconds / 65_536 - 1) < 1e-6
    assert found["longest"][0]["tokens"] == 256


def test_parameters_are_counted_as_they_are():
    """AdamW's time is spread by them."""
    layer, rest = num_parameters(get_preset("20b"))
    assert 24 * layer + rest == 20_914_757_184


def test_offload_changes_no_gradient():
    """Bit for bit; weights stay, and a second pass starts anew."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 8), torch.nn.Softmax(-1)
    )
    x, dout = torch.randn(5, 8), torch.randn(5, 8)

    def gradients():
        model.zero_grad()
        model(x).backward(dout)
        return [p.grad.clone() for p in model.parameters()]

    expected = gradients()
    offload = ActivationOffload(model, minimum=0)
    for _ in range(2):
        assert all(map(torch.equal, gradients(), expected))
        # x, the input of GELU, its output, and that of softmax
        assert offload.bytes == 4 * 5 * (8 + 16 + 16 + 8)
