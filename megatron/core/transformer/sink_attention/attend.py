# Copyright (c) 2026, the megatron-core gptoss authors.

"""Attention on this rank: the call is put together, a backend chosen and run."""

import math

import torch
from torch import Tensor

from megatron.core.transformer.sink_attention import registry
from megatron.core.transformer.sink_attention.attention_params import Call, case_of
from megatron.core.transformer.sink_attention.ops import forward_op


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sink: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    scale: float | None = None,
    window: int | None = None,
    same_lengths: bool = False,
    backend: str = "auto",
    deterministic: bool = False,
) -> Tensor:
    """`sink_attention` without the checks, and with queries and keys of their own lengths.

    For context parallelism: a chunk of queries against the keys from its document's beginning to
    its own end. Causal from the bottom right: the last query of a document stands at its last key.
    A query that sees no key gives 0.
    """
    query, key, value = autocast(query, key, value)
    if window is not None and window >= max_seqlen_k:
        window = None
    call = Call(
        scale=1.0 / math.sqrt(query.shape[-1]) if scale is None else float(scale),
        window=window,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        deterministic=deterministic,
        same_lengths=same_lengths,
    )
    if query.numel() == 0:
        backend = "math"
    if not torch.compiler.is_compiling():  # the operator chooses where the compiler looks on
        backend = registry.choose(case_of(query, key, call), backend).name
    if backend == "flex":
        first = [x.transpose(0, 1) if x.dim() == 4 else x for x in (query, key, value)]
        out = registry.BACKENDS["flex"].attend(*first, sink, call)
        return out.transpose(0, 1).contiguous() if out.dim() == 4 else out.contiguous()
    return forward_op(
        query,
        key,
        value,
        sink,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        call.scale,
        window,
        same_lengths,
        deterministic,
        backend,
    )[0]


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the dtype of autocast, where it is on; fp64 stays."""
    device = tensors[0].device.type
    if tensors[0].dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(tensor.to(dtype) for tensor in tensors)
