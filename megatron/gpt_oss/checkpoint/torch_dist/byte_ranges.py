# Copyright (c) 2026, the megatron-core gptoss authors.

"""Parts of a tensor in a file: which are one run of bytes, and how one is read.

A box is a pair (first, stop) for every dimension.
"""

import math
import os
from pathlib import Path
from typing import Sequence

import torch

from megatron.gpt_oss.errors import CheckpointError

Box = Sequence[tuple[int, int]]

# What follows a run is mostly the next to be read. Two of the largest pieces: the disk works while
# they are computed on.
_ASK_AHEAD = 64 * 2**20
_ASK_AHEAD_FROM = 2**20
# Linux reads and writes at most 2 GiB a call.
LARGEST_CALL = 2**30


def is_one_run(box: Box, shape: Sequence[int]) -> bool:
    """Whether the box is one run of bytes: single entries, then a range, then whole dimensions."""
    rest = [i for i, (start, stop) in enumerate(box) if stop - start != 1]
    first = rest[0] if rest else len(box)
    return all(tuple(box[i]) == (0, shape[i]) for i in range(first + 1, len(box)))


def run_offset(box: Box, shape: Sequence[int]) -> int:
    """Elements of a contiguous tensor before the first of the box."""
    return sum(start * math.prod(shape[i + 1 :]) for i, (start, _) in enumerate(box))


def read_run(fd: int, path: Path, offset: int, out: torch.Tensor) -> None:
    """Fill a contiguous tensor from a place in a file; several threads may share the descriptor.

    Raises:
        CheckpointError: the file ends before.
    """
    if not out.numel():
        return
    memory = memoryview(out.view(-1).view(torch.uint8).numpy())
    ask = len(memory) >= _ASK_AHEAD_FROM and hasattr(os, "posix_fadvise")
    while memory:
        count = os.preadv(fd, [memory[:LARGEST_CALL]], offset)
        if not count:
            raise CheckpointError(
                f"{path} ends at byte {offset}, {len(memory)} bytes before the end of a tensor: it was "
                "truncated during the read."
            )
        memory, offset = memory[count:], offset + count
    if ask:
        os.posix_fadvise(fd, offset, _ASK_AHEAD, os.POSIX_FADV_WILLNEED)
