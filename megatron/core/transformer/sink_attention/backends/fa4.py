# Copyright (c) 2026, the megatron-core gptoss authors.

"""FlashAttention 4 (the package flash-attn-4, CuTe DSL): with our sink, and with its own.

Its kernels have a learnable sink for Hopper and Blackwell. Both ways are here, because which one
is faster is a matter of the card and the length; "auto" goes by measurement.
"""

import torch
from torch import Tensor

from megatron.core.transformer.sink_attention.attention_params import Call, Case
from megatron.core.transformer.sink_attention.backends.base import (
    Backend,
    dense_last_dim,
    import_problem,
    package_version,
    why_not_flash,
)

_MODULE = "flash_attn.cute.interface"


class Flash4Backend(Backend):
    """flash_attn.cute.interface, the sink applied by us."""

    name = "fa4"
    kernel = "FlashAttention 4, sink by our correction"
    remedy = (
        "pip install --pre flash-attn-4: the fastest on Hopper and Blackwell, no compiler needed."
    )

    def why_not(self, case: Case) -> str | None:
        reason = why_not_flash(case)
        if reason is not None:
            return reason
        major = case.capability[0]
        if major not in (9, 10, 11):
            return f"its backward is used on compute capability 9 to 11, this card has {major}.x"
        if major != 9 and case.head_dim > 128:
            return f"on this card a head dim up to 128 is used, not {case.head_dim}"
        if package_version("flash-attn-4") is None:
            return "the package flash-attn-4 is not installed"
        return import_problem(_MODULE)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        return self._run_forward(q, k, v, None, call)

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, call: Call
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self._run_backward(q, k, v, None, out, lse, dout, call)

    def _run_forward(self, q, k, v, sink, call):
        from flash_attn.cute.interface import _flash_attn_fwd

        q, k, v = dense_last_dim(q, k, v)
        out, lse, *_ = _flash_attn_fwd(
            q,
            k,
            v,
            learnable_sink=sink,
            return_lse=True,
            out=_out_like(q),
            max_seqlen_q=call.max_seqlen_q if call.packed else None,
            max_seqlen_k=call.max_seqlen_k if call.packed else None,
            **_options(call),
        )
        return out, lse

    def _run_backward(self, q, k, v, sink, out, lse, dout, call):
        from flash_attn.cute.interface import _flash_attn_bwd

        options = _options(call)
        if sink is not None:
            options["learnable_sink"] = sink
        return _flash_attn_bwd(
            *dense_last_dim(q, k, v, out, dout),
            lse.contiguous(),
            deterministic=call.deterministic,
            max_seqlen_q=call.max_seqlen_q if call.packed else None,
            max_seqlen_k=call.max_seqlen_k if call.packed else None,
            **options,
        )


class Flash4NativeBackend(Flash4Backend):
    """flash_attn.cute.interface with its own learnable sink."""

    name = "fa4_native"
    kernel = "FlashAttention 4, its own sink"

    def forward_sink(self, q, k, v, sink, call):
        return self._run_forward(q, k, v, sink, call)

    def backward_sink(self, q, k, v, sink, out, lse, dout, call, need_dsink):
        grads = self._run_backward(q, k, v, sink, out, lse, dout, call)
        return grads if sink is not None else (*grads, None)


def _options(call: Call) -> dict:
    return dict(
        softmax_scale=call.scale,
        causal=call.causal,
        window_size_left=None if call.window is None else call.left,
        window_size_right=None if call.window is None else 0,
        cu_seqlens_q=call.cu_seqlens_q,
        cu_seqlens_k=call.cu_seqlens_k,
    )


def _out_like(q: Tensor) -> Tensor:
    """Memory in Megatron's order [s, b, np, hn], so that no copy is needed after it."""
    if q.dim() == 3:
        return torch.empty(q.shape, dtype=q.dtype, device=q.device)
    batch, tokens, heads, dim = q.shape
    memory = torch.empty((tokens, batch, heads, dim), dtype=q.dtype, device=q.device)
    return memory.transpose(0, 1)
