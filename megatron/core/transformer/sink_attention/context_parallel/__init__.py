# Copyright (c) 2026, the megatron-core gptoss authors.

"""Attention over a context parallel group, and the layout of its tokens.

attention.py         one call: compare the ranks, select a scheme, run it
layout.py            Megatron's zigzag: which tokens a rank holds
chunk_attention.py   attention between chunks of the sequence, and merging of partial results
all_gather.py, ring.py, ulysses.py, halo.py    the schemes
choose.py            which scheme a call takes
collectives.py       communication; rank_consistency.py: do the ranks make the same call
"""

from megatron.core.transformer.sink_attention.context_parallel.attention import (
    context_parallel_attention,
)
from megatron.core.transformer.sink_attention.context_parallel.collectives import count_traffic
from megatron.core.transformer.sink_attention.context_parallel.halo import halo_bytes
from megatron.core.transformer.sink_attention.context_parallel.layout import (
    chunk_length,
    chunk_ranges,
    from_zigzag,
    global_positions,
    group_rank,
    group_size,
    local_tokens,
    to_zigzag,
)

__all__ = [
    "chunk_length",
    "chunk_ranges",
    "context_parallel_attention",
    "count_traffic",
    "from_zigzag",
    "global_positions",
    "group_rank",
    "group_size",
    "halo_bytes",
    "local_tokens",
    "to_zigzag",
]
