# Copyright (c) 2026, the megatron-core gptoss authors.

"""Causal attention with a learnable sink per head, on the fastest kernel of the machine.

api.py               sink_attention(), available_backends(); check_arguments.py: their checks
attention_params.py  one call without its tensors
attend.py            one call on one rank; context_parallel/: over the ranks of a group
ops.py               forward and backward as custom operators of PyTorch
rescale.py           applying sinks to (out, lse); rescale_triton.py: its kernels
registry.py          the backends and their selection; measured_order.py: the order of "auto"
backends/            one file per kernel
packed.py            documents in a sequence that context parallelism splits
sink_dot_product_attention.py  the core attention of a layer spec
megatron_module.py   maps arguments and config of DotProductAttention to sink_attention()
"""

from megatron.core.transformer.sink_attention.api import available_backends, sink_attention
from megatron.core.transformer.sink_attention.check_arguments import check_cu_seqlens

__all__ = ["available_backends", "check_cu_seqlens", "sink_attention"]
