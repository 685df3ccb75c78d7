# Copyright (c) 2026, the megatron-core gptoss authors.

"""TransformerEngine beside this project's own modules: attention with sinks, and two layers.

    python benchmarks/te_layers.py --json benchmarks/results/te_layers_h100x2.json
    python benchmarks/te_layers.py --smoke               (CPU: our side alone, tiny sizes)

Attention: one layer with the heads of gpt-oss, bf16, forward and backward, our "auto" and
TransformerEngine's DotProductAttention with a learnable sink, timed in turn on fresh data, checked
first on a short sequence against plain PyTorch in float64 (a wrong one gets no figure). With a
second GPU the same again over both, a2a, started by itself under torchrun: milliseconds of the
slowest rank, TFLOP/s a rank. Step: forward and backward of two layers of 20b with embedding, head
and loss (no optimizer), local, TransformerEngine in bf16 with either attention, and in FP8.

Without TransformerEngine only our side has rows.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # as Megatron demands it of a run

import torch

from benchmarks import context_parallel, report
from benchmarks.attention import machine, names
from benchmarks.trainer import Trainer, make_batch, start_alone, timed
from megatron.core.transformer.sink_attention.context_parallel import local_tokens
from megatron.core.transformer.sink_attention.measure import (
    Workload,
    device,
    peak_memory,
    quantiles,
    run_once,
    time_interleaved,
)
from megatron.gpt_oss.presets import get_preset
from megatron.gpt_oss.transformer_engine import installed_versions

K = 1024
CASES = [
    Workload("causal-8k", 8 * K),
    Workload("causal-32k", 32 * K),
    Workload("window-8k", 8 * K, window=128),
    Workload("window-32k", 32 * K, window=128),
]
TINY = [
    Workload("tiny", 96, heads=8, groups=2, dim=16),
    Workload("tiny-window", 96, window=8, heads=8, groups=2, dim=16),
]
TE = dict(transformer_impl="transformer_engine")
STEPS = {
    "local": {},
    "TE bf16, our attention": TE,
    "TE bf16, TE's attention": dict(TE, sink_attention="te"),
    "TE FP8 current scaling": dict(TE, fp8="hybrid", fp8_recipe="tensorwise"),
    "TE FP8 blockwise": dict(TE, fp8="e4m3", fp8_recipe="blockwise"),
}
STEP_LENGTH = 8 * K
ERROR_LIMIT = 1e-2


@dataclass
class Row:
    """One line of the table."""

    case: str
    backend: str
    ranks: int
    ms: float
    ms_p20: float
    ms_p80: float
    tflops: float
    peak_mib: float
    error: float


def main() -> None:
    """Run what was chosen, print it, write what was asked for."""
    args = parse_arguments()
    begin = time.perf_counter()
    split = "RANK" in os.environ
    rows, left_out = [], []
    if split:
        context_parallel.start_group()
    facts = machine()
    first = not split or torch.distributed.get_rank() == 0

    def save() -> None:
        if args.json and first:
            report.write_rows(Path(args.json), facts, ["python"], rows, left_out)

    if first and not split:
        print(" ".join(f"{name}={value}" for name, value in facts.items()), flush=True)
    for workload in args.workloads:
        try:
            found = split_case(workload, args) if split else whole_case(workload, args, left_out)
        except Exception as error:  # the other cases have their figures all the same
            if split:
                raise  # the other rank waits
            left_out.append([workload.name, f"{type(error).__name__}: {error}"])
            continue
        rows += found
        if first:
            print(table(found), flush=True)
        save()
    if not split:
        if device() == "cuda" and torch.cuda.device_count() > 1 and installed_versions().te:
            found, reason = on_two(args)
            rows += found
            left_out += [["two GPUs", reason]] if reason else []
            save()
        rows += steps(args, left_out)
        for case, reason in left_out:
            print(f"{case}: {reason}")
        print(f"{time.perf_counter() - begin:.0f} s in all")
    save()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def parse_arguments() -> argparse.Namespace:
    """The command line; an unknown name is refused with those that there are."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", metavar="NAME", help="of " + ", ".join(names(CASES)))
    parser.add_argument("--steps", nargs="*", metavar="NAME", help="of " + "; ".join(STEPS))
    parser.add_argument("--seconds", type=float, default=2.0, help="of measuring a case")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, for the CPU")
    parser.add_argument("--json", metavar="PATH")
    args = parser.parse_args()
    by_name = {workload.name: workload for workload in CASES + TINY}
    chosen = args.cases or names(TINY if args.smoke else CASES)
    report.check_names(parser, chosen, by_name)
    report.check_names(parser, args.steps or (), STEPS, "--steps", separator="; ")
    args.workloads = [by_name[name] for name in chosen]
    if args.steps is None:
        args.steps = list(STEPS) if installed_versions().te else ["local"]
    return args


