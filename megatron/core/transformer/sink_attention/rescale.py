# Copyright (c) 2026, the megatron-core gptoss authors.

"""Attention with sinks, computed from the out and lse of attention without sinks.

A learnable sink b is one more column of the softmax with the score b and the value 0. With
lse = logsumexp of the scores that a query sees:

    out'  = out * sigmoid(lse - b)
    lse'  = logaddexp(lse, b)
    db    = -sum over the queries of rowsum(dout * out') * exp(b - lse')

The backward of flash-attention gives the exact dq, dk, dv if it is given out' and lse' instead of
its own. A query that sees no key has lse = -inf and out = 0, for which all three are defined.

Shapes: out [..., t, np, hn] (tokens, query heads of this rank, head dim), lse [..., np, t],
sinks [np].
"""

from types import ModuleType

import torch
from torch import Tensor

from megatron.core.kernel_selection import triton_or_torch

RESCALE = triton_or_torch("rescale", "megatron.core.transformer.sink_attention.rescale_triton")

# Tokens per step of the dsinks in plain PyTorch, which bounds its memory.
_CHUNK = 4096


def sink_weight(lse: Tensor, sinks: Tensor) -> Tensor:
    """sigmoid(lse - sinks): the probability of the keys together, [..., np, t]."""
    return torch.sigmoid(lse - sinks.to(lse.dtype).unsqueeze(-1))


def merge_sink(lse: Tensor, sinks: Tensor) -> Tensor:
    """logaddexp(lse, sinks): the log-sum-exp that includes the sink, [..., np, t]."""
    return torch.logaddexp(lse, sinks.to(lse.dtype).unsqueeze(-1))


def apply_sink(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Turn attention without sinks into attention with sinks; differentiable, not in place.

    Args:
        out: [..., t, np, hn] of any float type.
        lse: [..., np, t], natural log, in the precision of the computation (fp32, fp64).
        sinks: [np], any float type; one learnable logit per query head of this rank.
    Returns:
        out' in the dtype of out, lse' in the dtype of lse.
    """
    weight = sink_weight(lse, sinks).transpose(-1, -2).unsqueeze(-1)
    return (out * weight).to(out.dtype), merge_sink(lse, sinks)


def apply_sink_(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """`apply_sink` in place of out; one kernel on CUDA, without a copy in fp32."""
    if (kernels := _kernels(out)) is not None:
        return out, kernels.apply_sink_(out, lse, sinks)
    out.mul_(sink_weight(lse, sinks).transpose(-1, -2).unsqueeze(-1))
    return out, merge_sink(lse, sinks)


def sink_gradient(out: Tensor, lse: Tensor, dout: Tensor, sinks: Tensor) -> Tensor:
    """dsinks, summed over tokens and batch in the order of the tokens: deterministic.

    Args:
        out, lse: with the sinks applied.
        dout: gradient of out.
        sinks: [np].
    Returns:
        [np] in the dtype of sinks.
    """
    if (kernels := _kernels(out)) is not None:
        return kernels.sink_gradient(out, lse, dout, sinks)
    share = torch.exp(sinks.to(lse.dtype).unsqueeze(-1) - lse)
    share = share.masked_fill(lse == -torch.inf, 0.0)  # a sink of -inf, and no key either
    total = lse.new_zeros(lse.shape[:-1])
    for start in range(0, lse.shape[-1], _CHUNK):
        rows = slice(start, start + _CHUNK)
        delta = (dout[..., rows, :, :].to(lse.dtype) * out[..., rows, :, :]).sum(-1)
        total += (delta.transpose(-1, -2) * share[..., rows]).sum(-1)
    return -total.reshape(-1, total.shape[-1]).sum(0).to(sinks.dtype)


def merge_partial(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Merge attention over two disjoint sets of keys.

    The order of merging changes only the rounding. Apply the sinks once, to the merged pair: each
    part that had them would count them again.

    Args:
        out_a, out_b: [..., t, np, hn]; keep them in fp32 over several merges.
        lse_a, lse_b: [..., np, t]; -inf for a query that sees no key of this part.
    Returns:
        out in the dtype of out_a, lse in that of lse_a.
    """
    lse = torch.logaddexp(lse_a, lse_b)
    base = lse.masked_fill(lse == -torch.inf, 0.0)  # -inf - -inf would be nan
    weight_a = torch.exp(lse_a - base).transpose(-1, -2).unsqueeze(-1)
    weight_b = torch.exp(lse_b - base).transpose(-1, -2).unsqueeze(-1)
    return (out_a * weight_a + out_b * weight_b).to(out_a.dtype), lse


def merge_partial_(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, sinks: Tensor | None = None
) -> None:
    """`merge_partial` in place of out_a and lse_a; with the sinks, if this is the last merge.

    Args:
        out_a: written in its own dtype; keep it in fp32 if other merges follow.
        lse_a: contiguous, or a slice of the tokens of a contiguous tensor.
        sinks: [np], merged as one more column.
    """
    if (kernels := _kernels(out_a)) is not None:
        return kernels.merge_partial_(out_a, lse_a, out_b, lse_b, sinks)
    lse = torch.logaddexp(lse_a, lse_b)
    if sinks is not None:
        lse = merge_sink(lse, sinks)
    base = lse.masked_fill(lse == -torch.inf, 0.0)
    weight_a = torch.exp(lse_a - base).transpose(-1, -2).unsqueeze(-1)
    weight_b = torch.exp(lse_b - base).transpose(-1, -2).unsqueeze(-1)
    out_a.copy_(out_a * weight_a + out_b * weight_b)
    lse_a.copy_(lse)


def _kernels(out: Tensor) -> ModuleType | None:
    """The Triton kernels for out, whose last dim they take only dense; None for plain PyTorch."""
    return RESCALE.select(out).module if out.stride(-1) == 1 else None
