# Copyright (c) 2026, the megatron-core gptoss authors.

"""Megatron's zigzag: which tokens of the sequence a rank holds.

The sequence of t tokens (all documents, when packed) is split into 2*cp chunks. Rank r holds chunks
r and 2*cp-1-r, in that order: under a causal mask every rank then has the same FLOPs.

A group is a ProcessGroup, or the hierarchical pair [a2a, p2p] whose rank is
p2p.rank() * a2a.size() + a2a.rank().
"""

from typing import Sequence, Union

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

Group = Union[ProcessGroup, Sequence[ProcessGroup]]


def group_size(group: Group | None) -> int:
    """Number of ranks of a context parallel group; 1 for None."""
    if group is None:
        return 1
    if isinstance(group, ProcessGroup):
        return group.size()
    size = 1
    for level in group:
        size *= level.size()
    return size


def group_rank(group: Group | None) -> int:
    """This process' rank in a context parallel group."""
    if group is None:
        return 0
    if isinstance(group, ProcessGroup):
        return group.rank()
    rank, stride = 0, 1
    for level in group:
        rank += level.rank() * stride
        stride *= level.size()
    return rank


def chunk_length(tokens: int, cp: int) -> int:
    """Tokens of one of the 2*cp chunks.

    Raises:
        ValueError: the length is not divisible; the message has the next length that is.
    """
    parts = 1 if cp == 1 else 2 * cp
    if tokens % parts:
        raise ValueError(
            f"Sequence length {tokens} is not a multiple of 2 * context parallel size = {parts}. "
            f"Pad it to {-(-tokens // parts) * parts}."
        )
    return tokens // (2 * cp) if cp > 1 else tokens


def chunk_ranges(rank: int, cp: int, tokens: int) -> tuple[tuple[int, int], ...]:
    """Global ranges [start, end) of a rank's tokens, in their order on the rank.

    Two, ascending; one range of all tokens with cp 1.
    """
    length = chunk_length(tokens, cp)
    if cp == 1:
        return ((0, tokens),)
    return tuple((chunk * length, (chunk + 1) * length) for chunk in (rank, 2 * cp - 1 - rank))


def global_positions(
    rank: int, cp: int, tokens: int, device: torch.device | str | None = None
) -> Tensor:
    """Positions of a rank's tokens in the sequence, [tokens / cp] int64."""
    ranges = chunk_ranges(rank, cp, tokens)
    return torch.cat([torch.arange(*bounds, device=device) for bounds in ranges])


def local_tokens(x: Tensor, group: Group | None, dim: int = 0) -> Tensor:
    """This rank's part of a tensor that holds the complete sequence along `dim`.

    Differentiable. x itself with one rank.
    """
    cp = group_size(group)
    if cp == 1:
        return x
    ranges = chunk_ranges(group_rank(group), cp, x.shape[dim])
    return torch.cat([x.narrow(dim, start, end - start) for start, end in ranges], dim)


def to_zigzag(x: Tensor, cp: int, dim: int = 0) -> Tensor:
    """Reorder the sequence along `dim` to the concatenation of the parts of rank 0, rank 1, ..."""
    return _chunks(x, [c for rank in range(cp) for c in (rank, 2 * cp - 1 - rank)], cp, dim)


def from_zigzag(x: Tensor, cp: int, dim: int = 0) -> Tensor:
    """Reorder the concatenation of the parts of rank 0, rank 1, ... to the sequence along `dim`."""
    places = [2 * c if c < cp else 2 * (2 * cp - 1 - c) + 1 for c in range(2 * cp)]
    return _chunks(x, places, cp, dim)


def _chunks(x: Tensor, order: list[int], cp: int, dim: int) -> Tensor:
    if cp == 1:
        return x
    chunks = x.split(chunk_length(x.shape[dim], cp), dim)
    return torch.cat([chunks[c] for c in order], dim)
