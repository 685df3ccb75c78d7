# Copyright (c) 2026, the megatron-core gptoss authors.

"""Windowed attention: only the halo, the window-1 keys before each of the two chunks, is exchanged.

A chunk may be shorter than the window: its halo then comes from several ranks. It never reaches
before the sequence's first token. Gradients of the halo are sent back and added in fp32.

With its halo in front, a chunk is a sequence of its own whose last query stands at its last key:
the kernels of one rank do the rest, the sink with it.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core.transformer.sink_attention.attend import attend
from megatron.core.transformer.sink_attention.context_parallel.chunk_attention import bounds_within
from megatron.core.transformer.sink_attention.context_parallel.collectives import all_to_all
from megatron.core.transformer.sink_attention.context_parallel.layout import (
    chunk_length,
    chunk_ranges,
)


class Segment(NamedTuple):
    """The part of a halo that one rank holds, as [start, end) among that owner's own tokens.

    reader and halo (0 or 1) say whose it is: two halos may reach back to the same tokens.
    """

    reader: int
    halo: int
    owner: int
    start: int
    end: int

    @property
    def rows(self) -> slice:
        return slice(self.start, self.end)


def halo_ranges(rank: int, cp: int, tokens: int, window: int) -> tuple[tuple[int, int], ...]:
    """Global ranges of the halos before a rank's two chunks; empty before the first token."""
    return tuple((max(0, start - window + 1), start) for start, _ in chunk_ranges(rank, cp, tokens))


def halo_segments(rank: int, cp: int, tokens: int, window: int) -> tuple[list[Segment], ...]:
    """The two halos of a rank, each in the order of the sequence."""
    length = chunk_length(tokens, cp)
    halos = ([], [])
    for index, (start, end) in enumerate(halo_ranges(rank, cp, tokens, window)):
        for chunk in range(start // length, -(-end // length)):
            owner = min(chunk, 2 * cp - 1 - chunk)
            shift = chunk * length - (0 if chunk < cp else length)
            inside = max(start, chunk * length), min(end, (chunk + 1) * length)
            segment = Segment(rank, index, owner, inside[0] - shift, inside[1] - shift)
            halos[index].append(segment)
    return halos


def halo_tokens(rank: int, cp: int, tokens: int, window: int) -> int:
    """Tokens whose key and value a rank receives in one forward; as many gradients go back."""
    halos = halo_segments(rank, cp, tokens, window)
    return sum(s.end - s.start for halo in halos for s in halo if s.owner != rank)


def halo_bytes(rank: int, cp: int, tokens: int, window: int, token_bytes: int) -> int:
    """Bytes that a rank receives in one forward.

    Args:
        token_bytes: of one token's key and value: 2 * batch * ng * hn * bytes of an element.
    """
    return halo_tokens(rank, cp, tokens, window) * token_bytes


def halo_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sink: Tensor | None,
    group: ProcessGroup,
    *,
    window: int,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
    scale: float | None,
    backend: str,
    deterministic: bool,
) -> Tensor:
    """Attention in a window, or in documents of at most `window` tokens.

    One call for packed sequences and a batch of one; else one call for each of the two chunks.
    """
    rank, cp = group.rank(), group.size()
    tokens, length = query.shape[0] * cp, query.shape[0] // 2
    key, value = HaloExchange.apply(key, value, cu_seqlens, window, group)
    chunks = chunk_ranges(rank, cp, tokens)
    reach = [end - start for start, end in halo_ranges(rank, cp, tokens, window)]
    options = dict(scale=scale, window=window, backend=backend, deterministic=deterministic)
    if cu_seqlens is None and query.shape[1] > 1:
        parts = [reach[0] + length, reach[1] + length]
        outs = [
            attend(q, k, v, sink, None, None, length, k.shape[0], **options)
            for q, k, v in zip(query.split(length), key.split(parts), value.split(parts))
        ]
        return torch.cat(outs)
    if cu_seqlens is None:
        documents = torch.arange(2, dtype=torch.int32, device=query.device) * tokens
        tensors = [x.squeeze(1) for x in (query, key, value)]
    else:
        documents, tensors = cu_seqlens, (query, key, value)
    bounds_q = [bounds_within(documents, (chunk,)) for chunk in chunks]
    bounds_k = [bounds_within(documents, ((a - n, b),)) for (a, b), n in zip(chunks, reach)]
    out = attend(
        *tensors,
        sink,
        torch.cat([bounds_q[0], bounds_q[1][1:] + length]),
        torch.cat([bounds_k[0], bounds_k[1][1:] + (reach[0] + length)]),
        min(max_seqlen, length),
        min(max_seqlen, length + max(reach)),
        **options,
    )
    return out.view(query.shape)


