# Copyright (c) 2026, the megatron-core gptoss authors.

"""Triton kernels of the grouped GEMM on Hopper: forward and dgrad, and wgrad.

Each is one persistent launch for all experts, with one program per multiprocessor, over tiles of
128 x 256 of the output. The loop over tiles and the one inside a tile are one pipeline, which loads
for a tile while it stores the previous one. The segments of the experts are read on the device.

Tiles end with their expert: rows of the next expert in the same tile are not stored, or are zeroed
before they are summed, NaN included. Operands are loaded by TMA, which has 64-bit addresses and
reads 0 past the end of a tensor.

Where these do not run, PyTorch's grouped_mm does the same (`dispatch.GEMM`). docs/performance.md
compares them.
"""

import torch
import triton
import triton.language as tl
from packaging.version import Version

from megatron.core.transformer.moe.grouped_mlp.activation_triton import experts_tiles, find_tile

if Version(triton.__version__) < Version("3.6"):
    # 3.5 keeps 64 bytes a thread of the gradient's tile in memory, 3.4 keeps 560.
    raise ImportError(f"Triton {triton.__version__} is too old for these kernels. Install 3.6.")

from triton.tools.tensor_descriptor import TensorDescriptor

# 242 registers a thread at most and 180 to 213 KB of shared memory for sm90 (Triton 3.6 and 3.7),
# no spill: one program on a multiprocessor.
TILE_ROWS, TILE_COLUMNS, DEPTH = 128, 256, 64
# ABOVE: tiles above each other that are taken before the next column's. 8 tiles of rows and the
# columns of a matrix that 132 multiprocessors then read are a few MB of the 50 MB cache.
TILING = dict(ROWS=TILE_ROWS, COLUMNS=TILE_COLUMNS, DEPTH=DEPTH, ABOVE=8, num_warps=8, num_stages=3)


def grouped_gemm(x, weight, ends, bias=None, scale=None):
    """y[row] = x[row] @ weight[e] + scale[row] * bias[e], e the row's expert, rounded once.

    Args:
        x: [t, k], bf16, contiguous, t > 0.
        weight: [g, k, n], bf16, contiguous or the transposed view of such a tensor.
        ends: [g], int32, where each expert's rows end; the last is t.
        bias: [g, n], any float, contiguous, or None.
        scale: [t], any float, contiguous, or None without a bias.
    Returns:
        [t, n], bf16.
    """
    num_groups, depth, width = weight.shape
    y = x.new_empty(x.shape[0], width)
    transposed = weight.stride(2) != 1
    block = [1, DEPTH, TILE_COLUMNS]
    if transposed:
        weight, block = weight.transpose(1, 2), [1, TILE_COLUMNS, DEPTH]
    programs = multiprocessors(x)
    _grouped_gemm[(programs,)](
        TensorDescriptor.from_tensor(x, [TILE_ROWS, DEPTH]),
        TensorDescriptor.from_tensor(weight, block),
        y,
        bias,
        scale,
        ends,
        num_groups,
        width,
        depth,
        programs,
        HAS_BIAS=bias is not None,
        TRANSPOSED=transposed,
        GROUPS=triton.next_power_of_2(num_groups),
        **TILING,
    )
    return y


def grouped_wgrad(x, dy, ends):
    """x^T dy over each expert's rows, 0 where it has none.

    Args:
        x, dy: [t, k] and [t, n], bf16, contiguous, t > 0.
        ends: [g], int32, where each expert's rows end; the last is t.
    Returns:
        [g, k, n], bf16.
    """
    num_groups, height, width = ends.numel(), x.shape[1], dy.shape[1]
    dweight = x.new_empty(num_groups, height, width)
    programs = multiprocessors(x)
    _grouped_wgrad[(programs,)](
        TensorDescriptor.from_tensor(x, [DEPTH, TILE_ROWS]),
        TensorDescriptor.from_tensor(dy, [DEPTH, TILE_COLUMNS]),
        TensorDescriptor.from_tensor(dweight, [1, TILE_ROWS, TILE_COLUMNS]),
        ends,
        num_groups,
        width,
        height,
        programs,
        **TILING,
    )
    return dweight


def multiprocessors(tensor) -> int:
    if not tensor.is_cuda:
        return 2  # programs of Triton's interpreter
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count


@triton.jit
def place_tile(tile, num_rows, num_columns, ABOVE: tl.constexpr):
    """Row and column of a tile, of num_rows x num_columns of them."""
    in_band = ABOVE * num_columns
    band = tile // in_band
    height = min(num_rows - band * ABOVE, ABOVE)
    return band * ABOVE + tile % in_band % height, tile % in_band // height


@triton.jit
def _grouped_gemm(
    x,
    weight,
    y,
    bias,
    scale,
    ends,
    num_groups,
    width,
    depth,
    programs,
    HAS_BIAS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
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
            if TRANSPOSED:
                right = weight.load([expert, begin, step * DEPTH]).reshape(COLUMNS, DEPTH).T
            else:
                right = weight.load([expert, step * DEPTH, begin]).reshape(DEPTH, COLUMNS)
            total = tl.dot(left, right, total)
        row = first + tl.arange(0, ROWS)
        column = begin + tl.arange(0, COLUMNS)
        in_row, in_column = row < last, column < width
        row = row.to(tl.int64)
        if HAS_BIAS:
            factor = tl.load(scale + row, mask=in_row, other=0.0).to(tl.float32)
            at = bias + expert.to(tl.int64) * width + column
            term = tl.load(at, mask=in_column, other=0.0).to(tl.float32)
            total += factor[:, None] * term[None, :]
        at = y + row[:, None] * width + column[None, :]
        tl.store(at, total.to(y.dtype.element_ty), mask=in_row[:, None] & in_column[None, :])


@triton.jit
def _grouped_wgrad(
    x,
    dy,
    dweight,
    ends,
    num_groups,
    width,
    height,
    programs,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    ABOVE: tl.constexpr,
):
    num_rows, num_columns = tl.cdiv(height, ROWS), tl.cdiv(width, COLUMNS)
    tiles = num_rows * num_columns
    for tile in tl.range(tl.program_id(0), num_groups * tiles, programs, flatten=True):
        expert = tile // tiles
        above, beside = place_tile(tile % tiles, num_rows, num_columns, ABOVE)
        above *= ROWS
        beside *= COLUMNS
        last = tl.load(ends + expert)
        first = tl.load(ends + expert - 1, mask=expert > 0, other=0)
        total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        num_steps = (last - first) // DEPTH
        for step in range(num_steps):
            row = first + step * DEPTH
            total = tl.dot(x.load([row, above]).T, dy.load([row, beside]), total)
        row = first + num_steps * DEPTH
        if row < last:
            mine = (row + tl.arange(0, DEPTH) < last)[:, None]
            left = x.load([row, above])
            right = dy.load([row, beside])
            left = tl.where(mine, left, 0.0).to(left.dtype)
            right = tl.where(mine, right, 0.0).to(right.dtype)
            total = tl.dot(left.T, right, total)
        total = total.to(dweight.dtype).reshape(1, ROWS, COLUMNS)
        dweight.store([expert, above, beside], total)
