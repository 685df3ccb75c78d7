# Copyright (c) 2026, the megatron-core gptoss authors.

"""Triton kernels that quantise to e4m3 by powers of two; `quantize` says what each computes."""

import torch
import triton
import triton.language as tl

from megatron.core.float8.quantize import E4M3, SEGMENT
from megatron.core.transformer.moe.grouped_mlp.activation_triton import experts_tiles, find_tile

MAX_BLOCK = 4096


def quantize_rows(x):
    """See `quantize.quantize_rows`."""
    num_rows, width = x.shape
    q = torch.empty_like(x, dtype=E4M3)
    scale = x.new_empty(num_rows, dtype=torch.float32)
    block = min(MAX_BLOCK, triton.next_power_of_2(width))
    _quantize_rows[(num_rows,)](x, q, scale, width, BLOCK=block, num_warps=4)
    return q, scale


def transpose_rows(q, scale, ends, num_columns):
    """See `quantize.transpose_rows`."""
    num_rows, width = q.shape
    num_groups = ends.numel()
    transposed = q.new_empty(width, num_columns)
    segment_scale = segment_max(scale, ends)
    _transpose_rows[(triton.cdiv(width, 128), num_columns // 128)](
        q,
        scale,
        segment_scale,
        transposed,
        ends,
        num_groups,
        width,
        num_columns,
        GROUPS=triton.next_power_of_2(num_groups),
        SEGMENT=SEGMENT,
        ROWS=128,
        COLUMNS=128,
        num_warps=4,
    )
    return transposed, segment_scale


def quantize_matrices(weight):
    """See `quantize.quantize_matrices`."""
    num_groups, height, width = weight.shape
    size = height * width
    parts = min(256, triton.cdiv(size, MAX_BLOCK))
    partial = weight.new_empty(num_groups, parts, dtype=torch.float32)
    _amax[(num_groups, parts)](weight, partial, size, BLOCK=MAX_BLOCK, num_warps=8)
    scale = weight.new_empty(num_groups, dtype=torch.float32)
    q = torch.empty_like(weight, dtype=E4M3)
    transposed = q.new_empty(num_groups, width, height)
    _quantize_matrices[(triton.cdiv(width, 128), triton.cdiv(height, 64), num_groups)](
        weight,
        partial,
        scale,
        q,
        transposed,
        height,
        width,
        parts,
        PARTS=triton.next_power_of_2(parts),
        ROWS=64,
        COLUMNS=128,
        num_warps=4,
    )
    return q, transposed, scale


def segment_max(scale, ends):
    """[t] to [g]: the largest of each segment; 1 for an empty one."""
    largest = scale.new_empty(ends.numel())
    _segment_max[(ends.numel(),)](scale, largest, ends, BLOCK=1024, num_warps=4)
    return largest


@triton.jit
def padded_tile(
    tile, ends, num_groups, GROUPS: tl.constexpr, SEGMENT: tl.constexpr, ROWS: tl.constexpr
):
    """The expert of a tile, the tile's first row and the expert's end; past all tiles no expert.

    Each expert has the tiles of ROWS rows that fill a multiple of SEGMENT rows, so that tile i of
    all experts starts at column i * ROWS of a transposed operand."""
    start, end, segments, segment_end = experts_tiles(ends, num_groups, GROUPS, SEGMENT)
    per_segment: tl.constexpr = SEGMENT // ROWS
    expert, own, first, last = find_tile(
        tile, start, end, segments * per_segment, segment_end * per_segment, GROUPS
    )
    return expert, first + own * ROWS, last


@triton.jit
def abs_bits(x):
    """Bits of |x| in fp32: ordered as the values are, infinity and then NaN above all."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def power_of_two(bits):
    """The smallest power of two s for which x / s <= 448, of the bits of x >= 0; NaN for inf, NaN.

    448 = 1.75 x 2^8: the exponent rises where the fraction is above 0.75.
    """
    exponent = (bits + 0x1FFFFF) & 0x7F800000
    scale = tl.maximum(exponent - (8 << 23), 1 << 23)
    scale = tl.where(bits >= 0x7F800000, 0x7FC00000, scale)
    return scale.to(tl.float32, bitcast=True)


@triton.jit
def reciprocal(scale):
    """1 / scale of a power of two, exact; NaN stays."""
    bits = scale.to(tl.int32, bitcast=True)
    inverse = tl.where(bits >= 0x7F800000, bits, (254 << 23) - bits)
    return inverse.to(tl.float32, bitcast=True)


@triton.jit
def _quantize_rows(x, q, scale, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    x += row * width
    q += row * width
    largest = 0
    for begin in range(0, width, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        value = tl.load(x + column, mask=column < width, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(abs_bits(value), 0))
    factor = power_of_two(largest)
    tl.store(scale + row, factor)
    inverse = reciprocal(factor)
    for begin in range(0, width, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        value = tl.load(x + column, mask=column < width, other=0.0).to(tl.float32)
        tl.store(q + column, (value * inverse).to(tl.float8e4nv), mask=column < width)


@triton.jit
def _segment_max(scale, largest, ends, BLOCK: tl.constexpr):
    expert = tl.program_id(0)
    last = tl.load(ends + expert)
    first = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    found = tl.zeros((BLOCK,), dtype=tl.int32)
    for begin in range(first, last, BLOCK):
        row = begin + tl.arange(0, BLOCK)
        found = tl.maximum(found, abs_bits(tl.load(scale + row, mask=row < last, other=0.0)))
    found = tl.max(found, 0)
    found = tl.where(first == last, 127 << 23, found)
    tl.store(largest + expert, found.to(tl.float32, bitcast=True))


@triton.jit
def _transpose_rows(
    q,
    scale,
    segment_scale,
    transposed,
    ends,
    num_groups,
    width,
    num_columns,
    GROUPS: tl.constexpr,
    SEGMENT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tile = tl.program_id(1)
    expert, first, last = padded_tile(tile, ends, num_groups, GROUPS, SEGMENT, ROWS)
    if expert < num_groups:
        row = first + tl.arange(0, ROWS)
        in_row = row < last
        row = row.to(tl.int64)
        column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        in_column = column < width
        factor = tl.load(scale + row, mask=in_row, other=0.0)
        factor *= reciprocal(tl.load(segment_scale + expert))
        at = q + row[:, None] * width + column[None, :]
        value = tl.load(at, mask=in_row[:, None] & in_column[None, :], other=0.0).to(tl.float32)
        value = (value * factor[:, None]).to(tl.float8e4nv)
        to = column.to(tl.int64) * num_columns
        to = transposed + to[:, None] + (tile * ROWS + tl.arange(0, ROWS))[None, :]
        tl.store(to, value.T, mask=in_column[:, None])


@triton.jit
def _amax(weight, partial, size, BLOCK: tl.constexpr):
    expert = tl.program_id(0).to(tl.int64)
    found = tl.zeros((BLOCK,), dtype=tl.int32)
    for block in range(tl.program_id(1), tl.cdiv(size, BLOCK), tl.num_programs(1)):
        at = block * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(weight + expert * size + at, mask=at < size, other=0.0).to(tl.float32)
        found = tl.maximum(found, abs_bits(value))
    found = tl.max(found, 0).to(tl.float32, bitcast=True)
    tl.store(partial + expert * tl.num_programs(1) + tl.program_id(1), found)


@triton.jit
def _quantize_matrices(
    weight,
    partial,
    scale,
    q,
    transposed,
    height,
    width,
    parts,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    expert = tl.program_id(2).to(tl.int64)
    part = tl.arange(0, PARTS)
    largest = tl.load(partial + expert * parts + part, mask=part < parts, other=0.0)
    factor = power_of_two(tl.max(abs_bits(largest), 0))
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(scale + expert, factor)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (row < height)[:, None] & (column < width)[None, :]
    base = expert * height * width
    at = base + row[:, None] * width + column[None, :]
    value = tl.load(weight + at, mask=mask, other=0.0).to(tl.float32)
    value = (value * reciprocal(factor)).to(tl.float8e4nv)
    tl.store(q + at, value, mask=mask)
    at = base + column[:, None] * height + row[None, :]
    mask = (column < width)[:, None] & (row < height)[None, :]
    tl.store(transposed + at, value.T, mask=mask)
