# Copyright (c) 2026, the megatron-core gptoss authors.

"""Attention of some tokens of the sequence to some others, by the same kernels as on one rank.

A token set is a tuple of global ranges [start, end), ascending. A piece pairs a set of queries with
a set of keys and is

    causal, where both are the same set: concatenating ranges keeps the order of the tokens, so it
            is ordinary causal attention over the concatenation;
    full,   where every key comes before every query: no mask at all.

Documents are cut by the ranges: each has in a set the tokens that it has in the ranges, in order.
Their bounds are computed on the device, from cu_seqlens, in shapes that depend on no value.

Tensors have the tokens first: [t, b, np, hn] or packed [t, np, hn]; lse is [b, np, t] or [np, t].
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from megatron.core.transformer.sink_attention import registry
from megatron.core.transformer.sink_attention.attention_params import Call, case_of
from megatron.core.transformer.sink_attention.ops import as_kernel, batch_first
from megatron.core.transformer.sink_attention.rescale import (
    apply_sink_,
    merge_partial_,
    sink_gradient,
)

Ranges = tuple[tuple[int, int], ...]


class Piece(NamedTuple):
    """queries attend to keys; causal if they are one set, else full."""

    queries: Ranges
    keys: Ranges
    causal: bool = False


def length(ranges: Ranges) -> int:
    """Tokens of a set."""
    return sum(end - start for start, end in ranges)


def bounds_within(cu_seqlens: Tensor, ranges: Ranges) -> Tensor:
    """cu_seqlens of the documents cut to the ranges, [documents + 1] int32."""
    parts = [(cu_seqlens - start).clamp(0, end - start) for start, end in ranges]
    return torch.stack(parts).sum(0, dtype=torch.int32)


@dataclass
class PieceAttention:
    """The kernels' side of one attention call, without the sink.

    Attributes:
        cu_seqlens: of the whole sequence; None for a dense batch.
        max_seqlen: the longest document, or the sequence.
        backend: a name, or "auto" for the fastest of each piece.
    """

    scale: float
    cu_seqlens: Tensor | None
    max_seqlen: int
    backend: str = "auto"
    deterministic: bool = False
    _bounds: dict[Ranges, Tensor] = field(default_factory=dict)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, piece: Piece) -> tuple[Tensor, Tensor]:
        """out in the shape of q, and lse, -inf for a query that sees no key of the piece."""
        call = self._call(piece)
        kernel = registry.choose(case_of(q, k, call), self.backend)
        with as_kernel(q):
            out, lse = kernel.forward(*(batch_first(x) for x in (q, k, v)), call)
        return batch_first(out), lse

    def backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        dout: Tensor,
        piece: Piece,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv of the piece; out and lse are those over all keys, with the sink."""
        call = self._call(piece)
        kernel = registry.choose(case_of(q, k, call), self.backend)
        with as_kernel(q):
            q, k, v, out, dout = (batch_first(x) for x in (q, k, v, out, dout))
            grads = kernel.backward(q, k, v, out, lse.contiguous(), dout, call)
            if call.packed and not call.same_lengths:
                for grad in grads[1:]:
                    _clear_unseen(grad, call)
        return tuple(batch_first(grad) for grad in grads)

    def _call(self, piece: Piece) -> Call:
        num_q, num_k = length(piece.queries), length(piece.keys)
        packed = self.cu_seqlens is not None
        return Call(
            scale=self.scale,
            window=None,
            cu_seqlens_q=self._within(piece.queries) if packed else None,
            cu_seqlens_k=self._within(piece.keys) if packed else None,
            max_seqlen_q=min(num_q, self.max_seqlen) if packed else num_q,
            max_seqlen_k=min(num_k, self.max_seqlen) if packed else num_k,
            deterministic=self.deterministic,
            same_lengths=piece.causal,
            causal=piece.causal,
        )

    def _within(self, ranges: Ranges) -> Tensor:
        if ranges not in self._bounds:
            self._bounds[ranges] = bounds_within(self.cu_seqlens, ranges)
        return self._bounds[ranges]


def _clear_unseen(grad: Tensor, call: Call) -> None:
    """Zero the rows of keys whose document has no query here.

    A kernel works document by document; one without a query is a case that it may leave unwritten.
    """
    keys = torch.arange(grad.shape[0], device=grad.device)
    document = torch.searchsorted(call.cu_seqlens_k[1:], keys, right=True)
    queries = call.cu_seqlens_q.diff()
    seen = queries[document.clamp(max=queries.numel() - 1)] > 0
    grad.masked_fill_(~seen[:, None, None], 0)


def merge_(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, sink=None) -> None:
    """Other keys for the queries of out_a, in place; with the sink if there are no more to come."""
    sink = None if sink is None else sink.detach()
    with as_kernel(out_a):
        merge_partial_(batch_first(out_a), lse_a, batch_first(out_b), lse_b, sink)


def sink_gradient_here(ctx, out: Tensor, lse: Tensor, dout: Tensor, sink: Tensor | None):
    """dsink of this rank's tokens; None where there is no sink, the fourth input, or no need."""
    if sink is None or not ctx.needs_input_grad[3]:
        return None
    return sink_gradient(batch_first(out), lse, batch_first(dout), sink)


def finish_(out: Tensor, lse: Tensor, sink: Tensor | None) -> None:
    """The sink for queries whose keys are all in, in place."""
    if sink is not None:
        with as_kernel(out):
            lse.copy_(apply_sink_(batch_first(out), lse, sink.detach())[1])
