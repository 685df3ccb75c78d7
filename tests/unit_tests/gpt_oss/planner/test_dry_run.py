# Copyright (c) 2026, the megatron-core gptoss authors.

"""pretrain_gpt_oss.py --dry-run, and the flags that the planner prints, through Megatron's checks."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron.gpt_oss.arguments.parse import read
from megatron.gpt_oss.planner.dry_run import (
    fp8_copies,
    not_counted,
    validated,
)
from megatron.gpt_oss.planner.layout import Layout
from megatron.gpt_oss.planner.machines import TORCHRUN, Machines
from megatron.gpt_oss.planner.search import PlanRequest, all_plans
from megatron.gpt_oss.presets import get_preset
from tests.harness import commands

ROOT = Path(__file__).resolve().parents[4]
NULL = "--tokenizer-type NullTokenizer --vocab-size 200000".split()
FLAGS = "--preset 20b --bf16 --global-batch-size 64 --expert-model-parallel-size 2"
SPLIT = f"{FLAGS} --use-distributed-optimizer --memory lean"


def _run(*flags, ranks=1):
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "ignore", "pretrain_gpt_oss.py", *flags, *NULL]
    options = dict(cwd=ROOT, env=environ, text=True, timeout=200)
    if ranks > 1:
        return commands.run_ranks(command, ranks, **options)
    return commands.run(command, capture_output=True, **options)


def test_alone_and_as_ranks(tmp_path):
    """The same breakdown, once; nothing is made."""
    flags = [*SPLIT.split(), "--run-dir", str(tmp_path / "run")]
    done = _run(*flags, "--dry-run", "2")
    alone = done.stdout
    assert done.returncode == 0, done.stderr
    together = _run(*flags, "--dry-run", ranks=2)
    assert [rank.returncode for rank in together] == [0, 0], together[0].stderr
    assert [rank.stdout for rank in together] == [alone, ""]
    assert "20b, 24 layers, 2 GPUs" in alone and "EP 2 DP 2, lean" in alone
    # 20.915e9 parameters, of which 19.117e9 are the experts', on two ranks; 2 bytes each
    assert "parameters   22.71 GB" in alone
    assert not (tmp_path / "run").exists()


def test_mistake():
    """One sentence and exit code 2, as without --dry-run."""
    done = _run(*FLAGS.split(), "--dry-run", "3")
    assert done.returncode == 2 and done.stderr.startswith(
        "error: Megatron refuses these arguments"
    )


@pytest.mark.parametrize(
    "argv, expected",
    [
        ("--preset 20b --dry-run", TORCHRUN),
        ("--preset 20b --dry-run=2x4", Machines(2, 4)),
        ("--preset 20b", None),
    ],
)
def test_asked_for(argv, expected):
    assert read([*argv.split(), *NULL]).dry_run == expected


def _validated(monkeypatch, gpus, flags):
    argv = [*flags, *NULL]
    monkeypatch.setenv("WORLD_SIZE", str(gpus))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    return validated(read(argv), gpus)


def test_printed_flags_are_accepted(monkeypatch):
    """Megatron validates the command line of a layout, and it means that layout."""
    request = PlanRequest(Layout(get_preset("20b"), 8, seq_length=8192, global_batch_size=64), 80e9)
    fitting = [plan.layout for plan in all_plans(request) if plan.fits]
    for layout in fitting[:: len(fitting) // 6]:
        flags = [word for flag in layout.flags() for word in flag.split()]
        args = _validated(monkeypatch, 8, flags)
        found = Layout.from_args(args)
        assert replace(found, preset=layout.preset) == layout
        for name in ("hidden_size", "num_query_groups", "head_dim", "sliding_window", "vocab_size"):
            assert getattr(found.preset, name) == getattr(layout.preset, name)
        assert not not_counted(args)


def test_what_is_not_counted(monkeypatch):
    args = _validated(monkeypatch, 1, "--preset 20b --optimizer sgd".split())
    assert len(not_counted(args)) == 2
    args.moe_grouped_gemm = False
    assert "SequentialMLP" in " ".join(not_counted(args))


TE_RESULTS = "te_layers_forward_backward_h100x2.json", "te_layers_h100x2.json"


def te_layers(name):
    path = ROOT / "benchmarks" / "results" / name
    rows = {
        row["backend"]: row
        for row in json.loads(path.read_text())["rows"]
        if "two layers" in row["case"]
    }
    names = {None: "TE bf16, our attention", "tensorwise": "TE FP8 current scaling"}
    names["blockwise"] = "TE FP8 blockwise"
    return rows["local"], {recipe: rows[name] for recipe, name in names.items()}


def test_transformer_engine_is_named_with_what_was_measured(monkeypatch):
    """Its memory and time are not modelled, and the line says by how much they differ."""
    args = _validated(monkeypatch, 1, "--preset 20b --bf16 --preset-layers 2".split())
    assert not not_counted(args)
    args.transformer_impl = "transformer_engine"
    (line,) = not_counted(args)
    assert "counted as local" in line and "FP8" not in line
    assert "1.08 times its memory, 1.23 to 2.13 times its time" in line
    args.fp8, args.fp8_recipe = "e4m3", "blockwise"
    (line,) = not_counted(args)
    assert "FP8 copies of the weights take 3.29 GB" in line and "1.38 times its memory" in line
    args.fp8_recipe = "delayed"
    assert "delayed was not measured" in " ".join(not_counted(args))


@pytest.mark.parametrize("name", TE_RESULTS)
def test_fp8_copies_as_measured(name):
    """Local and the copies is within a tenth of current scaling; blocks take more than that."""
    local, others = te_layers(name)
    planned = local["peak_mib"] + fp8_copies(_two_layers()) / 2**20
    assert planned == pytest.approx(others["tensorwise"]["peak_mib"], rel=0.1)
    assert planned < others["blockwise"]["peak_mib"]


def _two_layers():
    return Layout(get_preset("20b", 2), 1, seq_length=8192, loss_chunk=4096)
