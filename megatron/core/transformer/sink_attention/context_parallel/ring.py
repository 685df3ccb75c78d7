# Copyright (c) 2026, the megatron-core gptoss authors.

"""Ring attention: keys and values pass around the ring of ranks, which merge partial results.

In step j rank r computes with the keys of rank r-j while it receives those of rank r-j-1. Both of
its chunks see the first chunk of a lower rank; only its second chunk sees those of a higher rank,
and sees both. The half that the causal mask hides is never computed. Partial results are merged in
fp32 (fp64 for fp64); the sinks are applied once, at the end.

In the backward keys and values pass around again, followed one step later by the sums of their
gradients in fp32, which are back at their rank after the last step.
"""

import torch
from torch.distributed import ProcessGroup

from megatron.core.transformer.sink_attention.context_parallel.chunk_attention import (
    ChunkAttention,
    ChunkPair,
    apply_sinks_,
    local_sink_gradient,
    merge_,
)
from megatron.core.transformer.sink_attention.context_parallel.collectives import to_next
from megatron.core.transformer.sink_attention.context_parallel.layout import chunk_ranges


class RingAttention(torch.autograd.Function):
    """query [2c, b, np, hn], key, value [2c, b, ng, hn] of this rank (or without b), sinks."""

    @staticmethod
    def forward(ctx, query, key, value, sinks, kernels: ChunkAttention, group: ProcessGroup):
        cp = group.size()
        kv = torch.stack([key, value])
        for step in range(cp):
            kv_work = to_next(kv, group) if step < cp - 1 else None
            rows, keys, pair = _step(step, query.shape[0], group)
            k, v = kv[:, keys]
            part = kernels.forward(query[rows], k, v, pair)
            if step == 0:
                lse = part[1].contiguous()
                out = torch.empty(query.shape, dtype=lse.dtype, device=query.device)
                out.copy_(part[0])
            else:
                merge_(out[rows], lse[..., rows], *part)
            kv = kv_work.wait() if kv_work else None
        apply_sinks_(out, lse, sinks)
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, sinks, out, lse)
        ctx.kernels, ctx.group = kernels, group
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        query, key, value, sinks, out, lse = ctx.saved_tensors
        kernels, group = ctx.kernels, ctx.group
        cp = group.size()
        kv = torch.stack([key, value])
        grad_work = None  # gradients of the current keys, sent by the previous rank
        for step in range(cp):
            kv_work = to_next(kv, group) if step < cp - 1 else None
            rows, keys, pair = _step(step, query.shape[0], group)
            k, v = kv[:, keys]
            dq_i, dk_i, dv_i = kernels.backward(
                query[rows], k, v, out[rows], lse[..., rows], dout[rows], pair
            )
            if grad_work is None:  # its own chunks: all rows, all keys
                dq = dq_i.to(lse.dtype).contiguous()
                total = torch.stack([dk_i, dv_i]).to(lse.dtype)
            else:
                dq[rows] += dq_i
                total = grad_work.wait()
                total[0, keys] += dk_i
                total[1, keys] += dv_i
            grad_work = to_next(total, group)
            kv = kv_work.wait() if kv_work else None
        dsinks = local_sink_gradient(ctx, out, lse, dout, sinks)
        dk, dv = grad_work.wait().to(key.dtype)
        return dq.to(query.dtype), dk, dv, dsinks, None, None


def _step(step: int, local: int, group: ProcessGroup) -> tuple[slice, slice, ChunkPair]:
    """Rows of the query and of the current keys, and their chunk pair."""
    rank, cp, length = group.rank(), group.size(), local // 2
    source = (rank - step) % cp
    mine, theirs = (chunk_ranges(r, cp, local * cp) for r in (rank, source))
    everything = slice(0, local)
    if source == rank:
        return everything, everything, ChunkPair(mine, mine, causal=True)
    if source < rank:
        return everything, slice(0, length), ChunkPair(mine, theirs[:1])
    return slice(length, local), everything, ChunkPair(mine[1:], theirs)
