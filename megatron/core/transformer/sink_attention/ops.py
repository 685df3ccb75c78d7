# Copyright (c) 2026, the megatron-core gptoss authors.

"""Forward and backward as two custom operators, which torch.compile takes without a graph break.

Tensors stand in the public layout, [s, b, np, hn] or [t, np, hn], and the outputs are contiguous
in it whatever the kernel does: the compiler must know the strides. Saved for the backward: q, k, v
as they came, out and lse with the sink in them, and nothing else that grows with the sequence.
"""

import contextlib
from typing import Optional

import torch
from torch import Tensor

from megatron.core.transformer.sink_attention.attention_params import Call, case_of
from megatron.core.transformer.sink_attention.registry import BACKENDS, choose


@torch.library.custom_op("megatron_sink_attention::forward", mutates_args=())
def forward_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sink: Optional[Tensor],
    cu_seqlens_q: Optional[Tensor],
    cu_seqlens_k: Optional[Tensor],
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    window: Optional[int],
    same_lengths: bool,
    deterministic: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """out in the layout of query, lse [b, np, s] or [np, t], both with the sink."""
    call = Call(
        scale,
        window,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        deterministic,
        same_lengths,
    )
    with as_kernel(query):
        kernel = _kernel(query, key, call, backend)
        q, k, v = (batch_first(x) for x in (query, key, value))
        out, lse = kernel.forward_sink(q, k, v, _detached(sink), call)
    return batch_first(out).contiguous(), lse.contiguous()


@forward_op.register_fake
def _forward_fake(
    query,
    key,
    value,
    sink,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    scale,
    window,
    same_lengths,
    deterministic,
    backend,
):
    if query.dim() == 4:
        tokens, batch, heads, _ = query.shape
        lse_shape = (batch, heads, tokens)
    else:
        lse_shape = (query.shape[1], query.shape[0])
    lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty(query.shape), query.new_empty(lse_shape, dtype=lse_dtype)


@torch.library.custom_op("megatron_sink_attention::backward", mutates_args=())
def backward_op(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sink: Optional[Tensor],
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Optional[Tensor],
    cu_seqlens_k: Optional[Tensor],
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    window: Optional[int],
    same_lengths: bool,
    deterministic: bool,
    backend: str,
    need_dsink: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, dsink; the last is empty where it is not needed."""
    call = Call(
        scale,
        window,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        deterministic,
        same_lengths,
    )
    with as_kernel(query):
        kernel = _kernel(query, key, call, backend)
        tensors = [batch_first(x) for x in (query, key, value)]
        *grads, dsink = kernel.backward_sink(
            *tensors, _detached(sink), batch_first(out), lse, batch_first(dout), call, need_dsink
        )
    if dsink is None or not need_dsink:
        dsink = query.new_empty(0)
    return (*(batch_first(grad).contiguous() for grad in grads), dsink)


@backward_op.register_fake
def _backward_fake(
    dout,
    query,
    key,
    value,
    sink,
    out,
    lse,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    scale,
    window,
    same_lengths,
    deterministic,
    backend,
    need_dsink,
):
    grads = (x.new_empty(x.shape) for x in (query, key, value))
    dsink = sink.new_empty(sink.shape) if need_dsink else query.new_empty(0)
    return (*grads, dsink)


def _setup_context(ctx, inputs, output):
    query, key, value, sink, cu_seqlens_q, cu_seqlens_k, *options = inputs
    out, lse = output
    ctx.save_for_backward(query, key, value, sink, out, lse, cu_seqlens_q, cu_seqlens_k)
    ctx.options = options
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, dlse):
    if dlse is not None:
        raise RuntimeError("The lse of sink attention is not differentiable.")
    if dout is None:
        return (None,) * 13
    query, key, value, sink, out, lse, cu_seqlens_q, cu_seqlens_k = ctx.saved_tensors
    need_dsink = sink is not None and ctx.needs_input_grad[3]
    dq, dk, dv, dsink = backward_op(
        dout,
        query,
        key,
        value,
        sink,
        out,
        lse,
        cu_seqlens_q,
        cu_seqlens_k,
        *ctx.options,
        need_dsink,
    )
    return (dq, dk, dv, dsink if need_dsink else None, *(None,) * 9)


forward_op.register_autograd(_backward, setup_context=_setup_context)


def _kernel(query: Tensor, key: Tensor, call: Call, name: str):
    """A name is chosen and checked before the operator; "auto" comes from compiled code."""
    if name != "auto":
        return BACKENDS[name]
    return choose(case_of(query, key, call), operators_only=True)


def batch_first(x: Tensor) -> Tensor:
    """[s, b, np, hn] to [b, s, np, hn] and back; packed tensors stay as they are."""
    x = x.detach()
    return x.transpose(0, 1) if x.dim() == 4 else x


def _detached(x: Optional[Tensor]) -> Optional[Tensor]:
    """Some packages hand tensors on by DLPack, which refuses those that require a gradient."""
    return None if x is None else x.detach()


@contextlib.contextmanager
def as_kernel(x: Tensor):
    """Kernels launched from Python go to the current device, and autocast is none of theirs."""
    device = torch.cuda.device_of(x) if x.is_cuda else contextlib.nullcontext()
    with device, torch.autocast(x.device.type, enabled=False):
        yield
