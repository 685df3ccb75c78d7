# Copyright (c) 2026, the megatron-core gptoss authors.

"""The package flash-attn (FlashAttention 2)."""

import torch
from torch import Tensor

from megatron.core.transformer.sink_attention.attention_params import Call, Case
from megatron.core.transformer.sink_attention.backends.base import (
    Backend,
    dense_last_dim,
    import_problem,
    lse_from_flash,
    lse_to_flash,
    package_version,
    why_not_flash,
)

_MODULE = "flash_attn.flash_attn_interface"


class Flash2Backend(Backend):
    """flash_attn.flash_attn_interface, 2.7 or newer."""

    name = "fa2"
    kernel = "FlashAttention 2 of the package flash-attn"
    remedy = "pip install flash-attn; PyTorch's own FlashAttention 2 (aten_fa2) does the same."

    def why_not(self, case: Case) -> str | None:
        reason = why_not_flash(case)
        if reason is not None:
            return reason
        version = package_version("flash-attn")
        if version is None:
            return "the package flash-attn is not installed"
        if tuple(int(part) for part in version.split(".")[:2]) < (2, 7):
            return f"needs flash-attn 2.7 or newer, found {version}"
        return import_problem(_MODULE)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        from flash_attn import flash_attn_interface

        options = dict(
            dropout_p=0.0,
            softmax_scale=call.scale,
            causal=call.causal,
            window_size_left=call.left,
            window_size_right=call.right,
            softcap=0.0,
            alibi_slopes=None,
            return_softmax=False,
        )
        q, k, v = dense_last_dim(q, k, v)
        if call.packed:
            out, lse, *_ = flash_attn_interface._flash_attn_varlen_forward(
                q,
                k,
                v,
                call.cu_seqlens_q,
                call.cu_seqlens_k,
                max(2, call.max_seqlen_q),  # see aten_fa2
                call.max_seqlen_k,
                **options,
            )
        else:
            out, lse, *_ = flash_attn_interface._flash_attn_forward(q, k, v, **options)
        return out, lse_from_flash(lse, call)

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, call: Call
    ) -> tuple[Tensor, Tensor, Tensor]:
        from flash_attn import flash_attn_interface

        options = dict(
            dropout_p=0.0,
            softmax_scale=call.scale,
            causal=call.causal,
            window_size_left=call.left,
            window_size_right=call.right,
            softcap=0.0,
            alibi_slopes=None,
            deterministic=call.deterministic,
        )
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        tensors = (*dense_last_dim(dout, q, k, v, out), lse_to_flash(lse, call), dq, dk, dv)
        if call.packed:
            flash_attn_interface._flash_attn_varlen_backward(
                *tensors,
                call.cu_seqlens_q,
                call.cu_seqlens_k,
                max(2, call.max_seqlen_q),
                call.max_seqlen_k,
                **options,
            )
        else:
            flash_attn_interface._flash_attn_backward(*tensors, **options)
        return dq, dk, dv
