# Copyright (c) 2026, the megatron-core gptoss authors.

"""Attention over a context parallel group: every exchange, against one GPU of the same run.

    torchrun --nproc-per-node 2 -m benchmarks.kernels.context_parallel --json benchmarks/results/cp.json
    torchrun --nproc-per-node 2 -m benchmarks.kernels.context_parallel --cases full-32k --schemes p2p a2a
    torchrun --nproc-per-node 2 -m benchmarks.kernels.context_parallel --cases tiny tiny-packed tiny-window
    python -m benchmarks.kernels.context_parallel --plan docs/context_parallel.md

One layer with the heads of gpt-oss, bf16, forward and backward, backend "auto". The values are
checked first, on a short sequence of the same kind, against plain PyTorch in float64. Then one GPU
with the whole sequence and every exchange are timed in turn, on fresh random data, by CUDA events;
ranks start a round together, the slowest rank's time counts, and a row shows the median of the
rounds with its 20 % and 80 % quantiles. `efficiency` is one GPU's time over ranks x time; one GPU's
is that of the fastest rank. MiB received are those of one rank, the most of any, in forward and
backward; for a halo they are compared with the arithmetic, byte for byte.

--write-table makes the order measured here that of "auto" on this kind of card.
--plan needs no GPU: it computes the table of docs/context_parallel.md from measured rates.
"""

import argparse
import math
import os
import time
from dataclasses import dataclass, replace

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # as Megatron demands it of a run

import torch

from benchmarks.kernels.attention import documents, names
from benchmarks.lib import cases, ranks, report, timing
from benchmarks.lib.ranks import from_first, over_ranks, slowest
from megatron.core import device_utils
from megatron.core.transformer.sink_attention import measured_order
from megatron.core.transformer.sink_attention.attention_params import AttentionParams
from megatron.core.transformer.sink_attention.context_parallel import (
    choose,
    count_traffic,
    halo_bytes,
    local_tokens,
)
from megatron.gpt_oss.diagnostics.attention_timing import (
    Workload,
    device,
    quantiles,
    refill,
    run_once,
)
from megatron.gpt_oss.text_table import aligned

K = 1024
# In the order of their worth: the time limit cuts from the end.
CASES = [
    Workload("full-32k", 32 * K),
    Workload("full-64k", 64 * K),
    Workload("full-128k", 128 * K),
    Workload("window-128k", 128 * K, window_size=(127, 0)),
    Workload("packed-64k", 64 * K, documents=documents(64 * K, 32)),
    Workload("packed-window-128k", 128 * K, documents=documents(128 * K, 32), window_size=(127, 0)),
]
SMALL = dict(heads=8, groups=2, dim=16)
TINY = [
    Workload("tiny", 96, **SMALL),
    Workload("tiny-window", 96, window_size=(7, 0), **SMALL),
    Workload("tiny-packed", 96, documents=(1, 40, 55), **SMALL),
]
FLAT = ("all_gather", "p2p", "a2a")
ERROR_LIMIT = 1e-2
MIB = 2**20


@dataclass(kw_only=True)
class Row(cases.Row):
    """One row of the table."""

    scheme: str
    taken: str
    ranks: int
    one_gpu_ms: float
    efficiency: float
    tflops_a_rank: float
    received_mib: float
    halo_mib: float | None
    bytes_as_computed: bool | None
    peak_mib: float
    error: float


def main() -> None:
    """Run the selected cases, print and write the results."""
    args = parse_arguments()
    if args.plan is not None:
        from benchmarks.kernels.context_parallel_plan import write_plan

        return write_plan(args.plan)
    start_group()
    facts = {**cases.machine(), "ranks": ranks.count()}
    launcher = ["torchrun", f"--nproc-per-node {ranks.count()}"]
    rows = cases.run(args, facts, run_case, table, launcher)
    if args.write_table and ranks.is_first():
        write_table(rows, facts)
    torch.distributed.destroy_process_group()


