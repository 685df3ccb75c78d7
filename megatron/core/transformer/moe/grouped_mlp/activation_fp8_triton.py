# Copyright (c) 2026, the megatron-core gptoss authors.

"""Triton kernels of the experts' activation that write e4m3; `activation_fp8` says what."""

import torch
import triton
import triton.language as tl

from megatron.core.float8.quantize_triton import (
    E4M3,
    SEGMENT,
    abs_bits,
    padded_tile,
    power_of_two,
    reciprocal,
    segment_max,
)
from megatron.core.transformer.moe.grouped_mlp.activation_triton import (
    clamp_gate_and_up,
    sigmoid,
    sum_tiles,
)

DOUT_WARPS = 8
FORWARD = dict(ROWS=16, COLUMNS=128, num_warps=2)
BACKWARD = dict(ROWS=32, COLUMNS=128, num_warps=4)


def swiglu_forward(y, bias, ends, constants, out_scale):
    """See `activation_fp8.swiglu_forward`."""
    num_rows, width = y.shape[0], y.shape[1] // 2
    out = y.new_empty(num_rows, width, dtype=E4M3)
    tiles = triton.cdiv(num_rows, FORWARD["ROWS"]) + ends.numel()
    _swiglu_forward[(triton.cdiv(width, FORWARD["COLUMNS"]), tiles)](
        y,
        bias,
        out,
        ends,
        ends.numel(),
        width,
        constants.alpha,
        constants.limit,
        constants.offset,
        1 / out_scale,
        HAS_BIAS=bias is not None,
        ON_DEVICE=y.is_cuda,
        GROUPS=triton.next_power_of_2(ends.numel()),
        **FORWARD,
    )
    return out


def quantize_dout(dout, bias, probs, ends):
    """See `activation_fp8.quantize_dout`."""
    num_rows, width = dout.shape
    q = torch.empty_like(dout, dtype=E4M3)
    scale = dout.new_empty(num_rows, dtype=torch.float32)
    dprobs = torch.empty_like(scale)
    rows = 32
    num_tiles = triton.cdiv(num_rows, rows) + ends.numel()
    dbias = dout.new_empty(num_tiles, width, dtype=torch.float32)
    _quantize_dout[(num_tiles,)](
        dout,
        bias,
        probs,
        q,
        scale,
        dbias,
        dprobs,
        ends,
        ends.numel(),
        width,
        GROUPS=triton.next_power_of_2(ends.numel()),
        ROWS=rows,
        BLOCK=triton.next_power_of_2(width),
        num_warps=DOUT_WARPS,
    )
    return q, scale, sum_tiles(dbias, ends, bias.dtype, rows, rows), dprobs.to(probs.dtype)


def dy_scales(amax, probs, ends, bound):
    """See `activation_fp8.dy_scales`."""
    parts, num_rows = amax.shape
    scale = amax.new_empty(num_rows)
    _dy_scales[(triton.cdiv(num_rows, 256),)](
        amax, probs, scale, num_rows, parts, bound, BLOCK=256, num_warps=4
    )
    return scale, segment_max(scale, ends)


def swiglu_backward(dout, y, bias, probs, scales, out_scale, ends, constants, num_columns):
    """See `activation_fp8.swiglu_backward`."""
    num_rows, width = dout.shape
    row_scale, segment_scale = scales
    dy = y.new_empty(num_rows, 2 * width, dtype=E4M3)
    dy_t = y.new_empty(2 * width, num_columns, dtype=E4M3)
    out_t = y.new_empty(width, num_columns, dtype=E4M3)
    # Columns first: programs that run together share the lines of their rows.
    grid = triton.cdiv(width, BACKWARD["COLUMNS"]), num_columns // SEGMENT
    dprobs = row_scale.new_empty(grid[0], num_rows)
    dbias = None if bias is None else row_scale.new_empty(grid[1], 2 * width)
    _swiglu_backward[grid](
        dout,
        y,
        bias,
        probs,
        row_scale,
        segment_scale,
        out_scale,
        dy,
        dy_t,
        out_t,
        dbias,
        dprobs,
        ends,
        ends.numel(),
        num_rows,
        width,
        num_columns,
        constants.alpha,
        constants.limit,
        constants.offset,
        HAS_BIAS=bias is not None,
        ON_DEVICE=y.is_cuda,
        GROUPS=triton.next_power_of_2(ends.numel()),
        SEGMENT=SEGMENT,
        **BACKWARD,
    )
    if bias is not None:
        dbias = sum_tiles(dbias, ends, bias.dtype, SEGMENT, SEGMENT)
    return dy, dy_t, out_t, dbias, dprobs.sum(0).to(probs.dtype)


