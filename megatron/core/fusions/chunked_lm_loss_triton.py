# Copyright (c) 2026, the megatron-core gptoss authors.

"""Triton kernels of the cross entropy of a chunk: one reads the logits, one overwrites them.

The gradient overwrites the logits in their dtype, so a chunk needs no other tensor of this size: 6
bytes of traffic per logit in bf16. All arithmetic is in fp32; addresses are int64.
"""

import torch
import triton
import triton.language as tl

BLOCK = 4096


def row_statistics(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Statistics of each row for its loss, over this rank's part of the vocabulary.

    Args:
        logits: [n, v], contiguous; bf16, fp16 or fp32.
        labels: [n] int64, columns; a column outside of [0, v) belongs to another rank.
    Returns:
        [n] fp32 each: the maximum, the sum of exp(logit - maximum), the logit of the label (0 if
        another rank has it).
    """
    rows, width = logits.shape
    maximum, total, target = (logits.new_empty(rows, dtype=torch.float32) for _ in range(3))
    _row_statistics[(rows,)](
        logits, labels, maximum, total, target, width, BLOCK=BLOCK, num_warps=8
    )
    return maximum, total, target


def to_gradient_(
    logits: torch.Tensor,
    labels: torch.Tensor,
    lse: torch.Tensor,
    scale: torch.Tensor,
    weights: torch.Tensor,
) -> None:
    """Overwrite logits with scale * exp(logits - lse), minus weights at the label; rounded once.

    Args:
        logits, labels: as in `row_statistics`.
        lse, scale, weights: [n] fp32.
    """
    rows, width = logits.shape
    grid = (rows, triton.cdiv(width, BLOCK))
    _to_gradient[grid](logits, labels, lse, scale, weights, width, BLOCK=BLOCK, num_warps=8)


@triton.jit
def _row_statistics(logits, labels, maximum, total, target, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * width
    offset = tl.arange(0, BLOCK)
    highest = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, width, BLOCK):
        column = first + offset
        value = tl.load(start + column, mask=column < width, other=float("-inf")).to(tl.float32)
        # Comparisons are false for NaN: it reaches the sum, and so the loss.
        higher = tl.where(value > highest, value, highest)
        # Where nothing but -inf has come yet, both exponents would be -inf - -inf.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        sums = sums * tl.exp(highest - base) + tl.exp(value - base)
        highest = higher
    most = tl.max(highest, 0)
    base = tl.where(most == float("-inf"), 0.0, most)
    tl.store(maximum + row, most)
    tl.store(total + row, tl.sum(sums * tl.exp(highest - base), 0))
    label = tl.load(labels + row)
    here = (label >= 0) & (label < width)
    value = tl.load(start + tl.where(here, label, 0)).to(tl.float32)
    tl.store(target + row, tl.where(here, value, 0.0))


@triton.jit
def _to_gradient(logits, labels, lse, scale, weights, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = logits + row * width + column
    value = tl.load(at, mask=column < width, other=0.0).to(tl.float32)
    value = tl.load(scale + row) * tl.exp(value - tl.load(lse + row))
    value -= tl.where(column == tl.load(labels + row), tl.load(weights + row), 0.0)
    tl.store(at, value, mask=column < width)
