# Copyright (c) 2026, the megatron-core gptoss authors.

"""Triton kernels on the routed tokens of all experts: bias, clamped SwiGLU, router weight, dbias.

Tokens are split into tiles of one expert each. The number of tiles of an expert is known only on
the device: the grid has the maximum, a program finds its tile from the ends of the segments, and
programs without a tile return. A tile loads the bias of its expert once and writes one partial sum
of dbias; a second kernel adds the partial sums of an expert in a fixed order.

Addresses are int64: 524,288 rows of 5,760 columns pass 2^31.
"""

import torch
import triton
import triton.language as tl

# Rows and columns of a block. The partial sums of the tiles are 6% of the memory of the rows.
BLOCK_ROWS, BLOCK_COLUMNS = 32, 64
BIAS_BLOCK_ROWS = 64  # of weighted_bias_gradients
# A program processes several blocks of columns of its tile; with few tiles the blocks are split
# over more programs, to occupy 132 multiprocessors.
MIN_PROGRAMS = 4096


def swiglu_forward(y, bias, probs, ends, constants):
    """See `activation.weighted_bias_swiglu`; `ends` is `ExpertSegments.ends`."""
    num_rows, width = y.shape[0], y.shape[1] // 2
    out = y.new_empty(num_rows, width)
    # It has no sums: wider blocks are a tenth faster on an H100.
    tiling = _Tiling(num_rows, width, ends, columns=2 * BLOCK_COLUMNS, num_warps=4)
    _swiglu_forward[tiling.grid](
        y,
        bias,
        probs.contiguous(),
        out,
        ends,
        ends.numel(),
        width,
        constants.alpha,
        constants.limit or 0.0,
        constants.offset,
        HAS_BIAS=bias is not None,
        HAS_LIMIT=constants.limit is not None,
        ON_DEVICE=y.is_cuda,
        **tiling.sizes,
    )
    return out


def swiglu_backward(dout, y, bias, probs, ends, constants):
    """Gradients of y, bias (None without one) and probs, in their dtypes."""
    num_rows, width = dout.shape
    tiling = _Tiling(num_rows, width, ends)
    dy = torch.empty_like(y)
    dbias, dprobs = tiling.partial_sums(dout, None if bias is None else 2 * width)
    _swiglu_backward[tiling.grid](
        dout,
        y,
        bias,
        probs.contiguous(),
        dy,
        dbias,
        dprobs,
        ends,
        ends.numel(),
        num_rows,
        width,
        constants.alpha,
        constants.limit or 0.0,
        constants.offset,
        HAS_BIAS=bias is not None,
        HAS_LIMIT=constants.limit is not None,
        ON_DEVICE=y.is_cuda,
        **tiling.sizes,
    )
    if bias is not None:
        dbias = tiling.sum_tiles(dbias, bias.dtype)
    return dy, dbias, dprobs.sum(0).to(probs.dtype)


def add_weighted_bias_(y, bias, scale, ends):
    """y[row] += scale[row] * bias[expert of row]; [t, n], [g, n], [t]."""
    tiling = _Tiling(*y.shape, ends)
    _add_weighted_bias[tiling.grid](
        y,
        bias.contiguous(),
        scale.contiguous(),
        ends,
        ends.numel(),
        y.shape[1],
        **tiling.sizes,
    )


def weighted_bias_gradients(dy, bias, scale, ends):
    """Gradients of bias and scale of `add_weighted_bias_`, in their dtypes."""
    # It only reads and uses few registers: 0.34 ms instead of 0.59 for 131,072 rows on an H100.
    tiling = _Tiling(
        *dy.shape, ends, rows=BIAS_BLOCK_ROWS, num_warps=4, min_programs=4 * MIN_PROGRAMS
    )
    dbias, dscale = tiling.partial_sums(dy, dy.shape[1])
    _weighted_bias_gradients[tiling.grid](
        dy,
        bias.contiguous(),
        scale.contiguous(),
        dbias,
        dscale,
        ends,
        ends.numel(),
        *dy.shape,
        **tiling.sizes,
    )
    return tiling.sum_tiles(dbias, bias.dtype), dscale.sum(0).to(scale.dtype)


def zero_where_empty_(dweight, ends):
    """Zero dweight[e], [g, k, n] contiguous, of each expert e without a token."""
    size = dweight[0].numel()
    _zero_where_empty[(ends.numel(), min(64, triton.cdiv(size, 4096)))](
        dweight, ends, size, BLOCK=4096
    )


