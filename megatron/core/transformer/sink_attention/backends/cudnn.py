# Copyright (c) 2026, the megatron-core gptoss authors.

"""cuDNN's attention through PyTorch."""

import torch
from torch import Tensor

from megatron.core.transformer.sink_attention.attention_params import AttentionParams
from megatron.core.transformer.sink_attention.backends.base import Backend, flash_unsupported_reason


class CudnnBackend(Backend):
    """aten::_scaled_dot_product_cudnn_attention and its backward."""

    name = "cudnn"
    kernel = "cuDNN through PyTorch"
    hint = "Install a CUDA build of PyTorch with cuDNN 9 or newer."
    deterministic = False

    # [b, np, sq, 1] in PyTorch 2.11, [b, np, sq] in others; the backward takes the same shape.
    _lse_has_last_dim = True

    def unsupported_reason(self, params: AttentionParams) -> str | None:
        reason = flash_unsupported_reason(params, max_dim=128)
        if reason is not None:
            return reason
        version = torch.backends.cudnn.version() or 0
        if version < 90000:
            return f"needs cuDNN 9, PyTorch found {version or 'none'}"
        if params.packed:
            return "PyTorch's cuDNN operator does not support packed sequences with grouped queries"
        if params.has_window:
            return "PyTorch's cuDNN operator does not support a window"
        if params.causal and not params.same_lengths:
            return "cuDNN aligns fewer queries with the first keys, not with the last"
        if min(params.num_tokens_q, params.num_tokens_k) < 2:
            return "cuDNN does not support a sequence of one token"
        if params.deterministic:
            return "PyTorch's cuDNN operator has no deterministic backward"
        return None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, params: AttentionParams
    ) -> tuple[Tensor, Tensor]:
        q, k, v = (_dense(x).transpose(1, 2) for x in (q, k, v))
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, params.causal, False, scale=params.softmax_scale
        )
        CudnnBackend._lse_has_last_dim = lse.dim() == 4
        return out.transpose(1, 2), lse.reshape(q.shape[:3])

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
        q, k, v, out = (_dense(x).transpose(1, 2) for x in (q, k, v, out))
        dout = dout.transpose(1, 2)
        if not _same_layout(dout, out):
            dout = torch.empty_like(out).copy_(dout)
        seed = torch.zeros((), dtype=torch.int64, device=q.device)
        grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            dout,
            q,
            k,
            v,
            out,
            lse.unsqueeze(-1) if CudnnBackend._lse_has_last_dim else lse,
            seed,
            seed,
            None,
            None,
            None,
            params.max_seqlen_q,
            params.max_seqlen_k,
            0.0,
            params.causal,
            scale=params.softmax_scale,
        )
        return tuple(grad.transpose(1, 2) for grad in grads)


def _dense(x: Tensor) -> Tensor:
    """[b, s, np, hn] in the contiguous memory layout of [s, b, np, hn].

    PyTorch caches the plan of cuDNN's backward by shapes and strides of q, k, v alone, so out and
    dout must always have the same layout. Only the small tensors are copied: key and value are
    slices of the fused projection.
    """
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def _same_layout(x: Tensor, y: Tensor) -> bool:
    """Equal strides in all dimensions of more than one element."""
    return all(a == b or size == 1 for size, a, b in zip(x.shape, x.stride(), y.stride()))