class HaloExchange(torch.autograd.Function):
    """key and value [2c, ...] of this rank to [halo, chunk, halo, chunk]."""

    @staticmethod
    def forward(ctx, key, value, cu_seqlens, window, group):
        plan = plan_of(key.shape[0], window, group.rank(), group.size())
        ctx.plan, ctx.cu_seqlens, ctx.group = plan, cu_seqlens, group
        sent = [x[s.rows] for s in plan.sent for x in (key, value)]
        coming = all_to_all(
            torch.cat(sent) if sent else key[:0], plan.rows_sent, plan.rows_received, group
        )
        received = plan.unpack(coming.wait())
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
        going = [part[s] for s in plan.received for part in segments]
        coming = all_to_all(
            torch.cat(going) if going else grads[0][:0],
            plan.rows_received,
            plan.rows_sent,
            ctx.group,
        )
        totals = [torch.cat(pair) for pair in chunks]
        tails = [plan.tails(total) for total in totals]
        for s in plan.own:
            for kv in (0, 1):
                plan.tail_rows(tails[kv], s).add_(segments[kv][s])
        rows = coming.wait()
        for s in plan.sent:
            for kv in (0, 1):
                part, rows = rows.split([s.end - s.start, len(rows) - (s.end - s.start)])
                plan.tail_rows(tails[kv], s).add_(part)
        for total, tail in zip(totals, tails):
            plan.put_tails(total, tail)
        return (*totals, None, None, None)


@lru_cache(maxsize=64)
def plan_of(local: int, window: int, rank: int, cp: int) -> "_Plan":
    """The plan of a rank with so many tokens; the same for every layer and step."""
    return _Plan(local, window, rank, cp)


class _Plan:
    """Who sends which tokens to whom; the same on every rank.

    Attributes:
        halos: the segments of this rank's two halos.
        received: those of them that come from other ranks, by the rank that they come from.
        own: those that this rank holds itself.
        sent: segments of others' halos that this rank holds, by the rank that they go to.
        rows_sent, rows_received: rows a rank, of keys and values together.
    """

    def __init__(self, local: int, window: int, rank: int, cp: int):
        self.rank, self.length = rank, local // 2
        self.tokens, self.window = local * cp, window
        self.chunks = chunk_ranges(rank, cp, self.tokens)
        self.ranges = halo_ranges(rank, cp, self.tokens, window)
        everyone = [
            [s for halo in halo_segments(r, cp, self.tokens, window) for s in halo]
            for r in range(cp)
        ]
        self.halos = halo_segments(rank, cp, self.tokens, window)
        by_owner = [[s for s in everyone[rank] if s.owner == owner] for owner in range(cp)]
        by_reader = [[s for s in segments if s.owner == rank] for segments in everyone]
        self.own, by_owner[rank], by_reader[rank] = by_owner[rank], [], []
        self.received = [s for segments in by_owner for s in segments]
        self.sent = [s for segments in by_reader for s in segments]
        self.rows_received = [_rows(segments) for segments in by_owner]
        self.rows_sent = [_rows(segments) for segments in by_reader]
        self.tail = min(self.length, window - 1)

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
        """Zero the gradients of documents that end before the chunk: no query was there.

        A kernel works document by document; one without a query is a case that it may leave
        unwritten.
        """
        for index, (start, end) in enumerate(self.ranges):
            positions = torch.arange(start, end, device=cu_seqlens.device)
            begun = cu_seqlens.masked_fill(cu_seqlens > end, 0).amax()
            halos[index] = halos[index].masked_fill((positions < begun)[:, None, None], 0)

    def tails(self, total: Tensor) -> list[Tensor]:
        """The ends of the two chunks, which are all that others' halos reach into, in fp32."""
        dtype = torch.float64 if total.dtype == torch.float64 else torch.float32
        return [chunk[self.length - self.tail :].to(dtype, copy=True) for chunk in total.chunk(2)]

    def tail_rows(self, tails: list[Tensor], s: Segment) -> Tensor:
        """A segment that this rank holds, within the tails."""
        which = s.start // self.length
        skipped = (which + 1) * self.length - self.tail
        return tails[which][s.start - skipped : s.end - skipped]

    def put_tails(self, total: Tensor, tails: list[Tensor]) -> None:
        for chunk, tail in zip(total.chunk(2), tails):
            chunk[self.length - self.tail :] = tail


def _rows(segments: list[Segment]) -> int:
    return 2 * sum(s.end - s.start for s in segments)
