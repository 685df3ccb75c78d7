# Copyright (c) 2026, the megatron-core gptoss authors.

"""Triton kernels of the grouped GEMM with e4m3 operands on Hopper: forward and dgrad, and wgrad.

Built as `grouped_mlp.gemm_triton` is: one persistent launch for all experts, operands by TMA.
Hopper multiplies FP8 only where both operands are contiguous along the summed dimension, so the
operands of wgrad are transposed copies whose segments are padded with zeros (`quantize.transpose_rows`).

The tensor cores add FP8 products with about 10 bits below the largest term: over 4,096 terms of one
sign 7 % are lost, of random signs 0.1 % (measured on an H200). wgrad sums over any number of tokens
and therefore adds to fp32 registers every 256 (0.2 %), for which a tile of 128 x 256 has no room.
The others sum over the hidden size alone, as the fast accumulation of cuBLAS does.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from megatron.core.float8.quantize import SEGMENT
from megatron.core.float8.quantize_triton import abs_bits
from megatron.core.transformer.moe.grouped_mlp.activation_triton import experts_tiles, find_tile
from megatron.core.transformer.moe.grouped_mlp.gemm_triton import multiprocessors, place_tile

GEMM_TILING = dict(ROWS=128, COLUMNS=256, DEPTH=128, ABOVE=8, num_warps=8, num_stages=4)
WGRAD_TILING = dict(ROWS=128, COLUMNS=128, DEPTH=SEGMENT, ABOVE=8, num_warps=8, num_stages=3)


def grouped_gemm(x, row_scale, weight, scale, ends, bias=None, bias_scale=None, row_amax=False):
    """See `gemm.grouped_gemm`."""
    num_groups, width, depth = weight.shape
    y = x.new_empty(x.shape[0], width, dtype=torch.bfloat16)
    amax = None
    if row_amax:
        amax = row_scale.new_empty(triton.cdiv(width, GEMM_TILING["COLUMNS"]), x.shape[0])
    programs = multiprocessors(x)
    _grouped_gemm[(programs,)](
        TensorDescriptor.from_tensor(x, [GEMM_TILING["ROWS"], GEMM_TILING["DEPTH"]]),
        TensorDescriptor.from_tensor(weight, [1, GEMM_TILING["COLUMNS"], GEMM_TILING["DEPTH"]]),
        y,
        row_scale,
        scale,
        bias,
        bias_scale,
        amax,
        ends,
        x.shape[0],
        num_groups,
        width,
        depth,
        programs,
        HAS_BIAS=bias is not None,
        HAS_AMAX=row_amax,
        GROUPS=triton.next_power_of_2(num_groups),
        **GEMM_TILING,
    )
    return (y, amax) if row_amax else y


def grouped_wgrad(x, dy, scale, ends, total=None):
    """See `gemm.grouped_wgrad`."""
    num_groups, height, width = ends.numel(), x.shape[0], dy.shape[0]
    accumulate = total is not None
    if total is None:
        total = x.new_empty(num_groups, height, width, dtype=torch.bfloat16)
    programs = multiprocessors(x)
    _grouped_wgrad[(programs,)](
        TensorDescriptor.from_tensor(x, [WGRAD_TILING["ROWS"], WGRAD_TILING["DEPTH"]]),
        TensorDescriptor.from_tensor(dy, [WGRAD_TILING["COLUMNS"], WGRAD_TILING["DEPTH"]]),
        total,
        scale,
        ends,
        num_groups,
        width,
        height,
        programs,
        ACCUMULATE=accumulate,
        GROUPS=triton.next_power_of_2(num_groups),
        **WGRAD_TILING,
    )
    return total


@triton.jit
def _grouped_gemm(
    x,
    weight,
    y,
    row_scale,
    scale,
    bias,
    bias_scale,
    amax,
    ends,
    num_rows,
    num_groups,
    width,
    depth,
    programs,
    HAS_BIAS: tl.constexpr,
    HAS_AMAX: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    ABOVE: tl.constexpr,
):
    start, end, tiles, _ = experts_tiles(ends, num_groups, GROUPS, ROWS)
    num_columns = tl.cdiv(width, COLUMNS)
    tiles *= num_columns
    tile_end = tl.cumsum(tiles, 0)
    num_steps = tl.cdiv(depth, DEPTH)
    for tile in tl.range(tl.program_id(0), tl.sum(tiles, 0), programs, flatten=True):
        expert, tile_of_expert, first, last = find_tile(tile, start, end, tiles, tile_end, GROUPS)
        above, beside = place_tile(tile_of_expert, tl.cdiv(last - first, ROWS), num_columns, ABOVE)
        first += above * ROWS
        begin = beside * COLUMNS
        total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for step in range(num_steps):
            left = x.load([first, step * DEPTH])
            right = weight.load([expert, begin, step * DEPTH]).reshape(COLUMNS, DEPTH).T
            total = tl.dot(left, right, total)
        row = first + tl.arange(0, ROWS)
        column = begin + tl.arange(0, COLUMNS)
        in_row, in_column = row < last, column < width
        row = row.to(tl.int64)
        factor = tl.load(row_scale + row, mask=in_row, other=0.0) * tl.load(scale + expert)
        total *= factor[:, None]
        if HAS_BIAS:
            factor = tl.load(bias_scale + row, mask=in_row, other=0.0).to(tl.float32)
            at = bias + expert.to(tl.int64) * width + column
            term = tl.load(at, mask=in_column, other=0.0).to(tl.float32)
            total += factor[:, None] * term[None, :]
        value = total.to(y.dtype.element_ty)
        if HAS_AMAX:
            bits = tl.max(abs_bits(value.to(tl.float32)), 1).to(tl.float32, bitcast=True)
            tl.store(amax + beside.to(tl.int64) * num_rows + row, bits, mask=in_row)
        at = y + row[:, None] * width + column[None, :]
        tl.store(at, value, mask=in_row[:, None] & in_column[None, :])


@triton.jit
def _grouped_wgrad(
    x,
    dy,
    dweight,
    scale,
    ends,
    num_groups,
    width,
    height,
    programs,
    ACCUMULATE: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    ABOVE: tl.constexpr,
):
    _, _, segment_tiles, segment_end = experts_tiles(ends, num_groups, GROUPS, DEPTH)
    group = tl.arange(0, GROUPS)
    num_rows, num_columns = tl.cdiv(height, ROWS), tl.cdiv(width, COLUMNS)
    tiles = num_rows * num_columns
    for tile in tl.range(tl.program_id(0), num_groups * tiles, programs, flatten=True):
        expert = tile // tiles
        above, beside = place_tile(tile % tiles, num_rows, num_columns, ABOVE)
        above *= ROWS
        beside *= COLUMNS
        num_steps = tl.sum(tl.where(group == expert, segment_tiles, 0), 0)
        first = tl.sum(tl.where(group == expert, segment_end, 0), 0) - num_steps
        total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for step in range(num_steps):
            token = (first + step) * DEPTH
            # Added in fp32 outside the tensor cores, which keep too few bits of a long sum.
            total += tl.dot(x.load([above, token]), dy.load([beside, token]).T)
        total *= tl.load(scale + expert)
        row = above + tl.arange(0, ROWS)
        column = beside + tl.arange(0, COLUMNS)
        at = (expert.to(tl.int64) * height + row)[:, None] * width + column[None, :]
        mask = (row < height)[:, None] & (column < width)[None, :]
        if ACCUMULATE:
            total += tl.load(dweight + at, mask=mask, other=0.0)
        tl.store(dweight + at, total.to(dweight.dtype.element_ty), mask=mask)
