# Copyright (c) 2026, the megatron-core gptoss authors.

"""For how long a checkpoint blocks training: written synchronously, and in the background.

    python -m benchmarks.training.checkpoint --work-dir /data/bench --json benchmarks/results/checkpoint_cpu.json
    python -m benchmarks.training.checkpoint --work-dir /tmp/bench --smoke                 (tiny, a minute)

Each case is pretrain_gpt_oss.py in a process of its own on the CPU: random tokens, a mixture of
experts of 90M parameters in fp32, whose weights and Adam's moments are 1.1 GB. The cases alternate.
`blocked` is the time from the start of a save until training continues, plus the time that the
finalisation blocks it later; `write` is the time of the writing thread. `step` is the median of the
steps without a background write, `step during write` that of the steps directly after a save.
`disk` is a plain write and fsync of as many bytes, before each case. The checkpoints of both cases
are compared first, tensor by tensor.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch

from benchmarks.lib import report
from megatron.gpt_oss.text_table import aligned

CASES = {"synchronous": "", "asynchronous": "--async-save"}
MODEL = """
    --preset none --num-layers {layers} --hidden-size {hidden} --num-attention-heads 8 --kv-channels 64
    --group-query-attention --num-query-groups 2 --seq-length {length} --max-position-embeddings {length}
    --position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear
    --untie-embeddings-and-output-weights --num-experts {experts} --moe-router-topk 4
    --ffn-hidden-size {hidden} --moe-ffn-hidden-size {hidden} --moe-router-load-balancing-type none
    --attention-dropout 0 --hidden-dropout 0 --transformer-impl local --no-persist-layer-norm
    --no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-rope-fusion
    --no-bias-dropout-fusion --no-bias-swiglu-fusion --attention-softmax-in-fp32
    --tokenizer-type NullTokenizer --vocab-size {vocab} --make-vocab-size-divisible-by 8
"""
RUN = """
    --micro-batch-size 1 --global-batch-size {batch} --lr 1e-4 --lr-decay-iters 1000 --eval-iters 0
    --split 100,0,0 --num-workers 0 --monitor-interval 0 --save-interval {interval}
    --train-iters {steps} --distributed-timeout-minutes 10 --seed 1
"""
SIZES = dict(layers=3, hidden=512, experts=24, length=256, vocab=32_000, batch=4)
TINY = dict(layers=2, hidden=64, experts=4, length=32, vocab=96, batch=2)


@dataclass
class Row:
    """One row of the table: medians over all saves but the first, and over the steps."""

    case: str
    saves: int
    gigabytes: float
    blocked_s: float
    blocked_max_s: float
    write_s: float
    step_s: float
    step_during_write_s: float
    disk_s: float
    load_before: float


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--work-dir", "--folder", type=Path, required=True, help="on the disk to measure; new"
    )
    parser.add_argument("--interval", type=int, default=4, help="steps from a save to the next")
    parser.add_argument("--saves", type=int, default=4, help="of a run")
    parser.add_argument("--runs", type=int, default=2, help="of each case")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, one run")
    args = parser.parse_args()
    if args.smoke:
        args.saves, args.runs, args.interval = 3, 1, 2
    args.work_dir.mkdir(parents=True)
    try:
        rows = measure(args, TINY if args.smoke else SIZES)
    finally:
        shutil.rmtree(args.work_dir)
    print(table(rows), flush=True)
    if args.json:
        report.write_rows(args.json, report.machine("torch"), ["python"], rows, [])


def measure(args: argparse.Namespace, sizes: dict) -> list[Row]:
    """Run the cases alternately; one row per case."""
    data = write_tokens(args.work_dir / "data", sizes["vocab"])
    found = {name: [] for name in CASES}
    compared = False
    for number in range(args.runs):
        for name in sorted(CASES, reverse=bool(number % 2)):
            found[name].append(train(name, data, args, sizes))
            if all(found.values()) and not compared:
                check(*(args.work_dir / name / "checkpoints" for name in CASES))
                compared = True
        for name in CASES:
            shutil.rmtree(args.work_dir / name)
    return [row(name, runs, args.interval) for name, runs in found.items()]


def write_tokens(prefix: Path, vocabulary: int) -> Path:
    """Write a corpus of random tokens."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    random = numpy.random.default_rng(0)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.int32)
    for _ in range(64):
        tokens = torch.from_numpy(random.integers(vocabulary, size=2000))
        builder.add_document(tokens, [len(tokens)])
    builder.finalize(f"{prefix}.idx")
    return prefix


