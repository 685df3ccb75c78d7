# Copyright (c) 2026, the megatron-core gptoss authors.

"""Applying the sinks, their gradient, and merging partial results, as one Triton kernel each.

In plain PyTorch the first two are 5 memory-bound kernels over out and dout in mixed precision
(about 6 % of the attention at 8k on an H100). Here the first reads and writes out once, the second
reads out and dout once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK_T = 32


def apply_sink_(out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Scale out in place, return lse'. Shapes as in rescale.py; out's last dim is dense."""
    out4, lse3 = _batched(out, lse)
    batch, tokens, heads, dim = out4.shape
    merged = torch.empty_like(lse3)
    if out.numel() == 0:
        return merged.view(lse.shape)
    grid = (triton.cdiv(tokens, _BLOCK_T), batch * heads)
    _apply_sink_kernel[grid](
        out4,
        lse3,
        merged,
        sinks,
        tokens,
        heads,
        dim,
        *out4.stride()[:3],
        BLOCK_T=_BLOCK_T,
        BLOCK_D=triton.next_power_of_2(dim),
    )
    return merged.view(lse.shape)


def sink_gradient(out: Tensor, lse: Tensor, dout: Tensor, sinks: Tensor) -> Tensor:
    """dsinks [np]; one reduction adds the sums of the blocks, without atomics."""
    if dout.stride(-1) != 1:
        dout = dout.contiguous()
    out4, lse3 = _batched(out, lse)
    dout4, _ = _batched(dout, lse)
    batch, tokens, heads, dim = out4.shape
    if out.numel() == 0:
        return torch.zeros_like(sinks)
    blocks = triton.cdiv(tokens, _BLOCK_T)
    partial = torch.empty((heads, batch * blocks), dtype=torch.float32, device=out.device)
    _sink_gradient_kernel[(blocks, batch * heads)](
        out4,
        dout4,
        lse3,
        sinks,
        partial,
        tokens,
        heads,
        dim,
        *out4.stride()[:3],
        *dout4.stride()[:3],
        BLOCK_T=_BLOCK_T,
        BLOCK_D=triton.next_power_of_2(dim),
    )
    return partial.sum(1).neg_().to(sinks.dtype)


def merge_partial_(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, sinks: Tensor | None
) -> None:
    """Merge into out_a and lse_a. Shapes as in rescale.py; the last dims of out are dense."""
    if out_a.numel() == 0:
        return
    if out_b.stride(-1) != 1:
        out_b = out_b.contiguous()
    if out_a.dim() == 3:
        out_a, out_b = out_a.unsqueeze(0), out_b.unsqueeze(0)
    lse_b = lse_b.contiguous()
    batch, tokens, heads, dim = out_a.shape
    # Not in place: every warp of a program loads lse_a, and a late one would read what another has
    # stored. On an H100 the outputs were then wrong by a tenth, and differed from run to run.
    merged = torch.empty_like(lse_b)
    _merge_partial_kernel[(triton.cdiv(tokens, _BLOCK_T), batch * heads)](
        out_a,
        lse_a,
        out_b,
        lse_b,
        merged,
        lse_b if sinks is None else sinks,
        tokens,
        heads,
        dim,
        *out_a.stride()[:3],
        *out_b.stride()[:3],
        lse_a.stride(-2),
        HAS_SINK=sinks is not None,
        BLOCK_T=_BLOCK_T,
        BLOCK_D=triton.next_power_of_2(dim),
    )
    lse_a.copy_(merged)


