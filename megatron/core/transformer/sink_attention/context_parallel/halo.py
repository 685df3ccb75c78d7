# Copyright (c) 2026, the megatron-core gptoss authors.

"""Attention with a window: ranks exchange only the halo, the keys before each of the two chunks.

The halo of a chunk is `left` keys, the left size of the window. It comes from several ranks if it
is longer than a chunk, and never reaches before the first token of the sequence. Gradients of the
halo are sent back and added in fp32.

A chunk with its halo in front is a sequence whose last query is aligned with its last key: the
kernels of one rank compute it, sinks included.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core.transformer.sink_attention.attend import attend
from megatron.core.transformer.sink_attention.attention_params import AttentionParams
from megatron.core.transformer.sink_attention.context_parallel.chunk_attention import bounds_within
from megatron.core.transformer.sink_attention.context_parallel.collectives import all_to_all
from megatron.core.transformer.sink_attention.context_parallel.layout import (
    chunk_length,
    chunk_ranges,
)


class Segment(NamedTuple):
    """The part of a halo that one rank holds: tokens [start, end) of that rank, the owner.

    reader is the rank that needs it for its halo 0 or 1; two halos may include the same tokens.
    """

    reader: int
    halo: int
    owner: int
    start: int
    end: int

    @property
    def rows(self) -> slice:
        return slice(self.start, self.end)


def halo_ranges(rank: int, cp: int, tokens: int, left: int) -> tuple[tuple[int, int], ...]:
    """Global ranges of the halos of a rank's two chunks, `left` keys each; none before token 0."""
    return tuple((max(0, start - left), start) for start, _ in chunk_ranges(rank, cp, tokens))


def halo_segments(rank: int, cp: int, tokens: int, left: int) -> tuple[list[Segment], ...]:
    """The two halos of a rank, each in the order of the sequence."""
    length = chunk_length(tokens, cp)
    halos = ([], [])
    for index, (start, end) in enumerate(halo_ranges(rank, cp, tokens, left)):
        for chunk in range(start // length, -(-end // length)):
            owner = min(chunk, 2 * cp - 1 - chunk)
            shift = chunk * length - (0 if chunk < cp else length)
            inside = max(start, chunk * length), min(end, (chunk + 1) * length)
            segment = Segment(rank, index, owner, inside[0] - shift, inside[1] - shift)
            halos[index].append(segment)
    return halos


def halo_tokens(rank: int, cp: int, tokens: int, left: int) -> int:
    """Tokens whose key and value a rank receives in a forward; as many gradients are sent back."""
    halos = halo_segments(rank, cp, tokens, left)
    return sum(s.end - s.start for halo in halos for s in halo if s.owner != rank)


def halo_bytes(rank: int, cp: int, tokens: int, left: int, token_bytes: int) -> int:
    """Bytes that a rank receives in one forward.

    Args:
        left: keys of the halo before each chunk, the left size of the window.
        token_bytes: bytes of one token's key and value: 2 * batch * ng * hn * bytes per element.
    """
    return halo_tokens(rank, cp, tokens, left) * token_bytes


def halo_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    params: AttentionParams,
    left: int,
    group: ProcessGroup,
) -> Tensor:
    """Attention with a window, or in documents of at most left + 1 tokens.

    One call for packed sequences and a batch of one; otherwise one call for each of the two chunks.

    Args:
        params: cu_seqlens and max_seqlen describe the complete sequence.
        left: keys of the halo before each chunk.
    """
    rank, cp = group.rank(), group.size()
    tokens, length = query.shape[0] * cp, query.shape[0] // 2
    key, value = HaloExchange.apply(key, value, params.cu_seqlens_q, left, group)
    chunks = chunk_ranges(rank, cp, tokens)
    halos = [end - start for start, end in halo_ranges(rank, cp, tokens, left)]
    changes = dict(window_size=(left, 0), same_lengths=False)
    if not params.packed and query.shape[1] > 1:
        parts = [halos[0] + length, halos[1] + length]
        outs = []
        for q, k, v in zip(query.split(length), key.split(parts), value.split(parts)):
            lengths = dict(max_seqlen_q=length, max_seqlen_k=k.shape[0])
            outs.append(attend(q, k, v, sinks, params.with_tensors(q, k, **lengths, **changes)))
        return torch.cat(outs)
    if params.packed:
        documents, tensors = params.cu_seqlens_q, (query, key, value)
    else:
        documents = torch.arange(2, dtype=torch.int32, device=query.device) * tokens
        tensors = [x.squeeze(1) for x in (query, key, value)]
    bounds_q = [bounds_within(documents, (chunk,)) for chunk in chunks]
    bounds_k = [bounds_within(documents, ((a - n, b),)) for (a, b), n in zip(chunks, halos)]
    both_chunks = params.with_tensors(
        *tensors[:2],
        cu_seqlens_q=torch.cat([bounds_q[0], bounds_q[1][1:] + length]),
        cu_seqlens_k=torch.cat([bounds_k[0], bounds_k[1][1:] + (halos[0] + length)]),
        max_seqlen_q=min(params.max_seqlen_q, length),
        max_seqlen_k=min(params.max_seqlen_k, length + max(halos)),
        **changes,
    )
    return attend(*tensors, sinks, both_chunks).view(query.shape)