def train(name: str, data: Path, args: argparse.Namespace, sizes: dict) -> dict:
    """Run a case once; returns its steps and saves, bytes of a checkpoint, time of the disk."""
    run_dir, load = args.work_dir / name, os.getloadavg()[0]
    flags = (MODEL + RUN).format(**sizes, interval=args.interval, steps=args.saves * args.interval)
    command = [sys.executable, str(report.ROOT / "pretrain_gpt_oss.py"), *flags.split()]
    command += [*CASES[name].split(), "--data-path", str(data), "--run-dir", str(run_dir)]
    # What the run before left in the page cache is no work of this one.
    os.sync()
    environ = {**os.environ, "PYTHONPATH": str(report.ROOT)}
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{done.stdout[-1000:]}\n{done.stderr[-3000:]}")
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    first = run_dir / "checkpoints" / f"iter_{args.interval:07d}"
    size = sum(path.stat().st_size for path in first.iterdir())
    return {
        "load": load,
        "bytes": size,
        "disk": plain_write(args.work_dir / "plain", size),
        "steps": {r["step"]: r["seconds_per_step"] for r in records if "loss" in r},
        "saves": {r["step"]: r["checkpoint"] for r in records if "checkpoint" in r},
    }


def plain_write(path: Path, size: int) -> float:
    """Seconds to write and sync so many bytes."""
    block = os.urandom(2**24)
    os.sync()
    start = time.monotonic()
    with open(path, "wb") as file:
        for position in range(0, size, len(block)):
            file.write(block[: size - position])
        file.flush()
        os.fsync(file.fileno())
    seconds = time.monotonic() - start
    path.unlink()
    return seconds


def check(one: Path, other: Path) -> None:
    """Exit if the checkpoints differ."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    for folder in sorted(one.glob("iter_*")):
        states = [{}, {}]
        for state, path in zip(states, (folder, other / folder.name)):
            reader, planner = FileSystemReader(str(path)), _EmptyStateDictLoadPlanner()
            _load_state_dict(state, storage_reader=reader, planner=planner, no_dist=True)
        tensors = [n for n, value in states[0].items() if isinstance(value, torch.Tensor)]
        if not tensors or states[0].keys() != states[1].keys():
            raise SystemExit(f"{folder.name}: the checkpoints do not hold the same entries")
        for entry in tensors:
            if not torch.equal(states[0][entry], states[1][entry]):
                raise SystemExit(f"{folder.name}: {entry} differs")


def row(name: str, runs: list[dict], interval: int) -> Row:
    """The figures of a case; the first save and the first step of a run are warm-up."""
    saves = [run["saves"][step] for run in runs for step in sorted(run["saves"])[1:]]
    quiet, during_write = [], []
    for run in runs:
        for step, seconds in run["steps"].items():
            if step > 1:
                follows = step > interval and step % interval == 1
                (during_write if follows else quiet).append(seconds)
    blocked = [save["blocking_seconds"] for save in saves]
    return Row(
        case=name,
        saves=len(saves),
        gigabytes=runs[0]["bytes"] / 1e9,
        blocked_s=statistics.median(blocked),
        blocked_max_s=max(blocked),
        write_s=statistics.median(save["background_seconds"] for save in saves),
        step_s=statistics.median(quiet),
        step_during_write_s=statistics.median(during_write),
        disk_s=statistics.median(run["disk"] for run in runs),
        load_before=max(run["load"] for run in runs),
    )


HEADER = ["case", "saves", "GB", "blocked, s", "worst, s", "write, s", "step, s"]
HEADER += ["step during write, s", "disk, s", "load"]


def cells(row: Row) -> list[str]:
    """Cells of a row."""
    case, saves, *figures = vars(row).values()
    return [case, str(saves), *(f"{figure:.2f}" for figure in figures)]


def table(rows: list[Row]) -> str:
    """The table as text."""
    return aligned([HEADER, *map(cells, rows)], left=(0,))


if __name__ == "__main__":
    main()
