# Copyright (c) 2026, the megatron-core gptoss authors.

"""Attention over a context parallel group, and the layout of its tokens.

attention.py    one call: checked, an exchange chosen, run
layout.py       the zigzag of Megatron: which tokens a rank holds
pieces.py       attention between parts of the sequence; merging
all_gather.py, ring.py, ulysses.py, halo.py     the exchanges
choose.py       which of them a call takes
collectives.py  what they send with; matching.py: whether the ranks agree
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
