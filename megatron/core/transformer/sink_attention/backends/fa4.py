# Copyright (c) 2026, the megatron-core gptoss authors.

"""FlashAttention 4 (the package flash-attn-4, CuTe DSL), with sinks by rescaling or in the kernel.

Its kernels have a learnable sink on Hopper and Blackwell. Which of the two is faster depends on the
GPU and the length; "auto" uses the measured order.
"""

import torch
from torch import Tensor

from megatron.core.kernel_selection import import_problem
from megatron.core.transformer.sink_attention.attention_params import AttentionParams
from megatron.core.transformer.sink_attention.backends.base import (
    Backend,
    dense_last_dim,
    flash_unsupported_reason,
    package_version,
)

_MODULE = "flash_attn.cute.interface"


class Flash4Backend(Backend):
    """flash_attn.cute.interface; the sinks rescale its output."""

    name = "fa4"
    kernel = "FlashAttention 4, sinks by rescaling"
    hint = (
        "pip install --pre flash-attn-4: the fastest on Hopper and Blackwell, no compiler needed."
    )

    def unsupported_reason(self, params: AttentionParams) -> str | None:
        reason = flash_unsupported_reason(params)
        if reason is not None:
            return reason
        major = params.capability[0]
        if major not in (9, 10, 11):
            return f"its backward is used on compute capability 9 to 11, this card has {major}.x"
        if major != 9 and params.head_dim > 128:
            return f"on this card a head dim up to 128 is used, not {params.head_dim}"
        if package_version("flash-attn-4") is None:
            return "the package flash-attn-4 is not installed"
        return import_problem(_MODULE)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, params: AttentionParams
    ) -> tuple[Tensor, Tensor]:
        return self._run_forward(q, k, v, None, params)

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
        return self._run_backward(q, k, v, None, out, lse, dout, params)

    def _run_forward(self, q, k, v, sinks, params):
        from flash_attn.cute.interface import _flash_attn_fwd

        q, k, v = dense_last_dim(q, k, v)
        out, lse, *_ = _flash_attn_fwd(
            q,
            k,
            v,
            learnable_sink=sinks,
            return_lse=True,
            out=_out_like(q),
            max_seqlen_q=params.max_seqlen_q if params.packed else None,
            max_seqlen_k=params.max_seqlen_k if params.packed else None,
            **_options(params),
        )
        return out, lse

    def _run_backward(self, q, k, v, sinks, out, lse, dout, params):
        from flash_attn.cute.interface import _flash_attn_bwd

        options = _options(params)
        if sinks is not None:
            options["learnable_sink"] = sinks
        return _flash_attn_bwd(
            *dense_last_dim(q, k, v, out, dout),
            lse.contiguous(),
            deterministic=params.deterministic,
            max_seqlen_q=params.max_seqlen_q if params.packed else None,
            max_seqlen_k=params.max_seqlen_k if params.packed else None,
            **options,
        )


class Flash4NativeBackend(Flash4Backend):
    """flash_attn.cute.interface with the learnable sink of the kernel."""

    name = "fa4_native"
    kernel = "FlashAttention 4, sinks in the kernel"

    def forward_with_sinks(self, q, k, v, sinks, params):
        return self._run_forward(q, k, v, sinks, params)

    def backward_with_sinks(self, q, k, v, sinks, out, lse, dout, params, need_dsinks):
        grads = self._run_backward(q, k, v, sinks, out, lse, dout, params)
        return grads if sinks is not None else (*grads, None)


def _options(params: AttentionParams) -> dict:
    return dict(
        softmax_scale=params.softmax_scale,
        causal=params.causal,
        window_size_left=params.window_size[0] if params.has_window else None,
        window_size_right=0 if params.has_window else None,
        cu_seqlens_q=params.cu_seqlens_q,
        cu_seqlens_k=params.cu_seqlens_k,
    )


def _out_like(q: Tensor) -> Tensor:
    """An output in the memory order [s, b, np, hn] of Megatron, which saves a copy."""
    if q.dim() == 3:
        return torch.empty(q.shape, dtype=q.dtype, device=q.device)
    batch, tokens, heads, dim = q.shape
    memory = torch.empty((tokens, batch, heads, dim), dtype=q.dtype, device=q.device)
    return memory.transpose(0, 1)
