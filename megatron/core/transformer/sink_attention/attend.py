# Copyright (c) 2026, the megatron-core gptoss authors.

"""Attention on this rank: select a backend and run it."""

from dataclasses import replace

import torch
from torch import Tensor

from megatron.core.transformer.sink_attention import registry
from megatron.core.transformer.sink_attention.attention_params import AttentionParams
from megatron.core.transformer.sink_attention.ops import forward_op


def attend(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, params: AttentionParams
) -> Tensor:
    """`sink_attention` on one rank, without checks; lengths of queries and keys may differ.

    Causal from the bottom right: the last query of a document is aligned with its last key, as for
    a chunk of queries against the keys from the beginning of its document to its own end. The
    output of a query that sees no key is 0.
    """
    if query.numel() == 0:
        params = replace(params, backend=registry.REFERENCE)
    elif not torch.compiler.is_compiling():  # in compiled code the operator selects
        params = replace(params, backend=registry.select_backend(params).name)
    backend = registry.BACKENDS.get(params.backend)
    if backend is None or not backend.differentiable:
        return forward_op(query, key, value, sinks, *params.flatten())[0]
    batch_first = [x.transpose(0, 1) if x.dim() == 4 else x for x in (query, key, value)]
    out = backend.attend(*batch_first, sinks, params)
    return out.transpose(0, 1).contiguous() if out.dim() == 4 else out.contiguous()


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the dtype of autocast, where it is enabled; fp64 stays."""
    device = tensors[0].device.type
    if tensors[0].dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(tensor.to(dtype) for tensor in tensors)
