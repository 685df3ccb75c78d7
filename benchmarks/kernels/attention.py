# Copyright (c) 2026, the megatron-core gptoss authors.

"""Attention with a learnable sink: every backend that this machine has, against one another.

    python -m benchmarks.kernels.attention                         all cases, under 6 minutes on an H100
    python -m benchmarks.kernels.attention --quick                 four cases, about a minute
    python -m benchmarks.kernels.attention --cases causal-32k packed-32k --backends fa4 cudnn
    python -m benchmarks.kernels.attention --json benchmarks/results/attention_h100.json --write-table

One layer with the heads of gpt-oss, bf16, forward and backward. The values are checked first, on a
short sequence of the same kind, against plain PyTorch in float64; a backend that is wrong gets no
figure. Then all backends are timed in turn, with the sink and without, on fresh random data, by
CUDA events; a row shows the median and the 20 % and 80 % quantiles.

TFLOP/s are model FLOPs: 14 x seen query-key pairs x heads x head dim, whatever a kernel computes
beyond them. MiB at the peak include q, k, v, out, lse and all gradients; `beyond` is the rest, the
kernel's own workspace, and `for the sink` what of it the same kernel does not need without one. The
ratio is the time of the same kernel without a sink over that with one. `auto` is a row of its own,
with the kernel that it takes, and its ratio is to the fastest kernel without a sink.

--write-table makes the order measured here that of "auto" on this kind of card. FlexAttention
stays out of it: it compiles for each shape.
"""

import argparse
import math
import time
from dataclasses import dataclass

import torch

from benchmarks.lib import cases, report
from megatron.core.transformer.sink_attention import measured_order, registry
from megatron.gpt_oss.diagnostics.attention_timing import (
    Workload,
    device,
    errors,
    peak_memory,
    quantiles,
    time_interleaved,
)
from megatron.gpt_oss.text_table import aligned