class _Tiling:
    """Split of rows and columns over the programs of a launch."""

    def __init__(
        self, num_rows, width, ends, rows=BLOCK_ROWS, columns=None, num_warps=2, min_programs=None
    ):
        # Sums over rows take few warps: in the backward of the activation on an H100, four warps
        # for 32 rows are a tenth slower than two, and eight a third.
        self.ends, self.num_rows = ends, num_rows
        columns = columns or BLOCK_COLUMNS
        self.num_tiles = triton.cdiv(num_rows, rows) + ends.numel()  # at most
        blocks = triton.cdiv(width, columns)
        programs = triton.cdiv(min_programs or MIN_PROGRAMS, self.num_tiles)
        self.grid = (self.num_tiles, min(blocks, programs))
        self.sizes = dict(
            GROUPS=triton.next_power_of_2(ends.numel()),
            ROWS=rows,
            COLUMNS=columns,
            num_warps=num_warps,
        )

    def partial_sums(self, like, width):
        """Buffers in fp32: sums over rows of each tile (None without width), over columns."""
        of_tiles = width and like.new_empty(self.num_tiles, width, dtype=torch.float32)
        return of_tiles, like.new_empty(self.grid[1], self.num_rows, dtype=torch.float32)

    def sum_tiles(self, partial, dtype):
        """[tiles, n] to [g, n]: the sum over each expert's tiles."""
        return sum_tiles(partial, self.ends, dtype, self.sizes["ROWS"], self.sizes["ROWS"])


def sum_tiles(partial, ends, dtype, ROWS, SEGMENT):
    """[tiles, n] in fp32 to [g, n]: the sum over each expert's tiles, in their order.

    An expert has one tile for each ROWS rows, padded to a multiple of SEGMENT rows.
    """
    num_groups, width = ends.numel(), partial.shape[1]
    sums = partial.new_empty(num_groups, width, dtype=dtype)
    _sum_tiles[(num_groups, triton.cdiv(width, BLOCK_COLUMNS))](
        partial,
        sums,
        ends,
        num_groups,
        width,
        GROUPS=triton.next_power_of_2(num_groups),
        SEGMENT=SEGMENT,
        TILES_PER_SEGMENT=SEGMENT // ROWS,
        TILES=32,
        COLUMNS=BLOCK_COLUMNS,
    )
    return sums


@triton.jit
def experts_tiles(ends, num_groups, GROUPS: tl.constexpr, ROWS: tl.constexpr):
    """For every expert: first row, row after the last, number of tiles, tile after the last."""
    group = tl.arange(0, GROUPS)
    exists = group < num_groups
    end = tl.load(ends + group, mask=exists, other=0)
    start = tl.load(ends + group - 1, mask=exists & (group > 0), other=0)
    tiles = tl.where(exists, (end - start + ROWS - 1) // ROWS, 0)
    return start, end, tiles, tl.cumsum(tiles, 0)


@triton.jit
def find_tile(tile, start, end, tiles, tile_end, GROUPS: tl.constexpr):
    """The expert of a tile, the index among its tiles, its first row and the row after its last.

    Past all tiles the expert is one past the last, and the other values are undefined."""
    expert = tl.sum((tile_end <= tile).to(tl.int32), 0)
    mine = tl.arange(0, GROUPS) == expert
    first = tl.sum(tl.where(mine, start, 0), 0)
    last = tl.sum(tl.where(mine, end, 0), 0)
    return expert, tile - tl.sum(tl.where(mine, tile_end - tiles, 0), 0), first, last


@triton.jit
def _tile(tile, ends, num_groups, GROUPS: tl.constexpr, ROWS: tl.constexpr):
    """The expert of a tile, its rows (int64), and which of them exist; past all tiles no expert."""
    start, end, tiles, tile_end = experts_tiles(ends, num_groups, GROUPS, ROWS)
    expert, tile, first, last = find_tile(tile, start, end, tiles, tile_end, GROUPS)
    row = first + tile * ROWS + tl.arange(0, ROWS)
    return expert, row.to(tl.int64), row < last


@triton.jit
def clamp_gate_and_up(gate, up, limit, HAS_LIMIT: tl.constexpr):
    """Both clamped; NaN stays."""
    if HAS_LIMIT:
        gate = tl.minimum(gate, limit, propagate_nan=tl.PropagateNan.ALL)
        up = tl.minimum(up, limit, propagate_nan=tl.PropagateNan.ALL)
        up = tl.maximum(up, -limit, propagate_nan=tl.PropagateNan.ALL)
    return gate, up


@triton.jit
def sigmoid(x, ON_DEVICE: tl.constexpr):
    """1 / (1 + exp(-x)). The kernels are bound by instructions, and tl.sigmoid takes 15 of them for
    subnormal results; these are 5, exact to 2 ulp elsewhere."""
    if ON_DEVICE:
        power = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * -1.4426950408889634], tl.float32, True, 1
        )
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + power], tl.float32, True, 1
        )
    return tl.sigmoid(x)