def te_call(workload: Workload, group=None):
    """TransformerEngine's attention as a function of q, k, v, sink, shaped like sink_attention."""
    from transformer_engine.pytorch import DotProductAttention

    split = {}
    if group is not None:
        split = dict(
            cp_group=group,
            cp_global_ranks=torch.distributed.get_process_group_ranks(group),
            cp_stream=torch.cuda.Stream(),
            cp_comm_type="a2a",
        )
    window = {} if workload.window is None else dict(window_size=(workload.window - 1, 0))
    module = DotProductAttention(
        workload.heads,
        workload.dim,
        num_gqa_groups=workload.groups,
        attention_dropout=0.0,
        qkv_format="sbhd",
        attn_mask_type="causal",
        softmax_type="learnable",
        **split,
        **window,
    )

    def call(q, k, v, sink):
        out = torch.func.functional_call(module, {"softmax_offset": sink}, (q, k, v))
        return out.view(q.shape)

    return call


def calls_of(workload: Workload, group=None) -> dict:
    """Each implementation of this workload."""
    options = {} if group is None else dict(cp_group=group, cp_comm_type="auto")
    calls = {"auto": workload.call("auto", **options)}
    if device() == "cuda" and installed_versions().te:
        calls["TransformerEngine"] = te_call(workload, group)
    return calls


def check(workload: Workload, name: str, group=None) -> float:
    """Largest relative error of out and the gradients on a short sequence, against float64."""
    short = workload.short()
    tensors = [x.detach() for x in short.tensors()]
    generator = torch.Generator(device=device()).manual_seed(1)
    for x in (*tensors[:3], tensors[4]):
        x.normal_(generator=generator)

    def part(x):
        return x if group is None else local_tokens(x, group)

    leaves = [part(tensors[i]).detach().requires_grad_(i < 4) for i in (0, 1, 2, 4)]
    sink = tensors[3].clone().requires_grad_()
    values = run_once(calls_of(short, group)[name], (*leaves[:3], sink, leaves[3]), True)
    if group is not None:
        torch.distributed.all_reduce(values[4], group=group)
        if name != "auto":  # each rank has the whole of it (docs/transformer_engine.md)
            values[4] = values[4] / group.size()
    exact = tuple(x.double().requires_grad_(i < 4) for i, x in enumerate(tensors))
    expected = run_once(short.call("math"), exact, True)
    worst = 0.0
    for index, (value, target) in enumerate(zip(values, expected)):
        own = part(target) if index < 4 else target
        worst = max(worst, ((value.double() - own).norm() / target.norm()).item())
    return worst


def whole_case(workload: Workload, args, left_out: list) -> list[Row]:
    """Attention on one GPU."""
    tensors, calls, wrong = workload.tensors(), {}, {}
    for name, call in calls_of(workload).items():
        try:
            wrong[name] = check(workload, name)
            calls[name] = (call, True)
        except Exception as error:  # one that fails must not hide the other
            left_out.append([f"{workload.name} {name}", f"{type(error).__name__}: {error}"])
    times = time_interleaved(calls, tensors, args.seconds) if calls else {}
    return [
        make_row(workload, name, 1, times[name], peak_memory(call, tensors)[0], wrong[name])
        for name, (call, _) in calls.items()
    ]