def documents(total: int, count: int) -> tuple[int, ...]:
    """Document lengths from short to long, in mixed order, with this total."""
    weights = [1 + (7 * i) % count for i in range(count)]
    lengths = [total * weight // sum(weights) for weight in weights]
    lengths[-1] += total - sum(lengths)
    return tuple(lengths)


K = 1024
# In the order of their worth: the time limit cuts from the end.
CASES = [
    Workload("causal-8k", 8 * K),
    Workload("causal-32k", 32 * K),
    Workload("window-32k", 32 * K, window_size=(127, 0)),
    Workload("packed-32k", 32 * K, documents=documents(32 * K, 32)),
    Workload("causal-1k-batch-32", K, batch=32),
    Workload("causal-128k", 128 * K),
    Workload("window-8k", 8 * K, window_size=(127, 0)),
    Workload("packed-window-32k", 32 * K, documents=documents(32 * K, 32), window_size=(127, 0)),
    Workload("causal-4k-batch-4", 4 * K, batch=4),
]
QUICK = ("causal-8k", "window-32k", "packed-32k", "causal-1k-batch-32")
TINY = [
    Workload("tiny", 96, heads=8, groups=2, dim=16),
    Workload(
        "tiny-packed", 96, documents=(1, 40, 55), window_size=(7, 0), heads=8, groups=2, dim=16
    ),
]
# Compiling FlexAttention takes half a minute a case: here only unless it is asked for by name.
FLEX_CASES = ("causal-8k", "causal-32k", "window-32k")
ERROR_LIMIT = 1e-2


@dataclass(kw_only=True)
class Row(cases.Row):
    """One row of the table."""

    backend: str
    kernel: str
    tflops: float
    peak_mib: float
    beyond_mib: float
    sink_mib: float
    ms_without_sink: float
    ratio: float
    errors: dict


def main() -> None:
    """Run the selected cases, print and write the results."""
    args = parse_arguments()
    rows = cases.run(args, cases.machine(), run_case, table)
    packed_cost(rows)
    against_aten(rows)
    if args.write_table:
        write_table(rows, args.chosen)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line; unknown names are rejected."""
    parser = cases.make_parser(__doc__, names(CASES), seconds=2.0, limit=330)
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}")
    parser.add_argument("--backends", nargs="+", metavar="NAME", help="all that can run by default")
    parser.add_argument("--write-table", action="store_true", help="make this the order of auto")
    args = parser.parse_args()
    if args.quick:
        args.cases = args.cases or QUICK
    args.chosen = cases.choose(parser, args, CASES, TINY)
    report.check_names(parser, args.backends or (), registry.BACKENDS, "--backends")
    if args.write_table and device() == "cpu":
        parser.error("--write-table: there is no GPU to measure")
    return args


def names(workloads: list[Workload]) -> list[str]:
    return [workload.name for workload in workloads]


def run_case(workload: Workload, args: argparse.Namespace, left_out: list) -> list[Row]:
    """Check values, measure time and memory."""
    checked = {}
    for name, reason in workload.unsupported_reasons().items():
        label = f"{workload.name} {name}"
        if args.backends and name not in args.backends:
            continue
        if reason is None and not args.backends:
            reason = too_slow(workload, name)
        if reason is None:
            start = time.perf_counter()
            checked[name], reason = check(workload, name)
            print(f"{label}: checked in {time.perf_counter() - start:.1f} s", flush=True)
        if reason is not None:
            checked.pop(name, None)
            left_out.append([label, reason])
    if not checked:
        return []
    tensors = workload.tensors()
    calls = {}
    for name in checked:
        if name != "fa4_native":  # without a sink it is fa4
            calls[f"{name} without"] = (workload.call(name), False)
        calls[name] = (workload.call(name), True)
    auto = None
    if not args.backends:
        auto = workload.selected_backend()
        calls["auto"] = (workload.call("auto"), True)
    times = time_interleaved(calls, tensors, args.seconds)
    rows = [
        make_row(workload, name, registry.BACKENDS[name].kernel, times, tensors, checked[name])
        for name in sorted(checked, key=lambda name: quantiles(times[name])[1])
    ]
    if auto is not None:
        rows.append(make_row(workload, "auto", auto, times, tensors, checked.get(auto, {})))
    return rows


def too_slow(workload: Workload, name: str) -> str | None:
    """Whether a backend would take longer than all others together."""
    if device() == "cpu":
        return None
    if name == "math" and workload.name not in names(TINY):
        return "plain PyTorch, 50 times slower; name it with --backends"
    if name == "flex" and workload.name not in FLEX_CASES:
        return "takes half a minute to compile; name it with --backends"
    return None


def check(workload: Workload, name: str) -> tuple[dict, str | None]:
    """Errors on a short sequence of the same kind, and the reason if the backend gets no figure."""
    try:
        found = errors(workload.short(), name)
    except Exception as error:  # the other cases still run, and the end lists this one
        return {}, f"FAILED: {type(error).__name__}: {str(error).splitlines()[0]}"
    worst = max(found, key=found.get)
    if not found[worst] < ERROR_LIMIT:
        return {}, f"WRONG: relative error of {worst} is {found[worst]:.1e}, no figure"
    return found, None


def make_row(workload, name, kernel, times, tensors, found) -> Row:
    median = quantiles(times[name])[1]
    without = [key for key in times if key.endswith(" without")]
    if name == "auto":
        plain = min(quantiles(times[key])[1] for key in without) if without else math.nan
    else:
        key = f"{name.removesuffix('_native')} without"
        plain = quantiles(times[key])[1] if key in times else math.nan
    peak, beyond = peak_memory(workload.call(name), tensors)
    _, beyond_plain = peak_memory(workload.call(name), tensors, with_sink=False)
    return Row(
        case=workload.name,
        backend=name,
        kernel=kernel,
        **cases.milliseconds(times[name]),
        tflops=workload.flops / median / 1e9,
        peak_mib=peak,
        beyond_mib=beyond,
        sink_mib=beyond - beyond_plain,
        ms_without_sink=plain,
        ratio=plain / median,
        errors=found,
    )


def table(rows: list[Row]) -> str:
    """Aligned columns with units in the header."""
    head = [
        "case",
        "backend",
        "ms",
        "p20",
        "p80",
        "TFLOP/s",
        "peak MiB",
        "beyond MiB",
        "for the sink",
    ]
    lines = [[*head, "ms without sink", "ratio", "max error", "kernel"]]
    for row in rows:
        figures = [f"{x:.3f}" for x in (row.ms, row.ms_p20, row.ms_p80)]
        figures += [f"{x:.0f}" for x in (row.tflops, row.peak_mib, row.beyond_mib, row.sink_mib)]
        figures += [f"{row.ms_without_sink:.3f}", f"{row.ratio:.3f}"]
        worst = f"{max(row.errors.values()):.1e}" if row.errors else "-"
        lines.append([row.case, row.backend, *figures, worst, row.kernel])
    return "\n" + aligned(lines, left=(0, 1, 12))


def packed_cost(rows: list[Row]) -> None:
    """Time per query-key pair of packed documents relative to a dense batch of their mean length."""
    by_key = {(row.case, row.backend): row for row in rows}
    flops = {workload.name: workload.flops for workload in CASES}
    for row in rows:
        dense = by_key.get(("causal-1k-batch-32", row.backend))
        if row.case != "packed-32k" or dense is None or row.backend == "auto":
            continue
        implied = dense.ms * flops[row.case] / flops[dense.case]
        print(
            f"packed-32k {row.backend}: {row.ms:.3f} ms; its pairs cost {implied:.3f} ms in "
            f"{dense.case}; {row.ms / implied:.2f} of that"
        )


def against_aten(rows: list[Row]) -> None:
    """Speedup of each backend over PyTorch's FlashAttention 2."""
    aten = {row.case: row for row in rows if row.backend == "aten_fa2"}
    for row in rows:
        base = aten.get(row.case)
        if base is None or row.backend == "aten_fa2":
            continue
        print(
            f"{row.case} {row.backend}: {base.ms / row.ms:.2f} x aten_fa2 with a sink, "
            f"{base.ms_without_sink / row.ms:.2f} x aten_fa2 without"
        )


def write_table(rows: list[Row], workloads: list[Workload]) -> None:
    """Write the measured order by kind of mask; boundaries are geometric means of lengths."""
    kinds = {}
    for workload in workloads:
        rows_here = [row for row in rows if row.case == workload.name]
        ranked = [row for row in rows_here if row.backend not in ("auto", "flex", "math")]
        if len(ranked) > 1 and workload.batch == 1:
            ranked.sort(key=lambda row: row.ms)
            kinds.setdefault(workload.kind, {})[workload.seqlen] = [r.backend for r in ranked]
    entries = {}
    for kind, by_length in kinds.items():
        lengths = sorted(by_length)
        starts = [0] + [int(math.sqrt(a * b)) for a, b in zip(lengths, lengths[1:])]
        entries[kind] = [
            {"min_seqlen": start, "order": by_length[length]}
            for start, length in zip(starts, lengths)
        ]
    card = measured_order.card_family(torch.cuda.get_device_capability())
    measured_order.write(card, entries, {**cases.machine(), "date": time.strftime("%Y-%m-%d")})
    print(f"{measured_order.PATH}: {card} {', '.join(entries)}")


if __name__ == "__main__":
    main()
