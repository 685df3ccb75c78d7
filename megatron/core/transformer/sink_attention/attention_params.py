# Copyright (c) 2026, the megatron-core gptoss authors.

"""What one call asks for, in two parts: what decides the kernel, and what the kernel is given."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """What a backend must know to say whether it can run.

    Attributes:
        batch: sequences of a dense batch; 1 when packed.
        seqlen_q, seqlen_k: tokens of a sequence; of the whole pack when packed.
        window: keys that a query sees, itself included; None for all.
        packed: documents of a [t, np, hn] tensor, bounded by cu_seqlens.
        same_lengths: every query sequence is as long as its key sequence. If not, the last query
            stands at the last key (bottom-right), and a packed query may see no key at all.
        causal: False for queries that see every key of their document, without a window: a piece
            of attention under context parallelism.
    """

    device: torch.device
    dtype: torch.dtype
    batch: int
    seqlen_q: int
    seqlen_k: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None = None
    packed: bool = False
    same_lengths: bool = True
    deterministic: bool = False
    causal: bool = True

    @property
    def capability(self) -> tuple[int, int]:
        """Compute capability; (0, 0) off CUDA."""
        if self.device.type != "cuda":
            return (0, 0)
        return torch.cuda.get_device_capability(self.device)

    @property
    def kind(self) -> str:
        """The case's name in the table of "auto"."""
        mask = "causal" if self.window is None else "window"
        return f"packed_{mask}" if self.packed else mask


class Call(NamedTuple):
    """What a kernel gets beside q, k, v.

    cu_seqlens_q and cu_seqlens_k are None for a dense batch; max_seqlen_q and max_seqlen_k are
    upper bounds on the host.
    """

    scale: float
    window: int | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int
    deterministic: bool
    same_lengths: bool
    causal: bool = True

    @property
    def packed(self) -> bool:
        return self.cu_seqlens_q is not None

    @property
    def left(self) -> int:
        """Keys before the query's own in the window, -1 for all: flash-attention's convention."""
        return -1 if self.window is None else self.window - 1

    @property
    def right(self) -> int:
        """Keys after the query's own in the window, -1 for all: 0, or no mask at all."""
        return 0 if self.causal else -1


def case_of(query: Tensor, key: Tensor, call: Call) -> Case:
    """The facts of a call that decide the backend."""
    return Case(
        device=query.device,
        dtype=query.dtype,
        batch=1 if call.packed else query.shape[1],
        seqlen_q=query.shape[0],
        seqlen_k=key.shape[0],
        num_heads=query.shape[-2],
        num_kv_heads=key.shape[-2],
        head_dim=query.shape[-1],
        window=call.window,
        packed=call.packed,
        same_lengths=call.same_lengths,
        deterministic=call.deterministic,
        causal=call.causal,
    )
