# Copyright (c) 2026, the megatron-core gptoss authors.

"""One call of attention over the ranks of a context parallel group."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core.transformer.sink_attention.attend import attend
from megatron.core.transformer.sink_attention.attention_params import AttentionParams
from megatron.core.transformer.sink_attention.context_parallel.all_gather import (
    AllGatherAttention,
)
from megatron.core.transformer.sink_attention.context_parallel.choose import choose_scheme
from megatron.core.transformer.sink_attention.context_parallel.chunk_attention import (
    ChunkAttention,
)
from megatron.core.transformer.sink_attention.context_parallel.halo import halo_attention
from megatron.core.transformer.sink_attention.context_parallel.layout import Group
from megatron.core.transformer.sink_attention.context_parallel.rank_consistency import (
    check_ranks_match,
    contents,
)
from megatron.core.transformer.sink_attention.context_parallel.ring import RingAttention
from megatron.core.transformer.sink_attention.context_parallel.ulysses import (
    kv_copies,
    ulysses_attention,
)


@torch.compiler.disable
def context_parallel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    params: AttentionParams,
    group: Group,
    comm_type: str,
) -> Tensor:
    """`sink_attention` of the tokens of this rank, its arguments checked.

    Args:
        params: cu_seqlens and max_seqlen describe the complete sequence; max_seqlen is its length
            in a dense batch.
    """
    name, left = choose_scheme(query, key, params, group, comm_type)
    levels = [group] if isinstance(group, ProcessGroup) else group
    if name in ("a2a", "a2a+p2p"):
        kv_copies(query.shape[-2], key.shape[-2], levels[0].size())
    arguments = _arguments(query, key, sinks, params, name)
    for level in levels:
        if level.size() > 1:
            check_ranks_match(arguments, query.device, level)
    if query.numel() == 0:
        return query
    return _scheme(name, left, params, levels).apply(query, key, value, sinks)


def _arguments(query, key, sinks, params: AttentionParams, scheme: str) -> dict:
    """What the ranks must agree on; the documents only on the CPU, where reading them is free."""
    arguments = dict(
        query=(list(query.shape), query.dtype),
        key=(list(key.shape), key.dtype),
        window_size=params.window_size,
        softmax_scale=params.softmax_scale,
        scheme=scheme,
        sinks=sinks is not None,
        deterministic=params.deterministic,
        packed=params.packed,
    )
    if query.device.type == "cpu":
        arguments.update(cu_seqlens=contents(params.cu_seqlens_q), max_seqlen=params.max_seqlen_q)
    return arguments


class Scheme(Protocol):
    """Attention over one group."""

    def apply(self, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None) -> Tensor:
        """Output for the query tokens of this rank, in the shape of query."""


def _scheme(name: str, left: int | None, params: AttentionParams, levels) -> Scheme:
    """The scheme of a name, with the halo's `left` keys before each chunk."""
    if name == "a2a+p2p":
        outer = _scheme("p2p" if left is None else "halo", left, params, levels[1:])
        return outer if levels[0].size() == 1 else Ulysses(levels[0], outer)
    if levels[0].size() == 1:
        return OneRank(params)
    if name == "a2a":
        return Ulysses(levels[0], OneRank(params))
    if name == "halo":
        return Halo(params, left, levels[0])
    return Chunks(AllGatherAttention if name == "all_gather" else RingAttention, params, levels[0])


@dataclass(frozen=True)
class OneRank:
    """The complete sequence of some heads on this rank."""

    params: AttentionParams

    def apply(self, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None) -> Tensor:
        return attend(query, key, value, sinks, self.params.with_tensors(query, key))


@dataclass(frozen=True)
class Halo:
    """Exchange of the `left` keys and values before each chunk."""

    params: AttentionParams
    left: int
    group: ProcessGroup

    def apply(self, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None) -> Tensor:
        return halo_attention(query, key, value, sinks, self.params, self.left, self.group)


@dataclass(frozen=True)
class Chunks:
    """Chunks of queries against chunks of keys, which are gathered or passed around the ring."""

    function: type[torch.autograd.Function]
    params: AttentionParams
    group: ProcessGroup

    def apply(self, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None) -> Tensor:
        kernels = ChunkAttention(self.params)
        return self.function.apply(query, key, value, sinks, kernels, self.group)


@dataclass(frozen=True)
class Ulysses:
    """All-to-all from tokens to heads, `inner` on all tokens of the group, all-to-all back."""

    group: ProcessGroup
    inner: Scheme

    def apply(self, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None) -> Tensor:
        return ulysses_attention(query, key, value, sinks, self.group, self.inner.apply)
