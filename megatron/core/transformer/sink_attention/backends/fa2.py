# Copyright (c) 2026, the megatron-core gptoss authors.

"""The package flash-attn (FlashAttention 2)."""

import torch
from torch import Tensor

from megatron.core.kernel_selection import import_problem
from megatron.core.transformer.sink_attention.attention_params import AttentionParams
from megatron.core.transformer.sink_attention.backends.base import (
    Backend,
    dense_last_dim,
    flash_unsupported_reason,
    lse_from_flash,
    lse_to_flash,
    package_version,
)

_MODULE = "flash_attn.flash_attn_interface"


class Flash2Backend(Backend):
    """flash_attn.flash_attn_interface, 2.7 or newer."""

    name = "fa2"
    kernel = "FlashAttention 2 of the package flash-attn"
    hint = "pip install flash-attn; aten_fa2 is the same kernel in PyTorch."

    def unsupported_reason(self, params: AttentionParams) -> str | None:
        reason = flash_unsupported_reason(params)
        if reason is not None:
            return reason
        version = package_version("flash-attn")
        if version is None:
            return "the package flash-attn is not installed"
        if tuple(int(part) for part in version.split(".")[:2]) < (2, 7):
            return f"needs flash-attn 2.7 or newer, found {version}"
        return import_problem(_MODULE)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, params: AttentionParams
    ) -> tuple[Tensor, Tensor]:
        from flash_attn import flash_attn_interface

        options = dict(
            dropout_p=0.0,
            softmax_scale=params.softmax_scale,
            causal=params.causal,
            window_size_left=params.window_size[0],
            window_size_right=params.window_size[1],
            softcap=0.0,
            alibi_slopes=None,
            return_softmax=False,
        )
        q, k, v = dense_last_dim(q, k, v)
        if params.packed:
            out, lse, *_ = flash_attn_interface._flash_attn_varlen_forward(
                q,
                k,
                v,
                params.cu_seqlens_q,
                params.cu_seqlens_k,
                max(2, params.max_seqlen_q),  # see aten_fa2
                params.max_seqlen_k,
                **options,
            )
        else:
            out, lse, *_ = flash_attn_interface._flash_attn_forward(q, k, v, **options)
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
        from flash_attn import flash_attn_interface

        options = dict(
            dropout_p=0.0,
            softmax_scale=params.softmax_scale,
            causal=params.causal,
            window_size_left=params.window_size[0],
            window_size_right=params.window_size[1],
            softcap=0.0,
            alibi_slopes=None,
            deterministic=params.deterministic,
        )
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        tensors = (*dense_last_dim(dout, q, k, v, out), lse_to_flash(lse, params), dq, dk, dv)
        if params.packed:
            flash_attn_interface._flash_attn_varlen_backward(
                *tensors,
                params.cu_seqlens_q,
                params.cu_seqlens_k,
                max(2, params.max_seqlen_q),
                params.max_seqlen_k,
                **options,
            )
        else:
            flash_attn_interface._flash_attn_backward(*tensors, **options)
        return dq, dk, dv
