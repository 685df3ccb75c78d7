# Copyright (c) 2026, the megatron-core gptoss authors.

"""FlashAttention 2 as PyTorch ships it.

`torch.nn.attention.varlen.varlen_attn` is the public interface of the same kernel. Its backward
uses only its own lse, so the operators below it are called (their leading arguments are the same in
PyTorch 2.5 to 2.13). `torch.nn.attention.activate_flash_attention_impl` replaces the kernel of
these operators.
"""

import contextlib

import torch
from torch import Tensor

from megatron.core.transformer.sink_attention.attention_params import AttentionParams
from megatron.core.transformer.sink_attention.backends.base import (
    Backend,
    dense_last_dim,
    flash_unsupported_reason,
    lse_from_flash,
    lse_to_flash,
)


class AtenFlashBackend(Backend):
    """aten::_flash_attention_forward and _backward."""

    name = "aten_fa2"
    kernel = "FlashAttention 2 inside PyTorch"
    hint = "Install a CUDA build of PyTorch 2.5 or newer with flash attention."

    def unsupported_reason(self, params: AttentionParams) -> str | None:
        reason = flash_unsupported_reason(params)
        if reason is None and not torch.backends.cuda.is_flash_attention_available():
            reason = "this PyTorch was built without flash attention"
        return reason

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, params: AttentionParams
    ) -> tuple[Tensor, Tensor]:
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            *dense_last_dim(q, k, v),
            params.cu_seqlens_q,
            params.cu_seqlens_k,
            *_lengths(params),
            0.0,
            params.causal,
            False,
            scale=params.softmax_scale,
            window_size_left=params.window_size[0],
            window_size_right=params.window_size[1],
        )
        return out, lse_from_flash(lse, params)

    def backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        dout: Tensor,
        params: AttentionParams,
    ) -> tuple[Tensor, Tensor, Tensor]:
        no_dropout = torch.empty(2, dtype=torch.uint64, device=q.device)
        with _deterministic_algorithms(params.deterministic):
            return torch.ops.aten._flash_attention_backward(
                dout,
                *dense_last_dim(q, k, v),
                out,
                lse_to_flash(lse, params),
                params.cu_seqlens_q,
                params.cu_seqlens_k,
                *_lengths(params),
                0.0,
                params.causal,
                no_dropout,
                no_dropout,
                scale=params.softmax_scale,
                window_size_left=params.window_size[0],
                window_size_right=params.window_size[1],
            )


def _lengths(params: AttentionParams) -> tuple[int, int]:
    # With a longest query of 1 the kernel folds the query heads into the tokens, which is right
    # only if every document has exactly one token.
    return (
        max(2, params.max_seqlen_q) if params.packed else params.max_seqlen_q
    ), params.max_seqlen_k


@contextlib.contextmanager
def _deterministic_algorithms(wanted: bool):
    """Set PyTorch's global switch; the operator has no argument for it."""
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
