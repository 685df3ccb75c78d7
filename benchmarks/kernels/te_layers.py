# Copyright (c) 2026, the megatron-core gptoss authors.

"""TransformerEngine and this project's modules: attention with sinks, and two layers.

    python -m benchmarks.kernels.te_layers --json benchmarks/results/te_layers_h100x2.json
    python -m benchmarks.kernels.te_layers --smoke               (CPU: this project only, tiny sizes)

Attention: the columns of benchmarks/kernels/attention.py, for our "auto" and TransformerEngine's
DotProductAttention with a learnable sink. Values are checked first on a short sequence against plain
PyTorch in float64 (wrong ones get no figure), then timed alternately on fresh data, with and without
the sink. If there is a second GPU, the benchmark starts itself under torchrun on both: halo or
all-to-all for ours, all-to-all for TransformerEngine; milliseconds of the slowest rank, TFLOP/s and
MiB of one, nothing without a sink.

Step: two layers of 20b with embedding, head, loss and AdamW, local, TransformerEngine in bf16 with
either attention, and in FP8; peak MiB are those of the complete step.

Without TransformerEngine only this project has rows.
"""

import argparse
import contextlib
import io
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # as Megatron demands it of a run

import torch

from benchmarks.kernels import attention, context_parallel
from benchmarks.kernels.attention import ERROR_LIMIT, machine, names
from benchmarks.lib import report
from benchmarks.lib.harness import Trainer, make_batch, start_alone, timed
from megatron.core.transformer.sink_attention import registry
from megatron.core.transformer.sink_attention.context_parallel import local_tokens
from megatron.gpt_oss.arguments.te_requirements import installed_versions
from megatron.gpt_oss.diagnostics.attention_timing import (
    Workload,
    device,
    peak_memory,
    quantiles,
    run_once,
    time_interleaved,
)
from megatron.gpt_oss.presets import get_preset
from megatron.gpt_oss.text_table import aligned

