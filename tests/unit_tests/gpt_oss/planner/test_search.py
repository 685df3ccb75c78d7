# Copyright (c) 2026, the megatron-core gptoss authors.

"""Search over layouts and its order; errors; `gptoss plan` and --dry-run; rates.json."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from megatron.gpt_oss import cli
from megatron.gpt_oss.arguments.flags import LM_LOSS_CHUNK_SIZE
from megatron.gpt_oss.planner.layout import Layout, Recompute, loss_chunk_of
from megatron.gpt_oss.planner.memory import peak_rank_memory
from megatron.gpt_oss.planner.parameters import rank_parameters
from megatron.gpt_oss.planner.rates import Rates, collect, load
from megatron.gpt_oss.planner.search import PlanRequest, all_plans, layouts
from megatron.gpt_oss.planner.time import step_time
from megatron.gpt_oss.presets import get_preset

ROOT = Path(__file__).resolve().parents[4]
B20, B120 = get_preset("20b"), get_preset("120b")


def _plan(capsys, *argv):
    cli.main(["plan", *map(str, argv)])
    return capsys.readouterr().out


def test_published_sizes():
    """20.9 and 116.8 thousand million parameters, as the model cards count them."""
    for preset, published in ((B20, 20.91e9), (B120, 116.83e9)):
        assert sum(rank_parameters(Layout(preset, 1), 0)) == pytest.approx(published, rel=1e-3)


@pytest.mark.parametrize("sizes", [dict(tp=2, ep=4), dict(ep=8, pp=2), dict(tp=2, etp=2, ep=2)])
def test_ranks_hold_the_model_once(sizes):
    """All ranks of one copy together: the experts once, the rest once a copy of it."""
    layout = Layout(B20, 16, **sizes)
    dense, expert = map(sum, zip(*(rank_parameters(layout, s) for s in range(layout.pp))))
    whole_dense, whole_expert = rank_parameters(Layout(B20, 1), 0)
    assert expert * layout.ep * layout.etp == pytest.approx(whole_expert, rel=1e-3)
    assert dense * layout.tp == pytest.approx(whole_dense, rel=1e-2)


def test_layouts():
    """All of the GPUs are used, no layout comes twice, nothing that Megatron refuses."""
    found = list(layouts(PlanRequest(Layout(B20, 8, seq_length=4096, global_batch_size=128), 80e9)))
    assert len(found) == len(set(found)) > 100
    for layout in found:
        assert layout.tp * layout.cp * layout.pp * layout.dp == 8
        assert layout.etp * layout.ep * layout.pp * layout.expert_dp == 8
        assert layout.unsupported_reason() is None and layout.microbatches >= 1


def test_order():
    plans = all_plans(PlanRequest(Layout(B20, 8, seq_length=4096, global_batch_size=128), 80e9))
    fit = [plan.fits for plan in plans]
    assert fit == sorted(fit, reverse=True)
    for group in (True, False):
        times = [p.time.total for p in plans if p.fits and bool(p.layout.offload) == group]
        assert times == sorted(times)
    assert all((plan.memory.total <= 80e9) == plan.fits for plan in plans)
    assert not plans[0].layout.offload


def test_long_sequences_recompute_experts():
    """Attention takes most of the time at 128k tokens: the best layout does not recompute it."""
    request = PlanRequest(Layout(B20, 8, seq_length=131072, global_batch_size=8), 80e9)
    best = all_plans(request)[0]
    assert best.fits and best.layout.policy() == "experts"
    assert "--memory experts" in best.layout.flags()
    others = [p for p in all_plans(request) if p.fits and p.layout.policy() != "experts"]
    assert not others or best.time.total < others[0].time.total


def test_policies_trade_time_for_memory():
    base = Layout(B20, 8, ep=8, seq_length=32768, global_batch_size=16)
    totals = []
    assert loss_chunk_of("fast") == LM_LOSS_CHUNK_SIZE
    for name in ("fast", "balanced", "experts", "lean"):
        chunk = loss_chunk_of(name)
        layout = replace(base, recompute=Recompute.from_policy(name), loss_chunk=chunk)
        assert layout.policy() == name
        totals.append((peak_rank_memory(layout).total, -step_time(layout).total))
    assert totals == sorted(totals, reverse=True)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(tp=3), "tp = 3 does not divide the 64 attention heads"),
        (dict(tp=16), "tp = 16 does not divide the 8 key and value heads"),
        (dict(ep=64), "ep = 64 does not divide the 32 experts"),
        (dict(pp=5), "pp = 5 does not divide the 24 layers"),
        (dict(cp=4, tp=4), "tp [*] cp [*] pp = 16 does not divide the 8 GPUs"),
        (dict(cp=4, seq_length=4100), "sequence length 4100 is not a multiple of 8"),
        (dict(global_batch_size=12), "global batch of 12 is not a multiple of micro batch 1"),
        (dict(cp=2, tp=2, ep=4), None),
    ],
)
def test_unsupported(changes, message):
    found = replace(Layout(B20, 8, global_batch_size=16), **changes).unsupported_reason()
    assert found is None if message is None else re.search(message, found)


def test_rates():
    """Interpolated between two points; the nearest one outside of them."""
    rates = Rates(
        {
            "experts": {
                "dense_tflops": [[100, 10.0], [300, 30.0]],
                "grouped_tflops": [[100, 1.0]],
                "recompute_tflops": [[100, 2.0]],
                "memory_gb_per_s": 5.0,
            }
        }
    )
    assert [rates.dense_gemm(n) / 1e12 for n in (1, 100, 150, 300, 999)] == [10, 10, 15, 30, 30]
    assert rates.experts(7, True) == 2e12 and rates.memory() == 5e9


def test_rates_are_those_of_the_results():
    """rates.json is what its command writes from the results in the repository."""
    directory = ROOT / "benchmarks" / "results"
    names = [Path(source["file"]).name for source in load()["sources"].values()]
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        pytest.skip(f"not in benchmarks/results: {', '.join(missing)}")
    assert collect(directory) == load()


def test_time():
    """Experts and attention on one GPU: FLOPs divided by their rates; the pipeline bubble."""
    layout = Layout(B20, 1, seq_length=32768, global_batch_size=2)
    time = step_time(layout)
    experts = 2 * 24 * 18 * (4 * 32768) * 2880 * 2880
    assert time.expert_gemms == pytest.approx(experts / Rates().experts(4 * 32768, False))
    full = 2 * 12 * 14 * (32768 * 32769 / 2) * 4096 / Rates().attention(32768, "cudnn")
    windowed = 2 * 12 * 32768 * Rates().window("cudnn")
    assert time.attention == pytest.approx(full + windowed)
    assert time.pipeline_bubble == time.data_parallel_comm == 0
    # A pipeline of 4 with 8 micro-batches idles for 3 of 11 turns, but for the head.
    time = step_time(Layout(B20, 4, pp=4, seq_length=32768, global_batch_size=8))
    busy = time.attention + time.expert_gemms + time.dense_gemms
    busy += time.memory_bound + time.model_parallel_comm
    assert 0.5 * 3 / 8 < time.pipeline_bubble / busy < 3 / 8


def test_table(capsys):
    out = _plan(capsys, "--preset", "20b", "--gpus", 8, "--seq-length", 131072, "--rows", 3)
    lines = out.splitlines()
    assert lines[0].startswith("gpt-oss 20b, 24 layers, on 8 x 80 GB, 8 x 131072 tokens per step")
    header = lines[2].split()
    assert header[:6] == ["TP", "ETP", "EP", "CP", "PP", "DP"]
    assert "torchrun --nproc-per-node 8 pretrain_gpt_oss.py" in out
    assert "--use-distributed-optimizer" in out


def test_json(capsys):
    out = json.loads(_plan(capsys, "--preset", "120b", "--gpus", 64, "--json"))
    best = out["best"]
    assert best == out["layouts"][0] and best["fits"]
    memory = best["memory"]
    held = memory["parameters"] + memory["gradients"] + memory["optimizer"]
    assert memory["total"] == held + max(memory["phases"].values()) <= 80e9
    # The names of before, for one version.
    assert list(memory["moments"].values()) == list(memory["phases"].values())
    assert best["seconds"]["products"] == best["seconds"]["dense_gemms"]
    lean = json.loads(_plan(capsys, "--preset", "20b", "--gpus", 8, "--json", "--memory-only"))
    totals = [row["memory"]["total"] for row in lean["layouts"]]
    assert totals == sorted(totals) and "seconds" not in lean["layouts"][0]


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--preset 30b --gpus 8", "Unknown preset '30b'"),
        ("--preset 20b --gpus 0", "--gpus 0: expected more than 0"),
        ("--preset 20b --gpus 8 --tp 3", "tp = 3 does not divide the 64 attention heads"),
        (
            "--preset 20b --gpus 1",
            "needs .* GB per GPU, .* GB more .* Possible changes: GPUs of .* or 2 GPUs",
        ),
        ("--preset 120b --gpus 8 --no-offload", "dropping --no-offload"),
        ("--preset 120b --gpus 8", "or --grad-reduce-in-bf16"),
    ],
)
def test_refused(capsys, flags, message):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["plan", *flags.split()])
    assert exit_info.value.code == 2
    assert re.search(message, capsys.readouterr().err)
