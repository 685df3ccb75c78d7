# Copyright (c) 2026, the megatron-core gptoss authors.

"""The mathematics of the sink, on top of attention without one.

A learnable sink b is one more column of the softmax with the score b and the value 0. With
lse = logsumexp of the scores that a query sees:

    out'  = out * sigmoid(lse - b)
    lse'  = logaddexp(lse, b)
    dsink = -sum over the rows of rowsum(dout * out') * exp(b - lse')

and the ordinary flash-attention backward gives the exact dq, dk, dv when it gets out' and lse' in
place of its own. A row that sees no key has lse = -inf and out = 0; that stays well defined.

Shapes: out [..., t, np, hn] (tokens, query heads of this rank, head dim), lse [..., np, t],
sinks [np].
"""

import torch
from torch import Tensor

# Tokens per step of the eager dsink: what it allocates does not grow with the sequence.
_CHUNK = 4096


def sink_weight(lse: Tensor, sink: Tensor) -> Tensor:
    """sigmoid(lse - sink): the share of the probability that the keys keep, [..., np, t]."""
    return torch.sigmoid(lse - sink.to(lse.dtype).unsqueeze(-1))


def merge_sink(lse: Tensor, sink: Tensor) -> Tensor:
    """logaddexp(lse, sink): the log-sum-exp with the sink's column in it, [..., np, t]."""
    return torch.logaddexp(lse, sink.to(lse.dtype).unsqueeze(-1))


def apply_sink(out: Tensor, lse: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
    """Attention without a sink to attention with one; differentiable, nothing in place.

    Args:
        out: [..., t, np, hn] of any float type.
        lse: [..., np, t], natural log, in the precision of the computation (fp32, fp64).
        sink: [np], any float type; one learnable score a query head of this rank.
    Returns:
        out' in the dtype of out, lse' in the dtype of lse.
    """
    weight = sink_weight(lse, sink).transpose(-1, -2).unsqueeze(-1)
    return (out * weight).to(out.dtype), merge_sink(lse, sink)


def apply_sink_(out: Tensor, lse: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
    """`apply_sink` that overwrites out, in one kernel and without a copy in fp32."""
    if _use_triton(out):
        from megatron.core.transformer.sink_attention import rescale_triton

        return out, rescale_triton.apply_sink_(out, lse, sink)
    out.mul_(sink_weight(lse, sink).transpose(-1, -2).unsqueeze(-1))
    return out, merge_sink(lse, sink)


def sink_gradient(out: Tensor, lse: Tensor, dout: Tensor, sink: Tensor) -> Tensor:
    """dsink, summed over tokens and batch, in the order of the tokens: the same bits every time.

    Args:
        out, lse: with the sink applied.
        dout: gradient of out.
        sink: [np].
    Returns:
        [np] in the dtype of sink.
    """
    if _use_triton(out):
        from megatron.core.transformer.sink_attention import rescale_triton

        return rescale_triton.sink_gradient(out, lse, dout, sink)
    share = torch.exp(sink.to(lse.dtype).unsqueeze(-1) - lse)
    share = share.masked_fill(lse == -torch.inf, 0.0)  # a sink of -inf, and no key either
    total = lse.new_zeros(lse.shape[:-1])
    for start in range(0, lse.shape[-1], _CHUNK):
        rows = slice(start, start + _CHUNK)
        delta = (dout[..., rows, :, :].to(lse.dtype) * out[..., rows, :, :]).sum(-1)
        total += (delta.transpose(-1, -2) * share[..., rows]).sum(-1)
    return -total.reshape(-1, total.shape[-1]).sum(0).to(sink.dtype)


def merge_partial(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint sets of keys to attention over both.

    The order of merging changes the rounding only. The sink is no part of it: apply it once, to
    the merged pair, or it is counted once a part.

    Args:
        out_a, out_b: [..., t, np, hn]; keep them in fp32 over several merges.
        lse_a, lse_b: [..., np, t]; -inf for a row that sees no key of this part.
    Returns:
        out in the dtype of out_a, lse in that of lse_a.
    """
    lse = torch.logaddexp(lse_a, lse_b)
    base = lse.masked_fill(lse == -torch.inf, 0.0)  # -inf - -inf would be nan
    weight_a = torch.exp(lse_a - base).transpose(-1, -2).unsqueeze(-1)
    weight_b = torch.exp(lse_b - base).transpose(-1, -2).unsqueeze(-1)
    return (out_a * weight_a + out_b * weight_b).to(out_a.dtype), lse


def merge_partial_(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, sink: Tensor | None = None
) -> None:
    """`merge_partial` into out_a and lse_a, one pass; with the sink, if this is the last merge.

    Args:
        out_a: written in its own dtype; keep it in fp32 if there are more merges to come.
        lse_a: a slice of the tokens of a contiguous tensor, or one.
        sink: [np], merged as one more column.
    """
    if _use_triton(out_a):
        from megatron.core.transformer.sink_attention import rescale_triton

        return rescale_triton.merge_partial_(out_a, lse_a, out_b, lse_b, sink)
    lse = torch.logaddexp(lse_a, lse_b)
    if sink is not None:
        lse = merge_sink(lse, sink)
    base = lse.masked_fill(lse == -torch.inf, 0.0)
    weight_a = torch.exp(lse_a - base).transpose(-1, -2).unsqueeze(-1)
    weight_b = torch.exp(lse_b - base).transpose(-1, -2).unsqueeze(-1)
    out_a.copy_(out_a * weight_a + out_b * weight_b)
    lse_a.copy_(lse)


def _use_triton(out: Tensor) -> bool:
    if not out.is_cuda or out.dtype == torch.float64 or out.stride(-1) != 1:
        return False
    from megatron.core.transformer.sink_attention import rescale_triton

    return rescale_triton.HAVE_TRITON
