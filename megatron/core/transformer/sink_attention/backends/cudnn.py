# Copyright (c) 2026, the megatron-core gptoss authors.

"""cuDNN's attention through PyTorch."""

import torch
from torch import Tensor

from megatron.core.transformer.sink_attention.attention_params import Call, Case
from megatron.core.transformer.sink_attention.backends.base import Backend, why_not_flash


class CudnnBackend(Backend):
    """aten::_scaled_dot_product_cudnn_attention and its backward."""

    name = "cudnn"
    kernel = "cuDNN through PyTorch"
    remedy = "Install a CUDA build of PyTorch with cuDNN 9 or newer."
    deterministic = False

    # [b, np, sq, 1] in PyTorch 2.11, [b, np, sq] in others; the backward wants what came.
    _lse_has_last_dim = True

    def why_not(self, case: Case) -> str | None:
        reason = why_not_flash(case, max_dim=128)
        if reason is not None:
            return reason
        version = torch.backends.cudnn.version() or 0
        if version < 90000:
            return f"needs cuDNN 9, PyTorch found {version or 'none'}"
        if case.packed:
            return "PyTorch's door to cuDNN takes no packed sequences with grouped queries"
        if case.window is not None:
            return "PyTorch's door to cuDNN takes no window"
        if case.causal and not case.same_lengths:
            return "cuDNN aligns queries to the first keys where they are fewer, not to the last"
        if min(case.seqlen_q, case.seqlen_k) < 2:
            return "cuDNN takes no sequence of one token"
        if case.deterministic:
            return "PyTorch's door to cuDNN has no deterministic backward"
        return None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        q, k, v = (_dense(x).transpose(1, 2) for x in (q, k, v))
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, call.causal, False, scale=call.scale
        )
        CudnnBackend._lse_has_last_dim = lse.dim() == 4
        return out.transpose(1, 2), lse.reshape(q.shape[:3])

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, call: Call
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
            call.max_seqlen_q,
            call.max_seqlen_k,
            0.0,
            call.causal,
            scale=call.scale,
        )
        return tuple(grad.transpose(1, 2) for grad in grads)


def _dense(x: Tensor) -> Tensor:
    """[b, s, np, hn] in memory of [s, b, np, hn], without gaps.

    PyTorch caches cuDNN's backward by shapes and strides of q, k, v alone, so that out and dout must
    have one layout for each of those: that of Megatron. The copy is of the small tensors: key and
    value are slices of the fused projection.
    """
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def _same_layout(x: Tensor, y: Tensor) -> bool:
    """Equal strides, but where there is nothing to stride over."""
    return all(a == b or size == 1 for size, a, b in zip(x.shape, x.stride(), y.stride()))
