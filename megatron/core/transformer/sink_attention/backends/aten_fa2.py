# Copyright (c) 2026, the megatron-core gptoss authors.

"""FlashAttention 2 as PyTorch ships it.

`torch.nn.attention.varlen.varlen_attn` is the public door to the same kernel; its backward takes
no lse but its own, so the operators below it are called (their leading arguments are the same in
PyTorch 2.5 to 2.13). Where `torch.nn.attention.activate_flash_attention_impl` has put another
FlashAttention under these operators, that one runs.
"""

import contextlib

import torch
from torch import Tensor

from megatron.core.transformer.sink_attention.attention_params import Call, Case
from megatron.core.transformer.sink_attention.backends.base import (
    Backend,
    dense_last_dim,
    lse_from_flash,
    lse_to_flash,
    why_not_flash,
)


class AtenFlashBackend(Backend):
    """aten::_flash_attention_forward and _backward."""

    name = "aten_fa2"
    kernel = "FlashAttention 2 inside PyTorch"
    remedy = "Install a CUDA build of PyTorch 2.5 or newer with flash attention in it."

    def why_not(self, case: Case) -> str | None:
        reason = why_not_flash(case)
        if reason is None and not torch.backends.cuda.is_flash_attention_available():
            reason = "this PyTorch was built without flash attention"
        return reason

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            *dense_last_dim(q, k, v),
            call.cu_seqlens_q,
            call.cu_seqlens_k,
            *_lengths(call),
            0.0,
            call.causal,
            False,
            scale=call.scale,
            window_size_left=call.left,
            window_size_right=call.right,
        )
        return out, lse_from_flash(lse, call)

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, call: Call
    ) -> tuple[Tensor, Tensor, Tensor]:
        no_dropout = torch.empty(2, dtype=torch.uint64, device=q.device)
        with _deterministic_algorithms(call.deterministic):
            return torch.ops.aten._flash_attention_backward(
                dout,
                *dense_last_dim(q, k, v),
                out,
                lse_to_flash(lse, call),
                call.cu_seqlens_q,
                call.cu_seqlens_k,
                *_lengths(call),
                0.0,
                call.causal,
                no_dropout,
                no_dropout,
                scale=call.scale,
                window_size_left=call.left,
                window_size_right=call.right,
            )


def _lengths(call: Call) -> tuple[int, int]:
    # A longest query of 1 would make the kernel fold the query heads into the tokens, which holds
    # only if every document has exactly one.
    return (max(2, call.max_seqlen_q) if call.packed else call.max_seqlen_q), call.max_seqlen_k


@contextlib.contextmanager
def _deterministic_algorithms(wanted: bool):
    """PyTorch's switch is global; the operator has no argument for it."""
    before = torch.are_deterministic_algorithms_enabled()
    if not wanted or (before and not torch.is_deterministic_algorithms_warn_only_enabled()):
        yield
        return
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
