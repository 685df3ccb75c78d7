# Copyright (c) 2026, the megatron-core gptoss authors.

"""Causal attention with a learnable sink, on whichever kernel the machine has.

api.py          the public function and the checks of its arguments
attend.py       one call on this rank; context_parallel/: on the ranks of a group
ops.py          forward and backward as operators of PyTorch
rescale.py      the mathematics of the sink: pure functions on (out, lse)
registry.py     which backend can run what; autotable.py: which one "auto" takes
backends/       one file a kernel
"""

from megatron.core.transformer.sink_attention.api import (
    available_backends,
    check_cu_seqlens,
    sink_attention,
)

__all__ = ["available_backends", "check_cu_seqlens", "sink_attention"]
