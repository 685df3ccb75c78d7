# Copyright (c) 2026, the megatron-core gptoss authors.

"""benchmarks/context_parallel.py on two gloo ranks, and the plan that it writes."""

import json
import os
import re
import sys
from pathlib import Path

from benchmarks.context_parallel_plan import plan
from tests.harness import commands

ROOT = Path(__file__).resolve().parents[4]
SCRIPT = "benchmarks/context_parallel.py"


def test_tiny_run(tmp_path):
    """Rows for every scheme, right values, a halo's bytes as computed, all of it in the JSON."""
    path = tmp_path / "rows.json"
    command = [sys.executable, SCRIPT, "--cases", "tiny", "tiny-window", "tiny-packed"]
    command += ["--seconds", "0.01", "--json", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = commands.run_ranks(command, 2, cwd=ROOT, env=environment, text=True, timeout=180)
    assert not any(rank.returncode for rank in done), done[0].stderr[-3000:]
    report = json.loads(path.read_text())
    rows = {(row["case"], row["scheme"]): row for row in report["rows"]}
    for case in ("tiny", "tiny-packed"):
        assert {s for c, s in rows if c == case} == {"auto", "all_gather", "p2p", "a2a"}
    assert rows["tiny-window", "auto"]["taken"] == "halo"
    assert rows["tiny-window", "auto"]["bytes_as_computed"] is True
    assert all(row["ms"] > 0 and row["error"] < 1e-2 for row in report["rows"])
    assert report["machine"]["ranks"] == 2 and report["command"].startswith("torchrun ")
    assert re.search(r"case +scheme +taken +ms", done[0].stdout)


def test_the_plan_is_up_to_date():
    """docs/context_parallel.md holds what --plan writes today."""
    current = plan() in (ROOT / "docs/context_parallel.md").read_text()
    assert current, f"run: python {SCRIPT} --plan docs/context_parallel.md"