@triton.jit
def _swiglu_forward(
    y,
    bias,
    probs,
    out,
    ends,
    num_groups,
    width,
    alpha,
    limit,
    offset,
    HAS_BIAS: tl.constexpr,
    HAS_LIMIT: tl.constexpr,
    ON_DEVICE: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    expert, row, in_row = _tile(tl.program_id(0), ends, num_groups, GROUPS, ROWS)
    if expert < num_groups:
        prob = tl.load(probs + row, mask=in_row, other=0.0).to(tl.float32)
        for block in range(tl.program_id(1), tl.cdiv(width, COLUMNS), tl.num_programs(1)):
            column = block * COLUMNS + tl.arange(0, COLUMNS)
            in_column = column < width
            mask = in_row[:, None] & in_column[None, :]
            at = y + row[:, None] * (2 * width) + column[None, :]
            gate = tl.load(at, mask=mask, other=0.0).to(tl.float32)
            up = tl.load(at + width, mask=mask, other=0.0).to(tl.float32)
            if HAS_BIAS:
                at = bias + expert.to(tl.int64) * (2 * width) + column
                gate += tl.load(at, mask=in_column, other=0.0).to(tl.float32)[None, :]
                up += tl.load(at + width, mask=in_column, other=0.0).to(tl.float32)[None, :]
            gate, up = clamp_gate_and_up(gate, up, limit, HAS_LIMIT)
            value = (up + offset) * gate * sigmoid(alpha * gate, ON_DEVICE) * prob[:, None]
            tl.store(out + row[:, None] * width + column[None, :], value, mask=mask)


@triton.jit
def _swiglu_backward(
    dout,
    y,
    bias,
    probs,
    dy,
    dbias,
    dprobs,
    ends,
    num_groups,
    num_rows,
    width,
    alpha,
    limit,
    offset,
    HAS_BIAS: tl.constexpr,
    HAS_LIMIT: tl.constexpr,
    ON_DEVICE: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tile = tl.program_id(0)
    expert, row, in_row = _tile(tile, ends, num_groups, GROUPS, ROWS)
    if expert < num_groups:
        prob = tl.load(probs + row, mask=in_row, other=0.0).to(tl.float32)
        dprob = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)  # summed over threads once, at the end
        for block in range(tl.program_id(1), tl.cdiv(width, COLUMNS), tl.num_programs(1)):
            column = block * COLUMNS + tl.arange(0, COLUMNS)
            in_column = column < width
            mask = in_row[:, None] & in_column[None, :]
            place = row[:, None] * (2 * width) + column[None, :]
            gate = tl.load(y + place, mask=mask, other=0.0).to(tl.float32)
            up = tl.load(y + place + width, mask=mask, other=0.0).to(tl.float32)
            at = dout + row[:, None] * width + column[None, :]
            d = tl.load(at, mask=mask, other=0.0).to(tl.float32)
            if HAS_BIAS:
                at = bias + expert.to(tl.int64) * (2 * width) + column
                gate += tl.load(at, mask=in_column, other=0.0).to(tl.float32)[None, :]
                up += tl.load(at + width, mask=in_column, other=0.0).to(tl.float32)[None, :]
            clamped_gate, clamped_up = clamp_gate_and_up(gate, up, limit, HAS_LIMIT)
            sig = sigmoid(alpha * clamped_gate, ON_DEVICE)
            silu = clamped_gate * sig
            dprob += d * (clamped_up + offset) * silu
            d = d * prob[:, None]
            dup = d * silu
            dgate = d * (clamped_up + offset) * (sig + alpha * silu * (1.0 - sig))
            if HAS_LIMIT:
                dgate = tl.where(gate == clamped_gate, dgate, 0.0)
                dup = tl.where(up == clamped_up, dup, 0.0)
            tl.store(dy + place, dgate, mask=mask)
            tl.store(dy + place + width, dup, mask=mask)
            if HAS_BIAS:
                # Rows past the end are 0 here: their d is.
                at = dbias + tile.to(tl.int64) * (2 * width) + column
                tl.store(at, tl.sum(dgate, 0), mask=in_column)
                tl.store(at + width, tl.sum(dup, 0), mask=in_column)
        at = dprobs + tl.program_id(1).to(tl.int64) * num_rows + row
        tl.store(at, tl.sum(dprob, 1), mask=in_row)


@triton.jit
def _add_weighted_bias(
    y,
    bias,
    scale,
    ends,
    num_groups,
    width,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    expert, row, in_row = _tile(tl.program_id(0), ends, num_groups, GROUPS, ROWS)
    if expert < num_groups:
        factor = tl.load(scale + row, mask=in_row, other=0.0).to(tl.float32)
        for block in range(tl.program_id(1), tl.cdiv(width, COLUMNS), tl.num_programs(1)):
            column = block * COLUMNS + tl.arange(0, COLUMNS)
            in_column = column < width
            mask = in_row[:, None] & in_column[None, :]
            at = bias + expert.to(tl.int64) * width + column
            term = tl.load(at, mask=in_column, other=0.0).to(tl.float32)
            at = y + row[:, None] * width + column[None, :]
            value = tl.load(at, mask=mask, other=0.0).to(tl.float32)
            tl.store(at, value + factor[:, None] * term[None, :], mask=mask)


@triton.jit
def _weighted_bias_gradients(
    dy,
    bias,
    scale,
    dbias,
    dscale,
    ends,
    num_groups,
    num_rows,
    width,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tile = tl.program_id(0)
    expert, row, in_row = _tile(tile, ends, num_groups, GROUPS, ROWS)
    if expert < num_groups:
        factor = tl.load(scale + row, mask=in_row, other=0.0).to(tl.float32)
        dfactor = tl.zeros((ROWS,), dtype=tl.float32)
        for block in range(tl.program_id(1), tl.cdiv(width, COLUMNS), tl.num_programs(1)):
            column = block * COLUMNS + tl.arange(0, COLUMNS)
            in_column = column < width
            mask = in_row[:, None] & in_column[None, :]
            at = dy + row[:, None] * width + column[None, :]
            d = tl.load(at, mask=mask, other=0.0).to(tl.float32)
            at = bias + expert.to(tl.int64) * width + column
            term = tl.load(at, mask=in_column, other=0.0).to(tl.float32)
            dfactor += tl.sum(d * term[None, :], 1)
            at = dbias + tile.to(tl.int64) * width + column
            tl.store(at, tl.sum(d * factor[:, None], 0), mask=in_column)
        at = dscale + tl.program_id(1).to(tl.int64) * num_rows + row
        tl.store(at, dfactor, mask=in_row)


@triton.jit
def _sum_tiles(
    partial,
    sums,
    ends,
    num_groups,
    width,
    GROUPS: tl.constexpr,
    SEGMENT: tl.constexpr,
    TILES_PER_SEGMENT: tl.constexpr,
    TILES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    expert = tl.program_id(0)
    _, _, tiles, tile_end = experts_tiles(ends, num_groups, GROUPS, SEGMENT)
    mine = tl.arange(0, GROUPS) == expert
    last = tl.sum(tl.where(mine, tile_end, 0), 0) * TILES_PER_SEGMENT
    first = last - tl.sum(tl.where(mine, tiles, 0), 0) * TILES_PER_SEGMENT
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    in_column = column < width
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    for begin in range(first, last, TILES):
        tile = begin + tl.arange(0, TILES)
        mask = (tile < last)[:, None] & in_column[None, :]
        at = partial + tile.to(tl.int64)[:, None] * width + column[None, :]
        total += tl.sum(tl.load(at, mask=mask, other=0.0), 0)
    tl.store(sums + expert.to(tl.int64) * width + column, total, mask=in_column)


@triton.jit
def _zero_where_empty(dweight, ends, size, BLOCK: tl.constexpr):
    expert = tl.program_id(0)
    end = tl.load(ends + expert)
    start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    if start == end:
        base = dweight + expert.to(tl.int64) * size
        for block in range(tl.program_id(1), tl.cdiv(size, BLOCK), tl.num_programs(1)):
            at = block * BLOCK + tl.arange(0, BLOCK)
            tl.store(base + at, tl.zeros((BLOCK,), dweight.dtype.element_ty), mask=at < size)
