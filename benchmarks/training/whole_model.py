# Copyright (c) 2026, the megatron-core gptoss authors.

"""All layers and parameters of gpt-oss-20b, trained by pretrain_gpt_oss.py.

    python -m benchmarks.training.whole_model --data data/text --tokenizer models/gpt-oss-20b \\
        --work-dir runs/whole --json benchmarks/results/whole_model_h200x4.json
    python -m benchmarks.training.whole_model ... --cases 32k two-gpus --steps 10
    python -m benchmarks.training.whole_model ... --show --gpus 8         commands and plans, no run
    python -m benchmarks.training.whole_model ... --smoke                 tiny preset, on the CPU

Random weights, bf16, gradients and optimizer state in fp32, the state sharded over the ranks.
Sequences contain several documents and attention crosses their boundaries. Routing is balanced by
force, as in others' published figures. In `-routed` and `two-gpus` the untrained routers choose, and
soon all select the same few experts, unlike trained routers. --data is a dataset of `gptoss
tokenize`. Each case is a separate torchrun on all GPUs of this machine; `two-gpus` uses two, with a
part of the optimizer in CPU memory:

- 4k: experts over all GPUs, two sequences per micro-batch;
- 32k: in addition four GPUs per sequence, the reference case;
- 128k, 256k, 384k: all GPUs per sequence, every layer recomputed; the last two exceed the context of
  the published model, with a larger YaRN factor;
- two-gpus: 32k on two GPUs.

If the plan of a case exceeds the cards, a micro-batch has one sequence, then --memory is leaner: on
eight cards of 80 GB 4k has one sequence, and 32k uses `experts`.

A step has 32,768 tokens per GPU, or one sequence. The figures come from metrics.jsonl of the run:
the median of the steps after the first, or the first fifth, the highest peak of all ranks and steps,
loss and gradient norm of every step. `load` is the load imbalance, the routed tokens of the most
loaded GPU over the mean, averaged over layers, in the steps of the monitor. Planned are the seconds
of `--dry-run` with that load, and its GiB with an even load and with that load.
"""

import argparse
import json
import multiprocessing
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.lib import report
from megatron.gpt_oss.arguments.recompute import POLICIES
from megatron.gpt_oss.planner.layout import Layout
from megatron.gpt_oss.planner.memory import GB, RESERVE, peak_rank_memory
from megatron.gpt_oss.planner.time import step_time
from megatron.gpt_oss.presets import get_preset
from megatron.gpt_oss.text_table import aligned