@triton.jit
def _swiglu_forward(
    y,
    bias,
    out,
    ends,
    num_groups,
    width,
    alpha,
    limit,
    offset,
    factor,
    HAS_BIAS: tl.constexpr,
    ON_DEVICE: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    expert, first, last = padded_tile(tl.program_id(1), ends, num_groups, GROUPS, ROWS, ROWS)
    if expert < num_groups:
        row = first + tl.arange(0, ROWS)
        column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        in_column = column < width
        mask = (row < last)[:, None] & in_column[None, :]
        row = row.to(tl.int64)
        at = y + row[:, None] * (2 * width) + column[None, :]
        gate = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(at + width, mask=mask, other=0.0).to(tl.float32)
        if HAS_BIAS:
            at = bias + expert.to(tl.int64) * (2 * width) + column
            gate += tl.load(at, mask=in_column, other=0.0).to(tl.float32)[None, :]
            up += tl.load(at + width, mask=in_column, other=0.0).to(tl.float32)[None, :]
        gate, up = clamp_gate_and_up(gate, up, limit, True)
        value = (up + offset) * gate * sigmoid(alpha * gate, ON_DEVICE) * factor
        at = out + row[:, None] * width + column[None, :]
        tl.store(at, value.to(tl.float8e4nv), mask=mask)


@triton.jit
def _quantize_dout(
    dout,
    bias,
    probs,
    q,
    scale,
    dbias,
    dprobs,
    ends,
    num_groups,
    width,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tile = tl.program_id(0)
    expert, first, last = padded_tile(tile, ends, num_groups, GROUPS, ROWS, ROWS)
    if expert < num_groups:
        column = tl.arange(0, BLOCK)
        mask = column < width
        at = bias + expert.to(tl.int64) * width + column
        term = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        count = min(ROWS, last - first)
        begin = first.to(tl.int64)
        for i in range(count):
            row = begin + i
            place = row * width + column
            value = tl.load(dout + place, mask=mask, other=0.0).to(tl.float32)
            factor = power_of_two(tl.max(abs_bits(value), 0))
            tl.store(q + place, (value * reciprocal(factor)).to(tl.float8e4nv), mask=mask)
            tl.store(scale + row, factor)
            tl.store(dprobs + row, tl.sum(value * term, 0))
            total += value * tl.load(probs + row).to(tl.float32)
        tl.store(dbias + tile.to(tl.int64) * width + column, total, mask=mask)


@triton.jit
def _dy_scales(amax, probs, scale, num_rows, parts, bound, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = row < num_rows
    found = tl.zeros((BLOCK,), dtype=tl.int32)
    for part in range(parts):
        value = tl.load(amax + part * num_rows + row, mask=mask, other=0.0)
        found = tl.maximum(found, value.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    prob = tl.abs(tl.load(probs + row, mask=mask, other=0.0).to(tl.float32))
    value = found.to(tl.float32, bitcast=True) * prob * bound
    tl.store(scale + row, power_of_two(value.to(tl.int32, bitcast=True) & 0x7FFFFFFF), mask=mask)


@triton.jit
def _swiglu_backward(
    dout,
    y,
    bias,
    probs,
    row_scale,
    segment_scale,
    out_scale,
    dy,
    dy_t,
    out_t,
    dbias,
    dprobs,
    ends,
    num_groups,
    num_rows,
    width,
    num_columns,
    alpha,
    limit,
    offset,
    HAS_BIAS: tl.constexpr,
    ON_DEVICE: tl.constexpr,
    GROUPS: tl.constexpr,
    SEGMENT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # A program has one column block of a segment's part, and goes down it: sums over rows are kept
    # by element and added up across threads once.
    segment = tl.program_id(1)
    expert, first, last = padded_tile(segment, ends, num_groups, GROUPS, SEGMENT, SEGMENT)
    if expert < num_groups:
        column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        in_column = column < width
        segment_factor = reciprocal(tl.load(segment_scale + expert))
        out_factor = reciprocal(tl.load(out_scale + expert))
        if HAS_BIAS:
            term = bias + expert.to(tl.int64) * (2 * width) + column
            gate_bias = tl.load(term, mask=in_column, other=0.0).to(tl.float32)[None, :]
            up_bias = tl.load(term + width, mask=in_column, other=0.0).to(tl.float32)[None, :]
            dgate_sum = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
            dup_sum = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        transposed = column.to(tl.int64)[:, None] * num_columns
        transposed += segment.to(tl.int64) * SEGMENT + tl.arange(0, ROWS)[None, :]
        for part in range(0, SEGMENT, ROWS):
            row = first + part + tl.arange(0, ROWS)
            in_row = row < last
            mask = in_row[:, None] & in_column[None, :]
            row = row.to(tl.int64)
            prob = tl.load(probs + row, mask=in_row, other=0.0).to(tl.float32)
            row_factor = reciprocal(tl.load(row_scale + row, mask=in_row, other=1.0))
            place = row[:, None] * (2 * width) + column[None, :]
            gate = tl.load(y + place, mask=mask, other=0.0).to(tl.float32)
            up = tl.load(y + place + width, mask=mask, other=0.0).to(tl.float32)
            place_out = row[:, None] * width + column[None, :]
            d = tl.load(dout + place_out, mask=mask, other=0.0).to(tl.float32)
            if HAS_BIAS:
                gate += gate_bias
                up += up_bias
            clamped_gate, clamped_up = clamp_gate_and_up(gate, up, limit, True)
            sig = sigmoid(alpha * clamped_gate, ON_DEVICE)
            silu = clamped_gate * sig
            out = (clamped_up + offset) * silu
            place_prob = tl.program_id(0).to(tl.int64) * num_rows + row
            tl.store(dprobs + place_prob, tl.sum(d * out, 1), mask=in_row)
            d *= prob[:, None]
            dup = tl.where(up == clamped_up, d * silu, 0.0)
            dgate = d * (clamped_up + offset) * (sig + alpha * silu * (1.0 - sig))
            dgate = tl.where(gate == clamped_gate, dgate, 0.0)
            if HAS_BIAS:
                # Rows past the end are 0: their d is.
                dgate_sum += dgate
                dup_sum += dup
            tl.store(dy + place, (dgate * row_factor[:, None]).to(tl.float8e4nv), mask=mask)
            tl.store(dy + place + width, (dup * row_factor[:, None]).to(tl.float8e4nv), mask=mask)
            out = (out * (prob * out_factor)[:, None]).to(tl.float8e4nv)
            dgate = (dgate * segment_factor).to(tl.float8e4nv)
            dup = (dup * segment_factor).to(tl.float8e4nv)
            token = transposed + part
            tl.store(out_t + token, out.T, mask=in_column[:, None])
            tl.store(dy_t + token, dgate.T, mask=in_column[:, None])
            token += width.to(tl.int64) * num_columns
            tl.store(dy_t + token, dup.T, mask=in_column[:, None])
        if HAS_BIAS:
            sums = dbias + segment.to(tl.int64) * (2 * width) + column
            tl.store(sums, tl.sum(dgate_sum, 0), mask=in_column)
            tl.store(sums + width, tl.sum(dup_sum, 0), mask=in_column)