class HaloExchange(torch.autograd.Function):
    """key and value [2c, ...] of this rank to [halo, chunk, halo, chunk]."""

    @staticmethod
    def forward(ctx, key, value, cu_seqlens, left, group):
        plan = plan_of(key.shape[0], left, group.rank(), group.size())
        ctx.plan, ctx.cu_seqlens, ctx.group = plan, cu_seqlens, group
        sent = [x[s.rows] for s in plan.sent for x in (key, value)]
        kv_work = all_to_all(
            torch.cat(sent) if sent else key[:0], plan.rows_sent, plan.rows_received, group
        )
        received = plan.unpack(kv_work.wait())
        return tuple(plan.join(x, received, kv) for kv, x in enumerate((key, value)))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        plan = ctx.plan
        halos, chunks = zip(*(plan.split(grad) for grad in grads))
        if ctx.cu_seqlens is not None:
            for pair in halos:
                plan.clear_other_documents(pair, ctx.cu_seqlens)
        segments = [plan.segments(pair) for pair in halos]
        sent = [part[s] for s in plan.received for part in segments]
        grad_work = all_to_all(
            torch.cat(sent) if sent else grads[0][:0],
            plan.rows_received,
            plan.rows_sent,
            ctx.group,
        )
        totals = [torch.cat(pair) for pair in chunks]
        tails = [plan.tails(total) for total in totals]
        for s in plan.own:
            for kv in (0, 1):
                plan.tail_rows(tails[kv], s).add_(segments[kv][s])
        rows = grad_work.wait()
        for s in plan.sent:
            for kv in (0, 1):
                part, rows = rows.split([s.end - s.start, len(rows) - (s.end - s.start)])
                plan.tail_rows(tails[kv], s).add_(part)
        for total, tail in zip(totals, tails):
            plan.put_tails(total, tail)
        return (*totals, None, None, None)


@lru_cache(maxsize=64)
def plan_of(local: int, left: int, rank: int, cp: int) -> "_Plan":
    """The plan of a rank that holds `local` tokens; the same for every layer and step."""
    return _Plan(local, left, rank, cp)


class _Plan:
    """Which rank sends which tokens to which; the same on every rank.

    Attributes:
        halos: the segments of this rank's two halos.
        received: those that other ranks hold, ordered by that rank.
        own: those that this rank holds itself.
        sent: segments of other ranks' halos that this rank holds, ordered by that rank.
        rows_sent, rows_received: rows per rank, of keys and values together.
    """

    def __init__(self, local: int, left: int, rank: int, cp: int):
        self.rank, self.length = rank, local // 2
        self.tokens = local * cp
        self.chunks = chunk_ranges(rank, cp, self.tokens)
        self.ranges = halo_ranges(rank, cp, self.tokens, left)
        everyone = [
            [s for halo in halo_segments(r, cp, self.tokens, left) for s in halo] for r in range(cp)
        ]
        self.halos = halo_segments(rank, cp, self.tokens, left)
        by_owner = [[s for s in everyone[rank] if s.owner == owner] for owner in range(cp)]
        by_reader = [[s for s in segments if s.owner == rank] for segments in everyone]
        self.own, by_owner[rank], by_reader[rank] = by_owner[rank], [], []
        self.received = [s for segments in by_owner for s in segments]
        self.sent = [s for segments in by_reader for s in segments]
        self.rows_received = [_rows(segments) for segments in by_owner]
        self.rows_sent = [_rows(segments) for segments in by_reader]
        self.tail = min(self.length, left)

    def unpack(self, rows: Tensor) -> dict[Segment, tuple[Tensor, Tensor]]:
        """Keys and values of the segments received."""
        found = {}
        for s in self.received:
            size = s.end - s.start
            key, value, rows = rows.split([size, size, len(rows) - 2 * size])
            found[s] = (key, value)
        return found

    def join(self, x: Tensor, received: dict, kv: int) -> Tensor:
        """[halo, chunk, halo, chunk] of the keys (kv 0) or the values (kv 1) x."""
        parts = []
        for halo, chunk in zip(self.halos, x.chunk(2)):
            parts += [x[s.rows] if s.owner == self.rank else received[s][kv] for s in halo]
            parts.append(chunk)
        return torch.cat(parts)

    def split(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """[halo, chunk, halo, chunk] to halos and chunks."""
        sizes = [n for start, end in self.ranges for n in (end - start, self.length)]
        parts = x.split(sizes)
        return list(parts[::2]), list(parts[1::2])

    def segments(self, halos: list[Tensor]) -> dict[Segment, Tensor]:
        """The halos' rows by segment."""
        found = {}
        for segments, halo in zip(self.halos, halos):
            found.update(zip(segments, halo.split([s.end - s.start for s in segments])))
        return found

    def clear_other_documents(self, halos: list[Tensor], cu_seqlens: Tensor) -> None:
        """Zero the gradients of documents that end before the chunk, and so have no query in it.

        A kernel may leave the gradients of a document without a query unwritten.
        """
        for index, (start, end) in enumerate(self.ranges):
            positions = torch.arange(start, end, device=cu_seqlens.device)
            begun = cu_seqlens.masked_fill(cu_seqlens > end, 0).amax()
            halos[index] = halos[index].masked_fill((positions < begun)[:, None, None], 0)

    def tails(self, total: Tensor) -> list[Tensor]:
        """The ends of the two chunks that other ranks' halos include, in fp32."""
        dtype = torch.float64 if total.dtype == torch.float64 else torch.float32
        return [chunk[self.length - self.tail :].to(dtype, copy=True) for chunk in total.chunk(2)]

    def tail_rows(self, tails: list[Tensor], s: Segment) -> Tensor:
        """A segment that this rank holds, within the tails."""
        which = s.start // self.length
        skipped = (which + 1) * self.length - self.tail
        return tails[which][s.start - skipped : s.end - skipped]

    def put_tails(self, total: Tensor, tails: list[Tensor]) -> None:
        """Round the ends to the dtype of total and write them there."""
        for chunk, tail in zip(total.chunk(2), tails):
            chunk[self.length - self.tail :] = tail


def _rows(segments: list[Segment]) -> int:
    return 2 * sum(s.end - s.start for s in segments)