GIB = 2**30
TOKENS_A_GPU = 32_768
MONITOR_INTERVAL = 10
# A run that --timeout stops has a row if it made as many.
FEWEST_STEPS = 4


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        length: tokens a sequence, for a model of 20b.
        memory: word of --memory.
        sequences: of a micro-batch.
        context_parallel: GPUs to a sequence at most; None: all.
        gpus: that are used; None: all.
        steps: by default.
        balanced: every expert has as many tokens as the others, at random.
        flags: more of them.
    """

    name: str
    length: int
    memory: str
    sequences: int = 1
    context_parallel: int | None = 1
    gpus: int | None = None
    steps: int = 50
    balanced: bool = True
    flags: tuple[str, ...] = ()


CASES = [
    Case("4k", 4096, "fast", sequences=2),
    Case("32k", 32_768, "fast", context_parallel=4),
    Case("128k", 131_072, "lean", context_parallel=None),
    Case(
        "256k",
        262_144,
        "lean",
        context_parallel=None,
        steps=3,
        flags=("--yarn-factor", "64"),
    ),
    Case(
        "384k",
        393_216,
        "lean",
        context_parallel=None,
        steps=3,
        flags=("--yarn-factor", "96"),
    ),
    Case("4k-routed", 4096, "fast", sequences=2, balanced=False),
    Case("32k-routed", 32_768, "fast", context_parallel=4, balanced=False),
    Case(
        "two-gpus",
        32_768,
        "lean",
        context_parallel=2,
        gpus=2,
        steps=20,
        balanced=False,
        flags=(
            "--optimizer-cpu-offload",
            "--use-precision-aware-optimizer",
            "--optimizer-offload-fraction",
            "0.6",
            "--overlap-cpu-optimizer-d2h-h2d",
        ),
    ),
]


@dataclass
class Row:
    """One row of the table: the median step, and GiB of the peak-memory GPU."""

    case: str
    gpus: int
    length: int
    tokens_a_step: int
    layout: str
    steps: int
    seconds_a_step: float
    planned_seconds: float
    tokens_per_second: float
    tflops: float
    mfu: float | None
    peak_gib: float
    planned_gib: float
    planned_gib_with_load: float
    load: float | None
    first_loss: float
    last_loss: float
    losses: list[float]
    gradient_norms: list[float]  # before clipping; empty in results of before they were kept
    wall_seconds: float | None
    command: str


def main() -> None:
    """Run the selected cases; a failure does not stop the others."""
    args = parse_arguments()
    facts = report.machine("torch", "triton")
    if torch.cuda.is_available():
        facts["gpu"] = f"{args.gpus} x {torch.cuda.get_device_name()}"
    rows, left_out = [], []
    for case in args.chosen:
        flags, layout = fitted(case, args)
        print(f"{case.name}: {command_of(flags, layout.gpus)}", flush=True)
        print(f"planned {planned_gib(layout):.1f} GiB", flush=True)
        if args.show:
            continue
        try:
            row = run(case, flags, layout, args)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            left_out.append([case.name, str(error)])
            print(f"{case.name}: {error}", flush=True)
        else:
            rows.append(row)
            print(table([row]), flush=True)
        if args.json:  # after every case, in case the run is interrupted
            report.write_rows(args.json, facts, ["python"], rows, left_out)
    if rows:
        print(table(rows))
    if left_out:
        sys.exit(1)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line; unknown cases are rejected."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    by_name = {case.name: case for case in CASES}
    parser.add_argument("--data", required=True, metavar="PREFIX", help="of gptoss tokenize")
    parser.add_argument("--tokenizer", required=True, metavar="FOLDER")
    parser.add_argument(
        "--work-dir", "--folder", type=Path, required=True, help="for the runs; new ones each"
    )
    parser.add_argument("--cases", nargs="+", metavar="NAME", default=list(by_name))
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count() or None)
    parser.add_argument(
        "--gpu-memory",
        type=float,
        default=card_memory(),
        metavar="GB",
        help="of 10^9 bytes, all that a card has; where there is none, any plan is run",
    )
    parser.add_argument("--preset", default="20b")
    parser.add_argument("--steps", type=int, help="instead of the cases' own")
    parser.add_argument("--lr", default="3e-4", help="after five steps of warm-up")
    parser.add_argument(
        "--timeout",
        type=float,
        default=1800.0,
        metavar="S",
        help="of a case, which keeps its steps",
    )
    parser.add_argument("--show", action="store_true", help="commands and plans, and no run")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--smoke", action="store_true", help="tiny preset, two ranks, two steps")
    parser.add_argument("flags", nargs="*", help="for pretrain_gpt_oss.py, after --")
    args = parser.parse_args()
    if args.smoke:
        args.preset, args.gpus, args.steps = "tiny", 2, 2
    if not args.gpus:
        parser.error("there is no CUDA device. Give --gpus N.")
    report.check_names(parser, args.cases, by_name)
    args.chosen = [by_name[name] for name in args.cases]
    return args


def card_memory() -> float | None:
    """GB of a GPU of this machine."""
    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(0).total_memory / GB


def fitted(case: Case, args: argparse.Namespace) -> tuple[list[str], Layout]:
    """Flags and layout of a case; reduced until the plan fits the GPUs."""
    words = list(POLICIES)
    leaner = words[words.index(case.memory) :]
    options = [case, *(replace(case, sequences=1, memory=word) for word in leaner)]
    for option in dict.fromkeys(options):  # the first may be there twice
        flags = flags_of(option, args)
        layout = layout_from_flags(flags, gpus_of(option, args))
        needed = peak_rank_memory(layout).total + RESERVE
        if args.gpu_memory is None or needed <= args.gpu_memory * GB:
            break
    return flags, layout


def gpus_of(case: Case, args: argparse.Namespace) -> int:
    """Number of GPUs of a case."""
    return min(case.gpus or args.gpus, args.gpus)


def flags_of(case: Case, args: argparse.Namespace) -> list[str]:
    """Flags of pretrain_gpt_oss.py without --run-dir."""
    preset, gpus = get_preset(args.preset), gpus_of(case, args)
    # A small preset has the layouts at lengths of its own.
    length = case.length * preset.seq_length // get_preset("20b").seq_length
    context_parallel = min(case.context_parallel or gpus, gpus)
    micro_batch = case.sequences * gpus // context_parallel
    wanted = TOKENS_A_GPU * length // case.length * gpus
    sequences = max(1, wanted // (length * micro_batch)) * micro_batch
    steps = args.steps or case.steps
    words = f"""
        --preset {args.preset} --seq-length {length} --micro-batch-size {case.sequences}
        --global-batch-size {sequences} --expert-model-parallel-size {gpus}
        --context-parallel-size {context_parallel} --use-distributed-optimizer
        --memory {case.memory} --train-iters {steps} --lr {args.lr} --lr-decay-style constant
        --lr-warmup-iters {min(5, steps - 1)} --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0
        --data-path {args.data} --split 100,0,0 --tokenizer-model {args.tokenizer}
        --eval-iters 0 --monitor-interval {min(MONITOR_INTERVAL, steps)}
        """.split()
    if case.balanced:
        words.append("--moe-router-force-load-balancing")
    # 290 GB of checkpoint would be written at the end.
    return [*words, "--no-checkpoints", "--bf16", *case.flags, *args.flags]


def command_of(flags: list[str], gpus: int) -> str:
    """The torchrun command of a case."""
    return f"torchrun --nproc-per-node {gpus} pretrain_gpt_oss.py {shlex.join(flags)}"


def layout_from_flags(flags: list[str], gpus: int) -> Layout:
    """The planner's view of a command line, found in a process of its own: Megatron's arguments
    are the only ones of theirs."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_layout_from_flags, flags, gpus).result()


