# Copyright (c) 2026, the megatron-core gptoss authors.

"""The public function, and the checks of its arguments."""

from typing import Sequence

import torch
from torch import Tensor

from megatron.core.transformer.sink_attention import registry
from megatron.core.transformer.sink_attention.attend import attend
from megatron.core.transformer.sink_attention.attention_params import Case
from megatron.core.transformer.sink_attention.context_parallel import (
    context_parallel_attention,
    group_size,
)
from megatron.core.transformer.sink_attention.context_parallel.choose import check_comm_type
from megatron.core.transformer.sink_attention.context_parallel.layout import Group, chunk_length


def sink_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sink: Tensor | None = None,
    *,
    scale: float | None = None,
    window: int | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    cp_group: Group | None = None,
    cp_comm_type: str = "auto",
    backend: str = "auto",
    deterministic: bool = False,
) -> Tensor:
    """Causal attention, with a learnable sink in the softmax if one is given.

    Nothing is read back from a GPU, in the forward or the backward, so that a CUDA graph can be
    captured; for the same reason the values of cu_seqlens are checked on the CPU only. Call
    `check_cu_seqlens` for tensors on a GPU whose origin you do not trust.

    Args:
        query: [s, b, np, hn], or packed [t, np, hn] with cu_seqlens; bf16, fp16, fp32 or fp64.
        key, value: [s, b, ng, hn] or [t, ng, hn]; np a multiple of ng. In a dense batch they may
            be longer than the query: the last query then stands at the last key (a KV cache).
        sink: [np], any float type: one logit a query head of this rank.
        scale: of the scores; 1/sqrt(hn) by default.
        window: keys that a query sees, itself included; Hugging Face's sliding_window. All by
            default.
        cu_seqlens: [documents + 1] int32, on the device of query: where each document begins, and
            t at the end.
        max_seqlen: tokens of the longest document, a Python int. Read from cu_seqlens on the CPU;
            t if left out on a GPU, which is right, and slower with many documents on some kernels.
        cp_group: context parallel group. Query, key and value then are this rank's tokens in
            Megatron's zigzag of the whole sequence (the whole pack): 2*cp chunks, rank r holds
            chunks r and 2*cp-1-r (`context_parallel.local_tokens`); cu_seqlens and max_seqlen are
            of the whole. Or two groups, [a2a, p2p], as Megatron's hierarchical ones.
        cp_comm_type: how the group exchanges: "all_gather", "p2p", "a2a", with two groups
            "a2a+p2p"; "auto" by measurement. With a window: only the halo, whatever is asked for.
        backend: "auto" for the fastest by measurement, or a name of `available_backends`.
        deterministic: the same bits of every gradient in every run.
    Returns:
        In shape and dtype of query, contiguous. Under autocast: in autocast's dtype. The gradient
        of sink is that of this rank's tokens (or heads): summing it over the group is the task of
        Megatron's gradient reduction over data and context parallel ranks.
    Raises:
        ValueError: an argument is wrong, or the backend cannot run the call; says what came and
            what is wanted.
        RuntimeError: the ranks of cp_group call with different shapes or options.
    """
    check_comm_type(cp_comm_type, cp_group)
    check_tensors(query, key, value, sink)
    check_window(window)
    ranks = group_size(cp_group)
    tokens = query.shape[0] * ranks
    if ranks > 1:
        chunk_length(tokens, ranks)
        check_no_cache(query, key)
    if cu_seqlens is not None or query.dim() == 3:
        check_packed(query, key, cu_seqlens, max_seqlen)
        if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
            check_cu_seqlens(cu_seqlens, tokens)
            longest = int((cu_seqlens[1:] - cu_seqlens[:-1]).max())
            if max_seqlen is not None and max_seqlen < longest:
                raise ValueError(
                    f"max_seqlen: {max_seqlen} is less than the longest document, {longest} tokens."
                )
            max_seqlen = longest
        elif max_seqlen is None:
            max_seqlen = tokens
        lengths = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    else:
        check_dense(query, key, max_seqlen)
        lengths = (None, None, query.shape[0], key.shape[0])
    if ranks > 1:
        return context_parallel_attention(
            query,
            key,
            value,
            sink,
            cp_group,
            cp_comm_type,
            scale=scale,
            window=window,
            cu_seqlens=cu_seqlens,
            max_seqlen=tokens if cu_seqlens is None else max_seqlen,
            backend=backend,
            deterministic=deterministic,
        )
    return attend(
        query,
        key,
        value,
        sink,
        *lengths,
        scale=scale,
        window=window,
        same_lengths=query.shape[0] == key.shape[0],
        backend=backend,
        deterministic=deterministic,
    )


def available_backends(
    query_shape: Sequence[int],
    key_shape: Sequence[int] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str | None = None,
    *,
    window: int | None = None,
    deterministic: bool = False,
) -> dict[str, str | None]:
    """Which backends can run a call.

    Args:
        query_shape: (s, b, np, hn), or (t, np, hn) for packed sequences.
        key_shape: of key and value; the query's by default.
        dtype: of the tensors.
        device: of the tensors; CUDA by default where there is one.
        window, deterministic: as in `sink_attention`.
    Returns:
        The name of every backend, with None if it can run the call, else the reason why it cannot
        in one sentence.
    """
    key_shape = query_shape if key_shape is None else key_shape
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    packed = len(query_shape) == 3
    if window is not None and window >= key_shape[0]:
        window = None
    return registry.why_not(
        Case(
            device=torch.device(device),
            dtype=dtype,
            batch=1 if packed else query_shape[1],
            seqlen_q=query_shape[0],
            seqlen_k=key_shape[0],
            num_heads=query_shape[-2],
            num_kv_heads=key_shape[-2],
            head_dim=query_shape[-1],
            window=window,
            packed=packed,
            same_lengths=query_shape[0] == key_shape[0],
            deterministic=deterministic,
        )
    )


