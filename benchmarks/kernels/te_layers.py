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
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # as Megatron demands it of a run

import torch

from benchmarks.kernels import attention, context_parallel
from benchmarks.kernels.attention import ERROR_LIMIT, names
from benchmarks.lib import cases, report
from benchmarks.lib.harness import Trainer, make_batch, start_alone, timed
from benchmarks.lib.ranks import over_ranks, slowest
from megatron.core import parallel_state
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


@dataclass(kw_only=True)
class AttentionRow(attention.Row):
    """One row of attention."""

    ranks: int


@dataclass(kw_only=True)
class StepRow(cases.Row):
    """One row of the steps.

    Attributes:
        adamw_ms: the optimizer's step, step_ms: that and forward and backward.
        peak_mib: of both.
    """

    backend: str
    adamw_ms: float
    step_ms: float
    peak_mib: float


@dataclass(frozen=True)
class Case:
    """A part of the benchmark: `run` takes (args, left_out) and returns rows."""

    name: str
    run: Callable


def main() -> None:
    """Run the selected cases, print and write the results."""
    args = parse_arguments()
    if under_torchrun():
        context_parallel.start_group()
    cases.run(args, cases.machine(), run_case, table)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def parse_arguments() -> argparse.Namespace:
    """Parse the command line; unknown names are rejected."""
    parser = cases.make_parser(__doc__, names(CASES), seconds=2.0)
    parser.add_argument("--steps", nargs="*", metavar="NAME", help="of " + "; ".join(STEPS))
    args = parser.parse_args()
    args.workloads = cases.choose(parser, args, CASES, TINY)
    report.check_names(parser, args.steps or (), STEPS, "--steps", separator="; ")
    measure = split_case if under_torchrun() else one_gpu_case
    args.chosen = [Case(one.name, partial(measure, one)) for one in args.workloads]
    if under_torchrun():
        return args
    te = installed_versions().te
    if te and device() == "cuda" and torch.cuda.device_count() > 1:
        args.chosen.append(Case("two GPUs", on_two))
    if args.steps is None:
        args.steps = list(STEPS) if te else ["local"]
    args.chosen += [Case(f"step {name}", partial(step_case, name)) for name in args.steps]
    return args


def under_torchrun() -> bool:
    """Whether this process is one of those that `on_two` starts."""
    return "RANK" in os.environ


def run_case(case: Case, args: argparse.Namespace, left_out: list) -> list[cases.Row]:
    """Rows of a case; the other cases still run if it fails."""
    try:
        return case.run(args, left_out)
    except Exception as error:
        if under_torchrun():
            raise  # the other rank waits
        left_out.append([case.name, f"{type(error).__name__}: {error}"])
        return []


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


def one_gpu_case(workload: Workload, args, left_out: list) -> list[AttentionRow]:
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


def split_case(workload: Workload, args, left_out: list) -> list[AttentionRow]:
    """Attention over the ranks: halo or all-to-all for this project, a2a for TransformerEngine."""
    group = torch.distributed.group.WORLD
    wrong = {}
    for name in calls_of(workload, group):
        found = check(workload, name, group)
        wrong[name] = {what: max(over_ranks(x)) for what, x in found.items()}
    local = replace(workload, seqlen=workload.seqlen // group.size()).tensors()
    calls = {name: (call, local) for name, call in calls_of(workload, group).items()}
    times = context_parallel.time_in_turn(calls, args.seconds)
    rows = []
    for name, rounds in times.items():
        memory = [max(over_ranks(x)) for x in peak_memory(*calls[name])]
        samples = slowest(rounds)
        rows.append(make_row(workload, name, group.size(), samples, memory, wrong[name]))
    return rows


def make_row(workload, name, ranks, times, memory, errors) -> AttentionRow:
    """A row of attention without the cost of the sink; wrong values get no figure."""
    if not max(errors.values()) < ERROR_LIMIT:
        times = [math.nan]
    kernel = "cuDNN"
    if name == "auto":
        kernel = registry.BACKENDS[workload.selected_backend()].kernel
    return AttentionRow(
        case=workload.name,
        backend=name,
        kernel=kernel,
        **cases.milliseconds(times),
        tflops=workload.flops / ranks / quantiles(times)[1] / 1e9,
        peak_mib=memory[0],
        beyond_mib=memory[1],
        sink_mib=math.nan,
        ms_without_sink=math.nan,
        ratio=math.nan,
        errors=errors,
        ranks=ranks,
    )


def on_two(args, left_out: list) -> list[AttentionRow]:
    """Run this benchmark on two GPUs."""
    path = Path(args.json or "/tmp/transformer_engine.json").with_suffix(".two.json")
    path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", __spec__.name, "--seconds", str(args.seconds)]
    command += ["--json", str(path), "--cases", *names(args.workloads)]
    try:
        done = subprocess.run(command, cwd=report.ROOT, capture_output=True, text=True, timeout=90)
        if done.returncode:
            left_out.append(["two GPUs", done.stderr[-1500:]])
    except subprocess.TimeoutExpired:
        left_out.append(["two GPUs", "took more than 90 s"])
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    path.unlink(missing_ok=True)
    return [
        AttentionRow(**{k: math.nan if v is None else v for k, v in row.items()}) for row in rows
    ]


def step_case(name: str, args, left_out: list) -> list[StepRow]:
    """A complete step of two layers by one implementation."""
    if not torch.distributed.is_initialized():
        start_alone()
    try:
        return [step(name, args.smoke)]
    finally:
        parallel_state.destroy_model_parallel()


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
    return StepRow(
        case=f"two layers, {length}",
        backend=name,
        **cases.milliseconds(times[2:]),
        adamw_ms=statistics.median(updates[2:]),
        step_ms=statistics.median(a + b for a, b in zip(times[2:], updates[2:])),
        peak_mib=peak,
    )


def table(rows: list) -> str:
    """The table of benchmarks/kernels/attention.py, or that of the steps."""
    if isinstance(rows[0], AttentionRow):
        return attention.table([replace(row, case=f"{row.case}, {row.ranks}") for row in rows])
    lines = [["case", "backend", "ms", "p20", "p80", "AdamW ms", "step ms", "peak MiB"]]
    for row in rows:
        figures = (row.ms, row.ms_p20, row.ms_p80, row.adamw_ms, row.step_ms)
        lines.append([row.case, row.backend, *(f"{x:.3f}" for x in figures), f"{row.peak_mib:.0f}"])
    return "\n" + aligned(lines, left=(0, 1))


if __name__ == "__main__":
    main()
