# Copyright (c) 2026, the megatron-core gptoss authors.

"""The public functions: `sink_attention` and `available_backends`."""

from typing import Sequence

import torch
from torch import Tensor

from megatron.core.transformer.sink_attention import registry
from megatron.core.transformer.sink_attention.attend import attend, autocast
from megatron.core.transformer.sink_attention.attention_params import CAUSAL, AttentionParams
from megatron.core.transformer.sink_attention.check_arguments import (
    check_lengths,
    check_tensors,
    check_window_size,
)
from megatron.core.transformer.sink_attention.context_parallel import (
    context_parallel_attention,
    group_size,
)
from megatron.core.transformer.sink_attention.context_parallel.choose import check_comm_type
from megatron.core.transformer.sink_attention.context_parallel.layout import Group


def sink_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None = None,
    *,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    cp_group: Group | None = None,
    cp_comm_type: str = "auto",
    backend: str = "auto",
    deterministic: bool = False,
) -> Tensor:
    """Causal attention, with a learnable sink per head in the softmax if sinks are given.

    Forward and backward never wait for a GPU, so a CUDA graph can capture them. For the same reason
    the values of cu_seqlens are checked on the CPU only. Call `check_cu_seqlens` for tensors on a
    GPU from a source that you do not trust.

    Args:
        query: [s, b, np, hn], or packed [t, np, hn] with cu_seqlens; bf16, fp16, fp32 or fp64.
        key, value: [s, b, ng, hn] or [t, ng, hn]; np a multiple of ng. In a dense batch they may
            be longer than the query: the last query is aligned with the last key (a KV cache).
        sinks: [np], any float type: one logit per query head of this rank.
        softmax_scale: factor of the scores; 1/sqrt(hn) by default.
        window_size: (left, right) keys around the query's own, as in Megatron and flash-attn.
            (127, 0) is Hugging Face's sliding_window of 128; a left of -1 is unbounded. Attention
            is causal: right is 0 (or -1, which means the same). None for no window.
        cu_seqlens: [documents + 1] int32, on the device of query: the start of each document, and
            t at the end.
        max_seqlen: tokens of the longest document, a Python int. By default read from cu_seqlens on
            the CPU, and t on a GPU, which some kernels run slower with many documents.
        cp_group: context parallel group. Query, key and value are then this rank's tokens in
            Megatron's zigzag of the complete (packed) sequence: 2*cp chunks, rank r holds chunks r
            and 2*cp-1-r (`context_parallel.local_tokens`). cu_seqlens and max_seqlen describe the
            complete sequence. Or two groups, [a2a, p2p], Megatron's hierarchical ones.
        cp_comm_type: communication in the group: "all_gather", "p2p", "a2a", with two groups
            "a2a+p2p"; "auto" for the fastest by measurement. A layer with a window exchanges only
            its halo, whatever the type.
        backend: "auto" for the fastest by measurement, or a name from `available_backends`.
        deterministic: the same bits of every gradient in every run.
    Returns:
        Shape and dtype of query, contiguous; under autocast the dtype of autocast. The gradient of
        sinks covers this rank's tokens (or heads): Megatron's gradient reduction over data and
        context parallel ranks sums it over the group.
    Raises:
        ValueError: an argument is wrong, or the backend cannot run the call.
        RuntimeError: the ranks of cp_group call with different shapes or options.
    """
    check_comm_type(cp_comm_type, cp_group)
    check_tensors(query, key, value, sinks)
    check_window_size(window_size)
    cp_size = group_size(cp_group)
    max_seqlen = check_lengths(query, key, cu_seqlens, max_seqlen, cp_size)
    query, key, value = autocast(query, key, value)
    params = AttentionParams.of(
        query,
        key,
        softmax_scale=softmax_scale,
        window_size=_causal(window_size),
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_k=max_seqlen if query.dim() == 3 or cp_size > 1 else key.shape[0],
        same_lengths=query.shape[0] == key.shape[0],
        deterministic=deterministic,
        backend=backend,
    )
    if cp_size > 1:
        return context_parallel_attention(query, key, value, sinks, params, cp_group, cp_comm_type)
    return attend(query, key, value, sinks, params)


def available_backends(
    query_shape: Sequence[int],
    key_shape: Sequence[int] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str | None = None,
    *,
    window_size: tuple[int, int] | None = None,
    deterministic: bool = False,
) -> dict[str, str | None]:
    """Which backends can run a call.

    Args:
        query_shape: (s, b, np, hn), or (t, np, hn) for packed sequences.
        key_shape: shape of key and value; that of the query by default.
        dtype: dtype of the tensors.
        device: device of the tensors; CUDA by default where there is one.
        window_size, deterministic: as in `sink_attention`.
    Returns:
        The name of every backend, with None if it can run the call, else the reason why not in one
        sentence.
    """
    params = AttentionParams.of_shapes(
        query_shape,
        query_shape if key_shape is None else key_shape,
        dtype,
        ("cuda" if torch.cuda.is_available() else "cpu") if device is None else device,
        window_size=_causal(window_size),
        deterministic=deterministic,
    )
    return registry.unsupported_reasons(params)


def _causal(window_size: tuple[int, int] | None) -> tuple[int, int]:
    """The window with the causal mask in it."""
    return CAUSAL if window_size is None else (window_size[0], 0)