def check_cu_seqlens(cu_seqlens: Tensor, tokens: int) -> None:
    """Check the values of cu_seqlens. On a GPU this waits for the device.

    Raises:
        ValueError: they do not begin with 0, descend somewhere, or do not end with `tokens`.
    """
    values = cu_seqlens.tolist()
    if values[0] != 0:
        raise ValueError(f"cu_seqlens: begins with {values[0]}; wanted 0.")
    for index, (before, after) in enumerate(zip(values, values[1:])):
        if after < before:
            raise ValueError(
                f"cu_seqlens: element {index + 1} is {after}, less than {before} before it; wanted "
                "ascending values."
            )
    if values[-1] != tokens:
        raise ValueError(
            f"cu_seqlens: ends with {values[-1]}; wanted the number of tokens, {tokens}."
        )


def check_tensors(query: Tensor, key: Tensor, value: Tensor, sink: Tensor | None) -> None:
    """Shapes, dtypes and devices of the four tensors."""
    if query.dim() not in (3, 4):
        raise ValueError(
            f"query: has {query.dim()} dimensions, {_shape(query)}; wanted [s, b, np, hn], or "
            "[t, np, hn] with cu_seqlens."
        )
    if not query.dtype.is_floating_point or query.dtype.itemsize < 2:
        raise ValueError(f"query: is {query.dtype}; wanted bf16, fp16, fp32 or fp64.")
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dim() != query.dim():
            raise ValueError(
                f"{name}: has {tensor.dim()} dimensions, {_shape(tensor)}; wanted {query.dim()} as "
                f"query {_shape(query)} has."
            )
        if tensor.dtype != query.dtype:
            raise ValueError(f"{name}: is {tensor.dtype}; wanted {query.dtype} as query is.")
        if tensor.device != query.device:
            raise ValueError(f"{name}: is on {tensor.device}; wanted {query.device} as query is.")
    if value.shape != key.shape:
        raise ValueError(f"value: is {_shape(value)}; wanted {_shape(key)} as key is.")
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(f"key: head dim is {key.shape[-1]}; wanted {query.shape[-1]} as in query.")
    heads, groups = query.shape[-2], key.shape[-2]
    if groups == 0 or heads % groups:
        raise ValueError(f"key: has {groups} heads; wanted a divisor of query's {heads}.")
    if sink is None:
        return
    if tuple(sink.shape) != (heads,):
        raise ValueError(
            f"sink: is {_shape(sink)}; wanted [{heads}], one value a query head of this rank."
        )
    if not sink.dtype.is_floating_point:
        raise ValueError(f"sink: is {sink.dtype}; wanted a float type.")
    if sink.device != query.device:
        raise ValueError(f"sink: is on {sink.device}; wanted {query.device} as query is.")


def check_dense(query: Tensor, key: Tensor, max_seqlen: int | None) -> None:
    """Lengths and batch of [s, b, np, hn]."""
    if max_seqlen is not None:
        raise ValueError("max_seqlen: is for packed sequences; give cu_seqlens too, or drop it.")
    if key.shape[1] != query.shape[1]:
        raise ValueError(f"key: batch is {key.shape[1]}; wanted {query.shape[1]} as in query.")
    if key.shape[0] < query.shape[0]:
        raise ValueError(
            f"key: has {key.shape[0]} tokens; wanted at least query's {query.shape[0]}."
        )


def check_packed(
    query: Tensor, key: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None
) -> None:
    """What packed sequences need, values of cu_seqlens left aside."""
    if cu_seqlens is None:
        raise ValueError(
            f"cu_seqlens: is missing; query {_shape(query)} has 3 dimensions, which are packed "
            "sequences. Give cu_seqlens, or a query [s, b, np, hn]."
        )
    if query.dim() != 3:
        raise ValueError(
            f"query: is {_shape(query)} with cu_seqlens; wanted packed [t, np, hn] (micro batch 1)."
        )
    if key.shape[0] != query.shape[0]:
        raise ValueError(f"key: has {key.shape[0]} tokens; wanted {query.shape[0]} as in query.")
    if cu_seqlens.dtype != torch.int32:
        raise ValueError(f"cu_seqlens: is {cu_seqlens.dtype}; wanted torch.int32.")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
        raise ValueError(
            f"cu_seqlens: is {_shape(cu_seqlens)}; wanted [documents + 1], at least 2 elements."
        )
    if cu_seqlens.device != query.device:
        raise ValueError(
            f"cu_seqlens: is on {cu_seqlens.device}; wanted {query.device} as query is."
        )
    if not cu_seqlens.is_contiguous():
        raise ValueError(f"cu_seqlens: has stride {cu_seqlens.stride(0)}; wanted it contiguous.")
    if max_seqlen is not None and (isinstance(max_seqlen, Tensor) or max_seqlen < 1):
        raise ValueError(f"max_seqlen: is {max_seqlen!r}; wanted a positive Python int.")


def check_window(window: int | None) -> None:
    """A window holds the query's own key at least."""
    if window is not None and (isinstance(window, (bool, Tensor, tuple, list)) or window < 1):
        raise ValueError(
            f"window: is {window!r}; wanted the number of keys that a query sees, itself included, "
            "at least 1, or None."
        )


def check_no_cache(query: Tensor, key: Tensor) -> None:
    """Under context parallelism queries and keys are the same tokens."""
    if key.shape[0] != query.shape[0]:
        raise ValueError(
            f"key: has {key.shape[0]} tokens with a cp_group; wanted {query.shape[0]} as in query."
        )


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))
