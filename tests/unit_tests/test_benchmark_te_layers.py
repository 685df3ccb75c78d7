# Copyright (c) 2026, the megatron-core gptoss authors.

"""benchmarks/te_layers.py in the size that a CPU does in seconds: our side alone."""

import dataclasses
import json
import sys
from pathlib import Path

from benchmarks import attention
from tests.harness import commands

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ["benchmarks/te_layers.py", "--smoke", "--seconds", "0.1"]


def run(path, ranks=1):
    command = [sys.executable, *SCRIPT, "--json", str(path)]
    options = dict(cwd=ROOT, text=True, timeout=200)
    if ranks > 1:
        done = commands.run_ranks(command, ranks, **options)
    else:
        done = [commands.run(command, capture_output=True, **options)]
    assert not any(rank.returncode for rank in done), done[0].stderr[-2000:]
    report = json.loads(path.read_text())
    assert report["left_out"] == []
    return report["rows"], done[0].stdout


def test_smoke(tmp_path):
    """Attention has the columns of benchmarks/attention.py; a step has its optimizer."""
    rows, printed = run(tmp_path / "te.json")
    assert [row["case"] for row in rows] == ["tiny", "tiny-window", "two layers, 128"]
    columns = {field.name for field in dataclasses.fields(attention.Row)}
    for row in rows[:2]:
        assert columns < set(row) and row["ranks"] == 1
        assert 0 < max(row["errors"].values()) < 1e-2
        assert row["ms"] > 0 and row["ratio"] == row["ms_without_sink"] / row["ms"]
    step = rows[2]
    assert step["backend"] == "local"
    assert 0 < step["adamw_ms"] < step["step_ms"] and step["ms"] < step["step_ms"]
    assert "ms without sink" in printed and "AdamW ms" in printed


def test_split(tmp_path):
    """Over two ranks, as it starts itself on two GPUs."""
    rows, _ = run(tmp_path / "two.json", ranks=2)
    assert [(row["case"], row["ranks"]) for row in rows] == [("tiny", 2), ("tiny-window", 2)]
    for row in rows:
        assert 0 < max(row["errors"].values()) < 1e-2
        assert row["ms"] > 0 and row["ms_without_sink"] is None
