# Copyright (c) 2026, the megatron-core gptoss authors.

"""Attention of chunks of queries to chunks of keys, by the same kernels as on one rank.

Chunks are a tuple of global ranges [start, end), ascending. A `ChunkPair` of queries and keys is

    causal, if both are the same chunks: concatenation keeps the order of the tokens, so this is
            causal attention over the concatenation;
    full,   if every key comes before every query: no mask.

Chunks split documents. The bounds of the documents within chunks are computed on the device from
cu_seqlens, in shapes that depend on no value.

Tensors have the tokens first: [t, b, np, hn] or packed [t, np, hn]; lse is [b, np, t] or [np, t].
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from megatron.core.transformer.sink_attention import registry
from megatron.core.transformer.sink_attention.attention_params import (
    CAUSAL,
    NO_MASK,
    AttentionParams,
)
from megatron.core.transformer.sink_attention.ops import batch_first, kernel_context
from megatron.core.transformer.sink_attention.rescale import (
    apply_sink_,
    merge_partial_,
    sink_gradient,
)

Ranges = tuple[tuple[int, int], ...]


class ChunkPair(NamedTuple):
    """Chunks of queries and the chunks of keys that they see."""

    queries: Ranges
    keys: Ranges
    causal: bool = False


def length(ranges: Ranges) -> int:
    """Number of tokens in the ranges."""
    return sum(end - start for start, end in ranges)


def bounds_within(cu_seqlens: Tensor, ranges: Ranges) -> Tensor:
    """cu_seqlens of the documents within the ranges, [documents + 1] int32."""
    parts = [(cu_seqlens - start).clamp(0, end - start) for start, end in ranges]
    return torch.stack(parts).sum(0, dtype=torch.int32)


@dataclass
class ChunkAttention:
    """Forward and backward of chunk pairs, without sinks.

    Attributes:
        params: cu_seqlens and max_seqlen describe the complete sequence; a backend of "auto" is the
            fastest for each pair.
    """

    params: AttentionParams
    _bounds: dict[Ranges, Tensor] = field(default_factory=dict)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, pair: ChunkPair) -> tuple[Tensor, Tensor]:
        """out in the shape of q, and lse, -inf for a query that sees no key of the pair."""
        params = self._params(q, k, pair)
        kernel = registry.select_backend(params)
        with kernel_context(q):
            out, lse = kernel.forward(*(batch_first(x) for x in (q, k, v)), params)
        return batch_first(out), lse

    def backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        dout: Tensor,
        pair: ChunkPair,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv of the pair; out and lse are those over all keys, with the sinks."""
        params = self._params(q, k, pair)
        kernel = registry.select_backend(params)
        with kernel_context(q):
            q, k, v, out, dout = (batch_first(x) for x in (q, k, v, out, dout))
            grads = kernel.backward(q, k, v, out, lse.contiguous(), dout, params)
            if params.packed and not params.same_lengths:
                for grad in grads[1:]:
                    _clear_unseen(grad, params)
        return tuple(batch_first(grad) for grad in grads)

    def _params(self, q: Tensor, k: Tensor, pair: ChunkPair) -> AttentionParams:
        num_q, num_k = length(pair.queries), length(pair.keys)
        packed, max_seqlen = self.params.packed, self.params.max_seqlen_q
        return self.params.with_tensors(
            q,
            k,
            window_size=CAUSAL if pair.causal else NO_MASK,
            cu_seqlens_q=self._within(pair.queries) if packed else None,
            cu_seqlens_k=self._within(pair.keys) if packed else None,
            max_seqlen_q=min(num_q, max_seqlen) if packed else num_q,
            max_seqlen_k=min(num_k, max_seqlen) if packed else num_k,
            same_lengths=pair.causal,
        )

    def _within(self, ranges: Ranges) -> Tensor:
        if ranges not in self._bounds:
            self._bounds[ranges] = bounds_within(self.params.cu_seqlens_q, ranges)
        return self._bounds[ranges]


def _clear_unseen(grad: Tensor, params: AttentionParams) -> None:
    """Zero the gradients of keys whose document has no query here: a kernel may skip them."""
    keys = torch.arange(grad.shape[0], device=grad.device)
    document = torch.searchsorted(params.cu_seqlens_k[1:], keys, right=True)
    queries = params.cu_seqlens_q.diff()
    seen = queries[document.clamp(max=queries.numel() - 1)] > 0
    grad.masked_fill_(~seen[:, None, None], 0)


def merge_(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, sinks=None) -> None:
    """Merge attention to other keys into out_a and lse_a; with the sinks in the last merge."""
    sinks = None if sinks is None else sinks.detach()
    with kernel_context(out_a):
        merge_partial_(batch_first(out_a), lse_a, batch_first(out_b), lse_b, sinks)


def local_sink_gradient(ctx, out: Tensor, lse: Tensor, dout: Tensor, sinks: Tensor | None):
    """dsinks of this rank's tokens; None if sinks, the fourth input, need no gradient."""
    if sinks is None or not ctx.needs_input_grad[3]:
        return None
    return sink_gradient(batch_first(out), lse, batch_first(dout), sinks)


def apply_sinks_(out: Tensor, lse: Tensor, sinks: Tensor | None) -> None:
    """Apply the sinks to queries that have been merged over all their keys, in place."""
    if sinks is not None:
        with kernel_context(out):
            lse.copy_(apply_sink_(batch_first(out), lse, sinks.detach())[1])
