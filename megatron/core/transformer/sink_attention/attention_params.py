# Copyright (c) 2026, the megatron-core gptoss authors.

"""One attention call without its query, key and value: what selects the kernel, and its options."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

# (left, right) keys around the query's own, -1 for all of a side, as in flash-attn.
CAUSAL = (-1, 0)
NO_MASK = (-1, -1)

# The options of a call, with their types in the schema of a custom operator, which takes no
# dataclass.
SCHEMA = {
    "cu_seqlens_q": "Tensor?",
    "cu_seqlens_k": "Tensor?",
    "max_seqlen_q": "SymInt",
    "max_seqlen_k": "SymInt",
    "softmax_scale": "float",
    "window_size": "int[]",
    "same_lengths": "bool",
    "deterministic": "bool",
    "backend": "str",
}


@dataclass(frozen=True)
class AttentionParams:
    """Properties of the tensors and options of one call; make it with `AttentionParams.of`.

    Calls that compare equal run on the same backend: cu_seqlens, max_seqlen and softmax_scale do
    not take part.

    Attributes:
        num_tokens_q, num_tokens_k: tokens of a sequence, or of all documents when packed.
        packed: the tensors are [t, np, hn], their documents bounded by cu_seqlens.
        window_size: (left, right) keys around the query's own, -1 for all. (-1, 0) is causal,
            (127, 0) a window of 128 keys, (-1, -1) no mask, which a chunk of context parallel
            attention has.
        same_lengths: every query sequence is as long as its key sequence. If not, the last query
            is aligned with the last key (bottom-right), and a packed query may see no key at all.
        deterministic: the backward gives the same bits in every run.
        backend: name of a backend, or "auto".
        softmax_scale: factor of the scores.
        max_seqlen_q, max_seqlen_k: upper bounds of the documents' lengths, Python ints; the
            sequence length of a dense batch.
        cu_seqlens_q, cu_seqlens_k: [documents + 1] int32; None for a dense batch.
    """

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    num_tokens_q: int
    num_tokens_k: int
    packed: bool = False
    window_size: tuple[int, int] = CAUSAL
    same_lengths: bool = True
    deterministic: bool = False
    backend: str = "auto"
    softmax_scale: float = field(default=1.0, compare=False)
    max_seqlen_q: int = field(default=0, compare=False)
    max_seqlen_k: int = field(default=0, compare=False)
    cu_seqlens_q: Tensor | None = field(default=None, compare=False, repr=False)
    cu_seqlens_k: Tensor | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(
        cls,
        query: Tensor,
        key: Tensor,
        *,
        softmax_scale: float | None = None,
        window_size: tuple[int, int] | None = None,
        cu_seqlens_q: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        **options,
    ) -> "AttentionParams":
        """The parameters of a call with these tensors, [s, b, np, hn] or packed [t, np, hn].

        Args:
            softmax_scale: 1 / sqrt(hn) by default.
            window_size: None for causal attention without a window. A window that covers all keys
                is none.
            max_seqlen_q, max_seqlen_k: the number of tokens by default.
            options: the other attributes that are no property of a tensor.
        """
        max_seqlen_k = key.shape[0] if max_seqlen_k is None else max_seqlen_k
        left, right = CAUSAL if window_size is None else window_size
        return cls(
            device=query.device,
            dtype=query.dtype,
            head_dim=query.shape[-1],
            num_tokens_q=query.shape[0],
            num_tokens_k=key.shape[0],
            packed=cu_seqlens_q is not None,
            window_size=(left if left + 1 < max_seqlen_k else -1, right),
            softmax_scale=(
                1.0 / math.sqrt(query.shape[-1]) if softmax_scale is None else softmax_scale
            ),
            max_seqlen_q=query.shape[0] if max_seqlen_q is None else max_seqlen_q,
            max_seqlen_k=max_seqlen_k,
            cu_seqlens_q=cu_seqlens_q,
            **options,
        )

    @classmethod
    def of_shapes(
        cls,
        query_shape: Sequence[int],
        key_shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device | str,
        **options,
    ) -> "AttentionParams":
        """The parameters of a call that has no tensors yet; a query shape of 3 sizes is packed."""
        query, key = (torch.empty(s, dtype=dtype, device="meta") for s in (query_shape, key_shape))
        options.setdefault("same_lengths", query_shape[0] == key_shape[0])
        params = cls.of(query, key, **options)
        return replace(params, device=torch.device(device), packed=query.dim() == 3)

    def with_tensors(self, query: Tensor, key: Tensor, **changes) -> "AttentionParams":
        """The same options with other tensors, such as a chunk's under context parallelism."""
        return self.of(query, key, **{**dict(zip(SCHEMA, self.flatten())), **changes})

    def flatten(self) -> tuple:
        """The options in the order of SCHEMA."""
        return tuple([getattr(self, name) for name in SCHEMA])

    @classmethod
    def unflatten(cls, query: Tensor, key: Tensor, options: tuple) -> "AttentionParams":
        """The inverse of `flatten`."""
        return cls.of(query, key, **dict(zip(SCHEMA, options)))

    def without_cu_seqlens(self) -> "AttentionParams":
        """The same without tensors: a cache that holds it keeps no memory alive."""
        return replace(self, cu_seqlens_q=None, cu_seqlens_k=None) if self.packed else self

    @property
    def causal(self) -> bool:
        return self.window_size[1] == 0

    @property
    def has_window(self) -> bool:
        return self.window_size[0] >= 0

    @property
    def capability(self) -> tuple[int, int]:
        """Compute capability of the device; (0, 0) without CUDA."""
        if self.device.type != "cuda":
            return (0, 0)
        return torch.cuda.get_device_capability(self.device)