def parse_arguments() -> argparse.Namespace:
    """Parse the command line; unknown names are rejected."""
    parser = cases.make_parser(__doc__, names(CASES), seconds=6.0, limit=120)
    parser.add_argument("--schemes", nargs="+", metavar="NAME", help="of auto, " + ", ".join(FLAT))
    parser.add_argument("--backend", default="auto", help="of sink_attention")
    parser.add_argument("--write-table", action="store_true", help="make this the order of auto")
    parser.add_argument("--plan", metavar="PATH", help="write the plan into this file, '-' prints")
    args = parser.parse_args()
    args.chosen = cases.choose(parser, args, CASES, TINY)
    report.check_names(parser, args.schemes or (), ("auto", *FLAT), "--schemes")
    if args.write_table and device() == "cpu":
        parser.error("--write-table: there is no GPU to measure")
    if args.plan is None and "RANK" not in os.environ:
        parser.error("start it under torchrun, at least two ranks: torchrun --nproc-per-node 2 ...")
    return args


def start_group() -> None:
    """Start NCCL with one GPU per rank, or gloo."""
    if device() == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if device() == "cuda" else "gloo")


def run_case(workload: Workload, args: argparse.Namespace, left_out: list) -> list[Row]:
    """Check values of one case, measure time and bytes received."""
    group = torch.distributed.group.WORLD
    size = group.size()
    wanted = args.schemes or ("auto", *FLAT)
    if workload.window_size is not None:  # always a halo
        wanted = ("auto",)
    errors = {scheme: check(workload, scheme, args.backend, group) for scheme in wanted}
    whole = workload.tensors()
    local = replace(workload, seqlen=workload.seqlen // size).tensors()
    calls = {"one": (call(workload, None, "auto", args.backend), whole)}
    for scheme in wanted:
        calls[scheme] = (call(workload, group, scheme, args.backend), local)
    times = time_in_turn(calls, args.seconds)
    alone = min(over_ranks(quantiles(times.pop("one"))[1]))
    rows = []
    for scheme, rounds in times.items():
        # Wrong values get no figure.
        samples = slowest(rounds) if errors[scheme] < ERROR_LIMIT else [math.nan]
        median = quantiles(samples)[1]
        forward, total, peak = one_pass(*calls[scheme], group)
        taken = choose.choose_scheme(*local[:2], params_of(workload, *local[:2]), group, scheme)[0]
        computed = matches = None
        if taken == "halo" and workload.window_size is not None:
            token = 2 * workload.batch * workload.groups * workload.dim * local[1].element_size()
            computed = halo_bytes(
                group.rank(), size, workload.seqlen, workload.window_size[0], token
            )
            matches = all(over_ranks(float(computed == forward["all_to_all"])))
        rows.append(
            Row(
                case=workload.name,
                scheme=scheme,
                taken=taken,
                ranks=size,
                **cases.milliseconds(samples),
                one_gpu_ms=alone,
                efficiency=alone / size / median,
                tflops_a_rank=workload.flops / size / median / 1e9,
                received_mib=max(over_ranks(sum(total.values()) / MIB)),
                halo_mib=None if computed is None else max(over_ranks(computed / MIB)),
                bytes_as_computed=matches,
                peak_mib=max(over_ranks(peak)),
                error=errors[scheme],
            )
        )
    return rows


def params_of(workload: Workload, query: torch.Tensor, key: torch.Tensor) -> AttentionParams:
    """The call on this rank's tokens, with the lengths of the complete sequence."""
    longest = max(workload.documents or (workload.seqlen,))
    lengths = dict(max_seqlen_q=longest, max_seqlen_k=longest)
    params = AttentionParams.of(query, key, window_size=workload.window_size, **lengths)
    return replace(params, packed=workload.documents is not None)


def call(workload: Workload, group, scheme: str, backend: str):
    """sink_attention with the workload's options as a function of q, k, v, sink."""
    return workload.call(backend, cp_group=group, cp_comm_type=scheme)


def check(workload: Workload, scheme: str, backend: str, group) -> float:
    """Largest relative error of out and the gradients on a short sequence of the same kind."""
    short = workload.short()
    tensors = [x.detach() for x in short.tensors()]
    generator = torch.Generator(device=device()).manual_seed(1)
    for x in (*tensors[:3], tensors[4]):
        x.normal_(generator=generator)
    sink = tensors[3]
    leaves = [local_tokens(tensors[i], group) for i in (0, 1, 2, 4)]
    local = (*(x.requires_grad_() for x in leaves[:3]), sink.clone().requires_grad_(), leaves[3])
    values = run_once(call(short, group, scheme, backend), local, True)
    torch.distributed.all_reduce(values[4], group=group)
    exact = tuple(x.double().requires_grad_(i < 4) for i, x in enumerate(tensors))
    expected = run_once(call(short, None, "auto", "math"), exact, True)
    worst = 0.0
    for index, (value, target) in enumerate(zip(values, expected)):
        part = local_tokens(target, group) if index < 4 else target
        worst = max(worst, ((value.double() - part).norm() / target.norm()).item())
    return max(over_ranks(worst))


def time_in_turn(calls: dict, seconds: float) -> dict[str, list[float]]:
    """Milliseconds of this rank: all calls once per round, each started by all ranks together."""
    times = {name: [] for name in calls}
    for function, tensors in calls.values():  # warm: plans, communicators, allocator
        timed(function, tensors)
    spent, rounds = 0.0, 0
    while rounds < 3 or (rounds < 20 and spent < seconds * 1e3):
        for name, (function, tensors) in calls.items():
            times[name].append(timed(function, tensors))
            spent += times[name][-1]
        spent = from_first(spent)
        rounds += 1
    return times


def timed(function, tensors) -> float:
    """Milliseconds of one forward and backward."""
    refill(tensors)
    device_utils.synchronize()
    torch.distributed.barrier()
    if device() == "cuda":
        torch.cuda._sleep(2_000_000)  # the host gets ahead, as it is in training
    begin = timing.mark()
    run_once(function, tensors, True)
    return timing.milliseconds(begin, timing.mark())


def one_pass(function, tensors, group) -> tuple[dict, dict, float]:
    """Bytes received in the forward and in total, and peak MiB above the allocated ones."""
    if device() == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    with count_traffic() as total:
        with count_traffic() as forward:
            out = function(*tensors[:4])
        torch.autograd.grad(out, tensors[:4], tensors[4])
    peak = math.nan
    if device() == "cuda":
        torch.cuda.synchronize()
        peak = (torch.cuda.max_memory_allocated() - before) / MIB
    return forward, total, peak


def table(rows: list[Row]) -> str:
    """Aligned columns with units in the header."""
    head = ["case", "scheme", "taken", "ms", "p20", "p80", "one GPU ms", "efficiency"]
    lines = [[*head, "TFLOP/s a rank", "received MiB", "halo bytes", "peak MiB", "max error"]]
    for row in rows:
        figures = [f"{x:.3f}" for x in (row.ms, row.ms_p20, row.ms_p80, row.one_gpu_ms)]
        figures += [f"{row.efficiency:.3f}", f"{row.tflops_a_rank:.0f}", f"{row.received_mib:.2f}"]
        halo = "-"
        if row.halo_mib is not None:
            halo = f"{row.halo_mib:.3f} MiB {'as' if row.bytes_as_computed else 'NOT AS'} computed"
        wrong = "" if row.error < ERROR_LIMIT else " WRONG"
        tail = [halo, f"{row.peak_mib:.0f}", f"{row.error:.1e}{wrong}"]
        lines.append([row.case, row.scheme, row.taken, *figures, *tail])
    return "\n" + aligned(lines, left=(0, 1, 2))


def write_table(rows: list[Row], facts: dict) -> None:
    """Write the measured order of full cases; boundaries are geometric means of lengths."""
    by_length = {}
    for workload in CASES:
        ranked = [r for r in rows if r.case == workload.name and r.scheme in FLAT]
        if workload.kind == "causal" and len(ranked) == len(FLAT):
            by_length[workload.seqlen] = [r.scheme for r in sorted(ranked, key=lambda r: r.ms)]
    lengths = sorted(by_length)
    starts = [0] + [int(math.sqrt(a * b)) for a, b in zip(lengths, lengths[1:])]
    entries = [
        {"min_seqlen": start, "order": by_length[length]} for start, length in zip(starts, lengths)
    ]
    if not entries:
        return print("--write-table: no full case was measured with all schemes")
    card = measured_order.card_family(torch.cuda.get_device_capability())
    measured_order.write(
        card, {"context_parallel": entries}, {**facts, "date": time.strftime("%Y-%m-%d")}
    )
    print(f"{measured_order.PATH}: {card}")


if __name__ == "__main__":
    main()
