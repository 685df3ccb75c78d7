# Copyright (c) 2026, the megatron-core gptoss authors.

"""What the hashes of a checkpoint's shards cost a save and a load.

    python -m benchmarks.training.checkpoint_hashes --work-dir /data/bench --json benchmarks/results/checkpoint_hashes_cpu.json
    python -m benchmarks.training.checkpoint_hashes --work-dir /tmp/bench --smoke

One process saves and loads a state through Megatron's torch_dist strategy (one writer, fsync), with
hashes and without in turns. Each load is done twice: from the disk, after the files have left the
page cache, as after a restart on another machine; and from the page cache, where hashes weigh most.
Seconds are medians.
"""

import argparse
import os
import shutil
import statistics
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.lib import report
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor, block_hashes


@dataclass
class Row:
    """One row of the table."""

    case: str
    gigabytes: float
    save_s: float
    load_from_disk_s: float
    load_from_page_cache_s: float


@contextmanager
def without_hashes():
    """Context in which xxhash is not available."""
    xxhash, block_hashes.xxhash = block_hashes.xxhash, None
    try:
        yield
    finally:
        block_hashes.xxhash = xxhash


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--work-dir", "--folder", type=Path, required=True, help="on the disk to measure; new"
    )
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of the state")
    parser.add_argument("--turns", type=int, default=5, help="saves and loads of each case")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    parser.add_argument("--smoke", action="store_true", help="a small state, one turn")
    args = parser.parse_args()
    if args.smoke:
        args.gigabytes, args.turns = 0.02, 1
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}
    torch.distributed.init_process_group("gloo")
    args.work_dir.mkdir(parents=True)
    try:
        rows = measure(args)
    finally:
        shutil.rmtree(args.work_dir)
    print(table(rows), flush=True)
    if args.json:
        report.write_rows(args.json, report.machine("torch", "xxhash"), ["python"], rows, [])
    torch.distributed.destroy_process_group()


def measure(args: argparse.Namespace) -> list[Row]:
    """One row per case; the first turn is warm-up."""
    count = max(1, round(args.gigabytes * 1e9 / 4 / 2**22))
    tensors = {f"weight{i}": torch.randn(2**11, 2**11) for i in range(count)}
    seconds = {"without": ([], [], []), "with hashes": ([], [], [])}
    for turn in range(args.turns + 1):
        for case in sorted(seconds, reverse=bool(turn % 2)):
            if case == "without":
                with without_hashes():
                    found = save_and_load(args.work_dir / "state", tensors)
            else:
                found = save_and_load(args.work_dir / "state", tensors)
            if turn or args.turns == 1:
                for times, one in zip(seconds[case], found):
                    times.append(one)
    size = sum(tensor.nbytes for tensor in tensors.values()) / 1e9
    return [
        Row(case, size, *(statistics.median(times) for times in measured))
        for case, measured in seconds.items()
    ]


def save_and_load(directory: Path, tensors: dict[str, torch.Tensor]) -> tuple[float, float, float]:
    """Seconds of a save, of a load from the disk, and of a load from the page cache."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    os.sync()
    begun = time.perf_counter()
    dist_checkpointing.save(sharded(tensors), str(directory))
    saved = time.perf_counter() - begun
    drop_page_cache(directory)
    return saved, load(directory, tensors), load(directory, tensors)


def load(directory: Path, tensors: dict[str, torch.Tensor]) -> float:
    """Seconds to load the checkpoint into new tensors."""
    new = sharded({name: torch.empty_like(tensor) for name, tensor in tensors.items()})
    begun = time.perf_counter()
    found = dist_checkpointing.load(new, str(directory))
    seconds = time.perf_counter() - begun
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    return seconds


def drop_page_cache(directory: Path) -> None:
    """Make the next read of each file in the directory come from the disk."""
    os.sync()
    for path in directory.iterdir():
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def sharded(tensors: dict[str, torch.Tensor]) -> dict[str, ShardedTensor]:
    """Sharded tensors of a model with one rank."""
    return {n: ShardedTensor.from_rank_offsets(n, t, replica_id=0) for n, t in tensors.items()}


def table(rows: list[Row]) -> str:
    """The rows as Markdown."""
    lines = [
        "| | GB | save, s | load from disk, s | load from page cache, s |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        seconds = (row.save_s, row.load_from_disk_s, row.load_from_page_cache_s)
        cells = [row.case, f"{row.gigabytes:.1f}", *(f"{found:.2f}" for found in seconds)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
