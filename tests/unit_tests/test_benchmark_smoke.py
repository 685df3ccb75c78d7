# Copyright (c) 2026, the megatron-core gptoss authors.

"""Every benchmark that a CPU can run, with --smoke, from the command line.

cuda_unchanged needs CUDA; parity runs tests of this directory.
"""

import json
import os
import sys
from pathlib import Path

import pytest

from tests.harness import commands, runs

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow

# Number of ranks, and flags in addition to --smoke and --json.
BENCHMARKS = {
    "kernels.attention": (1, ""),
    "kernels.context_parallel": (2, ""),
    "kernels.elementwise": (1, ""),
    "kernels.experts": (1, ""),
    "kernels.lm_loss": (1, "--repeats 2"),
    "kernels.te_layers": (1, ""),
    "training.train_step": (1, "--cases 4k 4k-skewed 32k-offload --growing lean"),
    "training.context_parallel_model": (2, ""),
    "training.checkpoint": (1, "--work-dir {tmp}/work"),
    "training.checkpoint_hashes": (1, "--work-dir {tmp}/work"),
    "training.whole_model": (
        1,
        "--work-dir {tmp}/work --data {inputs}/data --tokenizer {inputs}/hf --cases 4k-routed 32k",
    ),
    "conversion.convert": (1, "--work-dir {tmp}/work"),
}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_smoke(name, tmp_path):
    """It checks its values, prints a table and writes JSON with positive times."""
    ranks, flags = BENCHMARKS[name]
    inputs = runs.write_inputs(tmp_path) if "{inputs}" in flags else None
    out = tmp_path / "out.json"
    words = [*flags.format(tmp=tmp_path, inputs=inputs).split(), "--smoke", "--json", str(out)]
    command = [sys.executable, "-W", "ignore", "-m", f"benchmarks.{name}", *words]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    options = dict(cwd=ROOT, env=environ, text=True, timeout=400)
    if ranks > 1:
        done = commands.run_ranks(command, ranks, **options)
    else:
        done = [commands.run(command, capture_output=True, **options)]
    assert not any(rank.returncode for rank in done), (
        done[0].stdout[-1000:] + done[0].stderr[-2000:]
    )
    report = json.loads(out.read_text())
    assert f"-m benchmarks.{name} " in report["command"]
    rows = report["rows"] if "rows" in report else [*report["check"], *report["run"]]
    assert rows and done[0].stdout
    assert all("WRONG" not in left_out["reason"] for left_out in report.get("left_out", ()))
    for row in rows:
        times = [row[key] for key in ("ms", "step_s", "seconds_a_step") if key in row]
        assert all(time > 0 for time in times), row