def _batched(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """[t, np, hn] and [np, t] to a batch of one."""
    lse = lse.contiguous()
    return (out, lse) if out.dim() == 4 else (out.unsqueeze(0), lse.unsqueeze(0))


@triton.jit
def _apply_sink_kernel(
    out_ptr,
    lse_ptr,
    merged_ptr,
    sink_ptr,
    tokens,
    heads,
    dim,
    stride_b,
    stride_t,
    stride_h,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    batch_head = tl.program_id(1).to(tl.int64)
    head = batch_head % heads
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = tl.arange(0, BLOCK_D)
    sink = tl.load(sink_ptr + head).to(tl.float32)
    lse = tl.load(lse_ptr + batch_head * tokens + rows, mask=rows < tokens, other=0.0)
    # exp of a number that is never above 0: no overflow for any lse and sink.
    small = tl.exp(-tl.abs(lse - sink))
    tl.store(
        merged_ptr + batch_head * tokens + rows,
        tl.maximum(lse, sink) + tl.log(1.0 + small),
        mask=rows < tokens,
    )
    weight = tl.where(lse >= sink, 1.0, small) / (1.0 + small)
    pointers = (
        out_ptr
        + (batch_head // heads) * stride_b
        + head * stride_h
        + rows[:, None] * stride_t
        + cols[None, :]
    )
    mask = (rows[:, None] < tokens) & (cols[None, :] < dim)
    out = tl.load(pointers, mask=mask, other=0.0)
    tl.store(pointers, (out.to(tl.float32) * weight[:, None]).to(out.dtype), mask=mask)


@triton.jit
def _sink_gradient_kernel(
    out_ptr,
    dout_ptr,
    lse_ptr,
    sink_ptr,
    partial_ptr,
    tokens,
    heads,
    dim,
    out_stride_b,
    out_stride_t,
    out_stride_h,
    dout_stride_b,
    dout_stride_t,
    dout_stride_h,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    batch_head = tl.program_id(1).to(tl.int64)
    head, batch = batch_head % heads, batch_head // heads
    block = tl.program_id(0).to(tl.int64)
    rows = block * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = tl.arange(0, BLOCK_D)
    mask = (rows[:, None] < tokens) & (cols[None, :] < dim)
    out = tl.load(
        out_ptr
        + batch * out_stride_b
        + head * out_stride_h
        + rows[:, None] * out_stride_t
        + cols[None, :],
        mask=mask,
        other=0.0,
    ).to(tl.float32)
    dout = tl.load(
        dout_ptr
        + batch * dout_stride_b
        + head * dout_stride_h
        + rows[:, None] * dout_stride_t
        + cols[None, :],
        mask=mask,
        other=0.0,
    ).to(tl.float32)
    sink = tl.load(sink_ptr + head).to(tl.float32)
    lse = tl.load(lse_ptr + batch_head * tokens + rows, mask=rows < tokens, other=float("inf"))
    share = tl.where(lse == float("-inf"), 0.0, tl.exp(sink - lse))
    total = tl.sum(tl.sum(out * dout, axis=1) * share, axis=0)
    num_blocks = tl.num_programs(0)
    num_partial = (tl.num_programs(1) // heads) * num_blocks
    tl.store(partial_ptr + head * num_partial + batch * num_blocks + block, total)


@triton.jit
def _merge_partial_kernel(
    out_a_ptr,
    lse_a_ptr,
    out_b_ptr,
    lse_b_ptr,
    merged_ptr,
    sink_ptr,
    tokens,
    heads,
    dim,
    a_stride_b,
    a_stride_t,
    a_stride_h,
    b_stride_b,
    b_stride_t,
    b_stride_h,
    lse_a_stride,
    HAS_SINK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    batch_head = tl.program_id(1).to(tl.int64)
    head, batch = batch_head % heads, batch_head // heads
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = tl.arange(0, BLOCK_D)
    lse_a = tl.load(lse_a_ptr + batch_head * lse_a_stride + rows, mask=rows < tokens, other=0.0)
    lse_b = tl.load(lse_b_ptr + batch_head * tokens + rows, mask=rows < tokens, other=0.0)
    top = tl.maximum(lse_a, lse_b)
    if HAS_SINK:
        sink = tl.load(sink_ptr + head).to(tl.float32)
        top = tl.maximum(top, sink)
    top = tl.where(top == float("-inf"), 0.0, top)
    share_a = tl.exp(lse_a - top)
    share_b = tl.exp(lse_b - top)
    total = share_a + share_b
    if HAS_SINK:
        total += tl.exp(sink - top)
    tl.store(merged_ptr + batch_head * tokens + rows, top + tl.log(total), mask=rows < tokens)
    total = tl.where(total == 0.0, 1.0, total)
    mask = (rows[:, None] < tokens) & (cols[None, :] < dim)
    a_ptrs = (
        out_a_ptr
        + batch * a_stride_b
        + head * a_stride_h
        + rows[:, None] * a_stride_t
        + cols[None, :]
    )
    b_ptrs = (
        out_b_ptr
        + batch * b_stride_b
        + head * b_stride_h
        + rows[:, None] * b_stride_t
        + cols[None, :]
    )
    out_a = tl.load(a_ptrs, mask=mask, other=0.0)
    out_b = tl.load(b_ptrs, mask=mask, other=0.0).to(tl.float32)
    merged = out_a.to(tl.float32) * (share_a / total)[:, None]
    merged += out_b * (share_b / total)[:, None]
    tl.store(a_ptrs, merged.to(out_a.dtype), mask=mask)