K = 1024
CASES = [
    Workload("causal-8k", 8 * K),
    Workload("causal-32k", 32 * K),
    Workload("window-8k", 8 * K, window_size=(127, 0)),
    Workload("window-32k", 32 * K, window_size=(127, 0)),
]
TINY = [
    Workload("tiny", 96, heads=8, groups=2, dim=16),
    Workload("tiny-window", 96, window_size=(7, 0), heads=8, groups=2, dim=16),
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
VALUES = ("out", "dq", "dk", "dv", "dsink")


@dataclass
class AttentionRow(attention.Row):
    """One row of attention."""

    ranks: int


@dataclass
class StepRow:
    """One row of the steps.

    Attributes:
        ms, ms_p20, ms_p80: forward and backward.
        adamw_ms: the optimizer's step, step_ms: both.
        peak_mib: of both.
    """

    case: str
    backend: str
    ms: float
    ms_p20: float
    ms_p80: float
    adamw_ms: float
    step_ms: float
    peak_mib: float


def main() -> None:
    """Run the selected cases, print and write the results."""
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
            print(attention_table(found), flush=True)
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
    """Parse the command line; unknown names are rejected."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", metavar="NAME", help="of " + ", ".join(names(CASES)))
    parser.add_argument("--steps", nargs="*", metavar="NAME", help="of " + "; ".join(STEPS))
    parser.add_argument("--seconds", type=float, default=2.0, help="of measuring a case")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, for the CPU")
    parser.add_argument("--json", metavar="PATH")
    args = parser.parse_args()
    if args.smoke:
        args.seconds = 0.1
    by_name = {workload.name: workload for workload in CASES + TINY}
    chosen = args.cases or names(TINY if args.smoke else CASES)
    report.check_names(parser, chosen, by_name)
    report.check_names(parser, args.steps or (), STEPS, "--steps", separator="; ")
    args.workloads = [by_name[name] for name in chosen]
    if args.steps is None:
        args.steps = list(STEPS) if installed_versions().te else ["local"]
    return args


def te_call(workload: Workload, group=None):
    """TransformerEngine's attention with the signature of sink_attention."""
    from transformer_engine.pytorch import DotProductAttention

    options = {}
    if group is not None:
        options = dict(
            cp_group=group,
            cp_global_ranks=torch.distributed.get_process_group_ranks(group),
            cp_stream=torch.cuda.Stream(),
            cp_comm_type="a2a",
        )
    if workload.window_size is not None:
        options["window_size"] = workload.window_size
    with_sink, without = (
        DotProductAttention(
            workload.heads,
            workload.dim,
            num_gqa_groups=workload.groups,
            attention_dropout=0.0,
            qkv_format="sbhd",
            attn_mask_type="causal",
            softmax_type=softmax_type,
            **options,
        )
        for softmax_type in ("learnable", "vanilla")
    )

    def call(q, k, v, sink):
        if sink is None:
            return without(q, k, v).view(q.shape)
        out = torch.func.functional_call(with_sink, {"softmax_offset": sink}, (q, k, v))
        return out.view(q.shape)

    return call


def calls_of(workload: Workload, group=None) -> dict:
    """Implementations of a workload."""
    options = {} if group is None else dict(cp_group=group, cp_comm_type="auto")
    calls = {"auto": workload.call("auto", **options)}
    if device() == "cuda" and installed_versions().te:
        calls["TransformerEngine"] = te_call(workload, group)
    return calls


def check(workload: Workload, name: str, group=None) -> dict[str, float]:
    """Relative errors of out and the gradients on a short sequence, against float64."""
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
    found = {}
    for what, value, target in zip(VALUES, values, expected):
        own = target if what == "dsink" else part(target)
        found[what] = ((value.double() - own).norm() / target.norm()).item()
    return found


def whole_case(workload: Workload, args, left_out: list) -> list[AttentionRow]:
    """Attention on one GPU."""
    tensors, calls, wrong = workload.tensors(), {}, {}
    for name, call in calls_of(workload).items():
        try:
            wrong[name] = check(workload, name)
            calls[name] = call
        except Exception as error:  # one that fails must not hide the other
            left_out.append([f"{workload.name} {name}", f"{type(error).__name__}: {error}"])
    timed_calls = {name: (call, True) for name, call in calls.items()}
    timed_calls |= {f"{name} without": (call, False) for name, call in calls.items()}
    times = time_interleaved(timed_calls, tensors, args.seconds) if calls else {}
    rows = []
    for name, call in calls.items():
        row = make_row(workload, name, 1, times[name], peak_memory(call, tensors), wrong[name])
        plain = quantiles(times[f"{name} without"])[1]
        _, beyond = peak_memory(call, tensors, with_sink=False)
        row.ms_without_sink, row.ratio = plain, plain / row.ms
        row.sink_mib = row.beyond_mib - beyond
        rows.append(row)
    return rows


def split_case(workload: Workload, args) -> list[AttentionRow]:
    """Attention over the ranks: halo or all-to-all for this project, a2a for TransformerEngine."""
    group = torch.distributed.group.WORLD
    wrong = {}
    for name in calls_of(workload, group):
        found = check(workload, name, group)
        wrong[name] = {what: max(context_parallel.over_ranks(x)) for what, x in found.items()}
    local = replace(workload, seqlen=workload.seqlen // group.size()).tensors()
    calls = {name: (call, local) for name, call in calls_of(workload, group).items()}
    times = context_parallel.time_in_turn(calls, args.seconds)
    rows = []
    for name, rounds in times.items():
        memory = [max(context_parallel.over_ranks(x)) for x in peak_memory(*calls[name])]
        slowest = context_parallel.slowest(rounds)
        rows.append(make_row(workload, name, group.size(), slowest, memory, wrong[name]))
    return rows


def make_row(workload, name, ranks, times, memory, errors) -> AttentionRow:
    """A row of attention without the cost of the sink; wrong values get no figure."""
    p20, median, p80 = quantiles(times)
    if not max(errors.values()) < ERROR_LIMIT:
        p20 = median = p80 = math.nan
    kernel = "cuDNN"
    if name == "auto":
        kernel = registry.BACKENDS[workload.selected_backend()].kernel
    return AttentionRow(
        case=workload.name,
        backend=name,
        kernel=kernel,
        ms=median,
        ms_p20=p20,
        ms_p80=p80,
        tflops=workload.flops / ranks / median / 1e9,
        peak_mib=memory[0],
        beyond_mib=memory[1],
        sink_mib=math.nan,
        ms_without_sink=math.nan,
        ratio=math.nan,
        errors=errors,
        ranks=ranks,
    )


def on_two(args) -> tuple[list[AttentionRow], str | None]:
    """Run this benchmark on two GPUs; its rows, or why there are none."""
    path = Path(args.json or "/tmp/transformer_engine.json").with_suffix(".two.json")
    path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", __spec__.name, "--seconds", str(args.seconds)]
    command += ["--json", str(path), "--cases", *names(args.workloads)]
    try:
        done = subprocess.run(command, cwd=report.ROOT, capture_output=True, text=True, timeout=90)
        reason = None if done.returncode == 0 else done.stderr[-1500:]
        print(done.stdout, flush=True)
    except subprocess.TimeoutExpired:
        reason = "took more than 90 s"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    path.unlink(missing_ok=True)
    return [
        AttentionRow(**{k: math.nan if v is None else v for k, v in row.items()}) for row in rows
    ], reason


def steps(args, left_out: list) -> list[StepRow]:
    """A complete step of two layers, by implementation."""
    start_alone()
    found = []
    for name in args.steps:
        try:
            found.append(step(name, args.smoke))
            print(step_table(found[-1:]), flush=True)
        except Exception as error:
            left_out.append([f"step {name}", f"{type(error).__name__}: {error}"])
            from megatron.core import parallel_state

            parallel_state.destroy_model_parallel()
    return found


def step(name: str, smoke: bool) -> StepRow:
    """Median of five steps after two warm-up steps."""
    preset = get_preset("tiny" if smoke else "20b", 2)
    length = 128 if smoke else STEP_LENGTH
    options = dict(seq_length=length, loss_chunk=0 if smoke else 4096, bf16=not smoke)
    with contextlib.redirect_stdout(io.StringIO()):  # Megatron counts parameters aloud
        trainer = Trainer(preset, **options, **STEPS[name])
    try:
        batch, losses, times, updates = make_batch(preset.vocab_size, length), [], [], []
        for number in range(7):
            if number == 2 and device() == "cuda":
                torch.cuda.reset_peak_memory_stats()
            trainer.zero_gradients()
            times.append(timed(lambda: losses.append(trainer.forward_backward(batch))) * 1e3)
            updates.append(timed(trainer.update) * 1e3)
        if not torch.isfinite(losses[-1]).all():
            raise FloatingPointError(f"the loss is {losses[-1].tolist()}")
        peak = torch.cuda.max_memory_allocated() / 2**20 if device() == "cuda" else math.nan
    finally:
        trainer.close()
    p20, median, p80 = quantiles(times[2:])
    _, whole, _ = quantiles([a + b for a, b in zip(times[2:], updates[2:])])
    _, adamw, _ = quantiles(updates[2:])
    return StepRow(f"two layers, {length}", name, median, p20, p80, adamw, whole, peak)


def attention_table(rows: list[AttentionRow]) -> str:
    """The table of benchmarks/kernels/attention.py."""
    return attention.table([replace(row, case=f"{row.case}, {row.ranks}") for row in rows])


def step_table(rows: list[StepRow]) -> str:
    """Aligned columns with units in the header."""
    lines = [["case", "backend", "ms", "p20", "p80", "AdamW ms", "step ms", "peak MiB"]]
    for row in rows:
        figures = (row.ms, row.ms_p20, row.ms_p80, row.adamw_ms, row.step_ms)
        lines.append([row.case, row.backend, *(f"{x:.3f}" for x in figures), f"{row.peak_mib:.0f}"])
    return "\n" + aligned(lines, left=(0, 1))


if __name__ == "__main__":
    main()
