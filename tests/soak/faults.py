# Copyright (c) 2026, the megatron-core gptoss authors.

"""Faults of long runs, each as a function of a running `Attempt`."""

import os
import random
import shutil
import signal
import time
from pathlib import Path

from tests.soak.attempt import Attempt

# A fault ends the run, or the run continues.
ENDS, GOES_ON = True, False


def rank_killed(attempt: Attempt, draw: random.Random) -> bool:
    """SIGKILL of one rank, as by the OOM killer."""
    attempt.signal(draw.choice(attempt.ranks()), signal.SIGKILL)
    return ENDS


def launcher_killed(attempt: Attempt, draw: random.Random) -> bool:
    """SIGKILL of torchrun."""
    attempt.signal(attempt.launcher, signal.SIGKILL)
    return ENDS


def all_killed(attempt: Attempt, draw: random.Random) -> bool:
    """SIGKILL of all processes, as in a power failure."""
    for pid in [*attempt.ranks(), attempt.launcher]:
        attempt.signal(pid, signal.SIGKILL)
    return ENDS


def terminated(attempt: Attempt, draw: random.Random) -> bool:
    """SIGTERM of torchrun, as a scheduler does: the ranks save first."""
    attempt.signal(attempt.launcher, signal.SIGTERM)
    return ENDS


def warned(attempt: Attempt, draw: random.Random) -> bool:
    """SIGUSR1 of torchrun, as Slurm does before a time limit."""
    attempt.signal(attempt.launcher, signal.SIGUSR1)
    return ENDS


def stopped(attempt: Attempt, draw: random.Random) -> bool:
    """SIGSTOP of one rank for some time, as on a swapping machine."""
    pid = draw.choice(attempt.ranks())
    attempt.signal(pid, signal.SIGSTOP)
    time.sleep(attempt.stop_seconds)
    attempt.signal(pid, signal.SIGCONT)
    return GOES_ON


def disk_full(attempt: Attempt, draw: random.Random) -> bool:
    """Fill the disk until the run has ended."""
    attempt.disk.fill(attempt.ranks())
    return ENDS


def bit_flipped(attempt: Attempt, draw: random.Random) -> bool:
    """Flip one bit in a shard of the newest checkpoint, while nothing runs."""
    rank_killed(attempt, draw)
    attempt.wait_until_gone()
    shards = sorted(attempt.newest_checkpoint().glob("*.distcp"))
    path = draw.choice([shard for shard in shards if shard.stat().st_size])
    with open(path, "r+b") as file:
        place = draw.randrange(path.stat().st_size)
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1 << draw.randrange(8)]))
    return ENDS


def checkpoint_deleted(attempt: Attempt, draw: random.Random) -> bool:
    """Delete the newest checkpoint, while nothing runs; the tracker file stays."""
    rank_killed(attempt, draw)
    attempt.wait_until_gone()
    shutil.rmtree(attempt.newest_checkpoint())
    return ENDS


def file_cut(attempt: Attempt, draw: random.Random) -> bool:
    """Truncate metrics.jsonl, run.json, the tracker file or a shard."""
    launcher_killed(attempt, draw)
    attempt.wait_until_gone()
    folder = attempt.run_dir
    files = [folder / "metrics.jsonl", folder / "run.json"]
    files.append(folder / "checkpoints" / "latest_checkpointed_iteration.txt")
    files += sorted(attempt.newest_checkpoint().glob("*.distcp"))
    path = Path(draw.choice([file for file in files if file.exists()]))
    os.truncate(path, draw.randrange(path.stat().st_size + 1))
    return ENDS


FAULTS = (
    rank_killed,
    launcher_killed,
    all_killed,
    terminated,
    warned,
    stopped,
    disk_full,
    bit_flipped,
    checkpoint_deleted,
    file_cut,
)
# Those that take a checkpoint away: the one before it is what the run resumes from.
COST_A_CHECKPOINT = (bit_flipped, checkpoint_deleted, file_cut)
# Those that may also come before the first step.
AT_ANY_TIME = (rank_killed, launcher_killed, all_killed)
