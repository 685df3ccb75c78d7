# Copyright (c) 2026, the megatron-core gptoss authors.

"""What the hashes of a checkpoint's shards cost a save and a load.

    python benchmarks/checkpoint_hashes.py --folder /data/bench --json benchmarks/results/checkpoint_hashes_cpu.json
    python benchmarks/checkpoint_hashes.py --folder /tmp/bench --smoke

One process saves and loads a state through Megatron's torch_dist strategy (one writer, fsync), with
hashes and without in turns. Seconds are medians; the load reads what was written, from the page
cache, where hashes weigh most.
"""

import argparse
import os
import shutil
import statistics
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import report
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor, block_hashes


@dataclass
class Row:
    """One line of the table."""

    case: str
    gigabytes: float
    save_s: float
    load_s: float


@contextmanager
def without_hashes():
    """As where xxhash is not installed."""
    xxhash, block_hashes.xxhash = block_hashes.xxhash, None
    try:
        yield
    finally:
        block_hashes.xxhash = xxhash


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="on the disk to measure; new")
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of the state")
    parser.add_argument("--turns", type=int, default=5, help="saves and loads of each case")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    parser.add_argument("--smoke", action="store_true", help="a small state, one turn")
    args = parser.parse_args()
    if args.smoke:
        args.gigabytes, args.turns = 0.02, 1
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}
    torch.distributed.init_process_group("gloo")
    args.folder.mkdir(parents=True)
    try:
        rows = measure(args)
    finally:
        shutil.rmtree(args.folder)
    print(table(rows), flush=True)
    if args.json:
        report.write_rows(args.json, report.machine("torch", "xxhash"), ["python"], rows, [])
    torch.distributed.destroy_process_group()


def measure(args: argparse.Namespace) -> list[Row]:
    """A row for each case; the first turn does not count."""
    count = max(1, round(args.gigabytes * 1e9 / 4 / 2**22))
    tensors = {f"weight{i}": torch.randn(2**11, 2**11) for i in range(count)}
    seconds = {"without": ([], []), "with hashes": ([], [])}
    for turn in range(args.turns + 1):
        for case in sorted(seconds, reverse=bool(turn % 2)):
            if case == "without":
                with without_hashes():
                    found = save_and_load(args.folder / "state", tensors)
            else:
                found = save_and_load(args.folder / "state", tensors)
            if turn or args.turns == 1:
                for times, one in zip(seconds[case], found):
                    times.append(one)
    size = sum(tensor.nbytes for tensor in tensors.values()) / 1e9
    return [
        Row(case, size, statistics.median(saves), statistics.median(loads))
        for case, (saves, loads) in seconds.items()
    ]


def save_and_load(folder: Path, tensors: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Seconds of a save and of the load of what it wrote."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    os.sync()
    begun = time.perf_counter()
    dist_checkpointing.save(sharded(tensors), str(folder))
    saved = time.perf_counter()
    found = dist_checkpointing.load(
        sharded({name: torch.empty_like(tensor) for name, tensor in tensors.items()}), str(folder)
    )
    loaded = time.perf_counter()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    return saved - begun, loaded - saved


def sharded(tensors: dict[str, torch.Tensor]) -> dict[str, ShardedTensor]:
    """As a model of one rank gives them."""
    return {n: ShardedTensor.from_rank_offsets(n, t, replica_id=0) for n, t in tensors.items()}


def table(rows: list[Row]) -> str:
    """The rows as Markdown."""
    lines = ["| | GB | save, s | load, s |", "|---|---|---|---|"]
    lines += [f"| {r.case} | {r.gigabytes:.1f} | {r.save_s:.2f} | {r.load_s:.2f} |" for r in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
