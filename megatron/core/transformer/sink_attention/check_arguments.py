# Copyright (c) 2026, the megatron-core gptoss authors.

"""Checks of the arguments of `sink_attention`.

Each raises a ValueError that names the argument, what was given and what is wanted.
"""

import torch
from torch import Tensor

from megatron.core.transformer.sink_attention.context_parallel.layout import chunk_length


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


def check_tensors(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None) -> None:
    """Check shapes, dtypes and devices of the four tensors."""
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
    if sinks is None:
        return
    if tuple(sinks.shape) != (heads,):
        raise ValueError(
            f"sinks: is {_shape(sinks)}; wanted [{heads}], one value per query head of this rank."
        )
    if not sinks.dtype.is_floating_point:
        raise ValueError(f"sinks: is {sinks.dtype}; wanted a float type.")
    if sinks.device != query.device:
        raise ValueError(f"sinks: is on {sinks.device}; wanted {query.device} as query is.")


def check_lengths(
    query: Tensor, key: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None, cp_size: int
) -> int | None:
    """Check lengths and documents of query and key.

    Args:
        cp_size: ranks that hold the sequence; query holds 1 / cp_size of its tokens.
    Returns:
        max_seqlen of packed sequences: of the longest document on the CPU, an upper bound on a GPU.
        The number of tokens of a dense batch.
    """
    tokens = query.shape[0] * cp_size
    if cp_size > 1:
        chunk_length(tokens, cp_size)
        check_no_cache(query, key)
    if cu_seqlens is None and query.dim() == 4:
        check_dense(query, key, max_seqlen)
        return tokens
    check_packed(query, key, cu_seqlens, max_seqlen)
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return tokens if max_seqlen is None else max_seqlen
    check_cu_seqlens(cu_seqlens, tokens)
    longest = int((cu_seqlens[1:] - cu_seqlens[:-1]).max())
    if max_seqlen is not None and max_seqlen < longest:
        raise ValueError(
            f"max_seqlen: {max_seqlen} is less than the longest document, {longest} tokens."
        )
    return longest


def check_dense(query: Tensor, key: Tensor, max_seqlen: int | None) -> None:
    """Check lengths and batch of [s, b, np, hn]."""
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
    """Check packed sequences, except for the values of cu_seqlens."""
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


def check_window_size(window_size: tuple[int, int] | None) -> None:
    """Check (left, right): attention is causal, so right is 0, or -1 for no bound of its own."""
    if window_size is None:
        return
    pair = tuple(window_size) if isinstance(window_size, (tuple, list)) else ()
    is_int = [isinstance(size, int) and not isinstance(size, bool) for size in pair]
    if is_int != [True, True] or pair[0] < -1 or pair[1] not in (-1, 0):
        raise ValueError(
            f"window_size: is {window_size!r}; wanted (left, 0), with the number of keys before "
            "the query's own, -1 for all, or None. Hugging Face's sliding_window of 128 is (127, 0)."
        )


def check_no_cache(query: Tensor, key: Tensor) -> None:
    """Check that queries and keys are the same tokens, as context parallelism needs."""
    if key.shape[0] != query.shape[0]:
        raise ValueError(
            f"key: has {key.shape[0]} tokens with a cp_group; wanted {query.shape[0]} as in query."
        )


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))
