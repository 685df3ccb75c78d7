# Copyright (c) 2026, the megatron-core gptoss authors.

"""Read contiguous parts of a tensor from a file.

A box is a pair (start, stop) for each dimension.
"""

import math
import os
from pathlib import Path
from typing import Sequence

import torch

from megatron.gpt_oss.errors import CheckpointError

Box = Sequence[tuple[int, int]]

# Read-ahead hint: the following bytes are usually read next. The size is twice the largest read.
_ASK_AHEAD = 64 * 2**20
_ASK_AHEAD_FROM = 2**20
# Linux reads and writes at most 2 GiB per call.
LARGEST_CALL = 2**30


def is_contiguous(box: Box, shape: Sequence[int]) -> bool:
    """Whether a box of a contiguous tensor is contiguous.

    It is if its dimensions are single entries, then one range, then full dimensions.
    """
    rest = [i for i, (start, stop) in enumerate(box) if stop - start != 1]
    first = rest[0] if rest else len(box)
    return all(tuple(box[i]) == (0, shape[i]) for i in range(first + 1, len(box)))


def element_offset(box: Box, shape: Sequence[int]) -> int:
    """Index of the first element of a box in a contiguous tensor."""
    return sum(start * math.prod(shape[i + 1 :]) for i, (start, _) in enumerate(box))


def read_bytes(fd: int, path: Path, offset: int, out: torch.Tensor) -> None:
    """Fill a contiguous tensor from a byte offset of a file; threads may share the descriptor.

    Raises:
        CheckpointError: the file is too short.
    """
    if not out.numel():
        return
    memory = memoryview(out.view(-1).view(torch.uint8).numpy())
    ask = len(memory) >= _ASK_AHEAD_FROM and hasattr(os, "posix_fadvise")
    while memory:
        count = os.preadv(fd, [memory[:LARGEST_CALL]], offset)
        if not count:
            raise CheckpointError(
                f"{path} ends at byte {offset}, {len(memory)} bytes before the end of a tensor: it "
                "was truncated during the read."
            )
        memory, offset = memory[count:], offset + count
    if ask:
        os.posix_fadvise(fd, offset, _ASK_AHEAD, os.POSIX_FADV_WILLNEED)