def split_case(workload: Workload, args) -> list[Row]:
    """Attention over the ranks; a window's halo for ours, a2a for TransformerEngine."""
    group = torch.distributed.group.WORLD
    wrong = {
        name: max(context_parallel.over_ranks(check(workload, name, group)))
        for name in calls_of(workload, group)
    }
    local = replace(workload, seqlen=workload.seqlen // group.size()).tensors()
    calls = {name: (call, local) for name, call in calls_of(workload, group).items()}
    times = context_parallel.time_in_turn(calls, args.seconds)
    rows = []
    for name, rounds in times.items():
        peak = max(context_parallel.over_ranks(context_parallel.one_pass(*calls[name], group)[2]))
        slowest = context_parallel.slowest(rounds)
        rows.append(make_row(workload, name, group.size(), slowest, peak, wrong[name]))
    return rows


def make_row(workload, name, ranks, times, peak, error) -> Row:
    """A row of attention; no figure for what is wrong."""
    p20, median, p80 = quantiles(times)
    if not error < ERROR_LIMIT:
        p20 = median = p80 = math.nan
    tflops = workload.flops / ranks / median / 1e9
    return Row(workload.name, name, ranks, median, p20, p80, tflops, peak, error)


def on_two(args) -> tuple[list[Row], str | None]:
    """This script again, on two GPUs; the rows, or why there are none."""
    path = Path(args.json or "/tmp/transformer_engine.json").with_suffix(".two.json")
    path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", __file__, "--seconds", str(args.seconds)]
    command += ["--json", str(path), "--cases", *names(args.workloads)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=90)
        reason = None if done.returncode == 0 else done.stderr[-1500:]
        print(done.stdout, flush=True)
    except subprocess.TimeoutExpired:
        reason = "took more than 90 s"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    path.unlink(missing_ok=True)
    return [
        Row(**{k: math.nan if v is None else v for k, v in row.items()}) for row in rows
    ], reason


def steps(args, left_out: list) -> list[Row]:
    """Two layers, forward and backward, by implementation."""
    start_alone()
    found = []
    for name in args.steps:
        try:
            found.append(step(name, args.smoke))
            print(table(found[-1:]), flush=True)
        except Exception as error:
            left_out.append([f"step {name}", f"{type(error).__name__}: {error}"])
            from megatron.core import parallel_state

            parallel_state.destroy_model_parallel()
    return found


def step(name: str, smoke: bool) -> Row:
    """Median of five after two that warm up; TFLOP/s are not counted here."""
    preset = get_preset("tiny" if smoke else "20b", 2)
    length = 128 if smoke else STEP_LENGTH
    options = dict(seq_length=length, loss_chunk=0 if smoke else 4096, bf16=not smoke)
    trainer = Trainer(preset, optimizer=False, **options, **STEPS[name])
    try:
        batch, losses, times = make_batch(preset.vocab_size, length), [], []

        def micro_batch() -> None:
            trainer.zero_gradients()
            losses.append(trainer.forward_backward(batch))

        for _ in range(7):
            if device() == "cuda":
                torch.cuda.reset_peak_memory_stats()
            times.append(timed(micro_batch) * 1e3)
        if not torch.isfinite(losses[-1]).all():
            raise FloatingPointError(f"the loss is {losses[-1].tolist()}")
        peak = torch.cuda.max_memory_allocated() / 2**20 if device() == "cuda" else math.nan
    finally:
        trainer.close()
    p20, median, p80 = quantiles(times[2:])
    return Row(f"two layers, {length}", name, 1, median, p20, p80, math.nan, peak, math.nan)


def table(rows: list[Row]) -> str:
    """Aligned columns with units in the header."""
    lines = [["case", "backend", "ranks", "ms", "p20", "p80", "TFLOP/s a rank", "MiB", "max error"]]
    for row in rows:
        figures = [f"{x:.3f}" for x in (row.ms, row.ms_p20, row.ms_p80)]
        wrong = " WRONG" if row.error >= ERROR_LIMIT else ""
        tail = ["-" if math.isnan(row.tflops) else f"{row.tflops:.0f}", f"{row.peak_mib:.0f}"]
        error = "-" if math.isnan(row.error) else f"{row.error:.1e}{wrong}"
        lines.append([row.case, row.backend, str(row.ranks), *figures, *tail, error])
    return "\n" + report.columns(lines, words=(0, 1))


if __name__ == "__main__":
    main()
