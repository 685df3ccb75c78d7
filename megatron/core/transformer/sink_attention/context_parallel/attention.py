# Copyright (c) 2026, the megatron-core gptoss authors.

"""One call of attention over the ranks of a context parallel group: checked, chosen, run."""

import math

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core.transformer.sink_attention.attend import attend, autocast
from megatron.core.transformer.sink_attention.context_parallel.all_gather import (
    AllGatherAttention,
)
from megatron.core.transformer.sink_attention.context_parallel.choose import (
    choose_exchange,
)
from megatron.core.transformer.sink_attention.context_parallel.chunk_attention import PieceAttention
from megatron.core.transformer.sink_attention.context_parallel.halo import halo_attention
from megatron.core.transformer.sink_attention.context_parallel.layout import (
    Group,
    group_size,
)
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
    sink: Tensor | None,
    group: Group,
    comm_type: str,
    *,
    scale: float | None = None,
    window: int | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int,
    backend: str = "auto",
    deterministic: bool = False,
) -> Tensor:
    """`sink_attention` of the tokens of this rank, its arguments checked.

    Args:
        cu_seqlens, max_seqlen: of the whole sequence; max_seqlen is its length in a dense batch.
    """
    query, key, value = autocast(query, key, value)
    ranks, packed = group_size(group), cu_seqlens is not None
    nested = not isinstance(group, ProcessGroup)
    scheme, reach = choose_exchange(
        query, key, group, comm_type, window=window, packed=packed, max_seqlen=max_seqlen
    )
    if scheme in ("a2a", "a2a+p2p"):
        kv_copies(query.shape[-2], key.shape[-2], group[0].size() if nested else ranks)
    facts = dict(
        query=(list(query.shape), query.dtype),
        key=(list(key.shape), key.dtype),
        window=window,
        scale=scale,
        scheme=scheme,
        sink=sink is not None,
        deterministic=deterministic,
        packed=packed,
    )
    if query.device.type == "cpu":
        facts.update(cu_seqlens=contents(cu_seqlens), max_seqlen=max_seqlen)
    for level in group if nested else [group]:
        if level.size() > 1:
            check_ranks_match(facts, query.device, level)
    if query.numel() == 0:
        return query

    options = dict(scale=scale, backend=backend, deterministic=deterministic)

    def run(scheme: str, group: ProcessGroup | None):
        """Attention over one group, as a function of q, k, v, sink."""
        if group is None or group.size() == 1:
            lengths = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
            return lambda *tensors: attend(
                *tensors, *lengths, window=window, same_lengths=True, **options
            )
        if scheme == "halo":
            documents = dict(cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
            return lambda *tensors: halo_attention(
                *tensors, group, window=reach, **documents, **options
            )
        kernels = PieceAttention(
            1.0 / math.sqrt(query.shape[-1]) if scale is None else float(scale),
            cu_seqlens,
            max_seqlen,
            backend,
            deterministic,
        )
        function = AllGatherAttention if scheme == "all_gather" else RingAttention
        return lambda *tensors: function.apply(*tensors, kernels, group)

    if scheme == "a2a":
        return ulysses_attention(query, key, value, sink, group, run(scheme, None))
    if scheme == "a2a+p2p":
        outer = run("p2p" if reach is None else "halo", group[1])
        if group[0].size() == 1:
            return outer(query, key, value, sink)
        return ulysses_attention(query, key, value, sink, group[0], outer)
    return run(scheme, group)(query, key, value, sink)