def _layout_from_flags(flags: list[str], gpus: int) -> Layout:
    warnings.simplefilter("ignore")
    from megatron.gpt_oss.arguments.parse import read
    from megatron.gpt_oss.planner.dry_run import validated

    return Layout.from_args(validated(read(flags), gpus))


def planned_gib(layout: Layout, load: float = 1.0) -> float:
    """Planned GiB of the peak-memory GPU."""
    return peak_rank_memory(replace(layout, expert_load=load)).total / GIB


def run(case: Case, flags: list[str], layout: Layout, args: argparse.Namespace) -> Row:
    """Run the training and read its metrics.

    Raises:
        RuntimeError: it failed; with the end of its output.
        subprocess.TimeoutExpired: it took more than --timeout and made too few steps to tell.
    """
    folder, gpus = args.work_dir / case.name, layout.gpus
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    words += ["--nproc-per-node", str(gpus), "pretrain_gpt_oss.py", *flags]
    environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", **os.environ}
    # AdamW on the CPU has no other threads; the ranks of a machine share its cores.
    environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // gpus))
    begin = time.monotonic()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    output = args.work_dir / f"{case.name}.log"
    metrics = folder / "metrics.jsonl"
    with output.open("w") as log:
        process = subprocess.Popen(
            [*words, "--run-dir", str(folder)],
            cwd=report.ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        try:
            process.wait(args.timeout)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # torchrun ends its ranks
            process.wait()
            if len(records_of(metrics)) < FEWEST_STEPS:
                raise
        else:
            if process.returncode:
                end = output.read_text(errors="replace")[-2000:]
                raise RuntimeError(f"ended with {process.returncode}, see {output.name}:\n{end}")
    return row_of(case, flags, layout, records_of(metrics), time.monotonic() - begin)


def records_of(metrics: Path) -> list[dict]:
    """Records of metrics.jsonl."""
    if not metrics.is_file():
        return []
    return [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]


def row_of(
    case: Case, flags: list[str], layout: Layout, records: list[dict], seconds: float
) -> Row:
    """The figures of a run.

    Args:
        records: of metrics.jsonl.
        seconds: from the start of torchrun to its end.
    """
    steps = [record for record in records if "tokens_per_second" in record]
    looked = [record["experts"]["ep_load_imbalance"] for record in records if "experts" in record]
    watched = {record["step"] for record in records if "experts" in record}
    # The first steps compile and warm up, and a step that is looked at does more than train.
    counted = [s for s in steps[max(1, len(steps) // 5) :] if s["step"] not in watched] or steps[
        -1:
    ]
    step = sorted(counted, key=lambda s: s["seconds_per_step"])[len(counted) // 2]
    load = statistics.fmean(map(statistics.fmean, looked)) if looked else None
    losses = [record["loss"] for record in steps]
    return Row(
        case=case.name,
        gpus=layout.gpus,
        length=layout.seq_length,
        tokens_a_step=layout.seq_length * layout.global_batch_size,
        layout=f"EP {layout.ep}, CP {layout.cp}, DP {layout.dp}, {layout.policy()}",
        steps=len(steps),
        seconds_a_step=step["seconds_per_step"],
        planned_seconds=step_time(replace(layout, expert_load=load or 1.0)).total,
        tokens_per_second=step["tokens_per_second_per_gpu"],
        tflops=step["tflops_per_gpu"],
        mfu=step["mfu"],
        peak_gib=max(s["peak_memory_bytes"] for s in steps) / GIB,
        planned_gib=planned_gib(layout),
        planned_gib_with_load=planned_gib(layout, load or 1.0),
        load=load,
        first_loss=losses[0],
        last_loss=losses[-1],
        losses=losses,
        gradient_norms=[record["grad_norm"] for record in steps],
        wall_seconds=round(seconds, 1),
        command=command_of(flags, layout.gpus),
    )


HEADER = [
    "case",
    "GPUs",
    "tokens",
    "layout",
    "steps",
    "s a step",
    "planned s",
    "tokens/s/GPU",
    "TFLOP/s",
    "MFU",
]
HEADER += ["peak GiB", "planned GiB", "with load", "load", "loss"]


def cells(row: Row) -> list[str]:
    """Cells of a row."""
    return [
        row.case,
        str(row.gpus),
        f"{row.length:,}",
        row.layout,
        str(row.steps),
        f"{row.seconds_a_step:.2f}",
        f"{row.planned_seconds:.2f}",
        f"{row.tokens_per_second:,.0f}",
        f"{row.tflops:.0f}",
        "-" if row.mfu is None else f"{row.mfu:.1%}",
        f"{row.peak_gib:.1f}",
        f"{row.planned_gib:.1f}",
        f"{row.planned_gib_with_load:.1f}",
        "-" if row.load is None else f"{row.load:.2f}",
        f"{row.first_loss:.2f} to {row.last_loss:.2f}",
    ]


def table(rows: list[Row]) -> str:
    """The table as text."""
    return aligned([HEADER, *map(cells, rows)], left=(0, 3))


if __name__ == "__main__":
    main()
