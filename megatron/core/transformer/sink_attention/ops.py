# Copyright (c) 2026, the megatron-core gptoss authors.

"""Forward and backward as two custom operators, which torch.compile takes without a graph break.

Tensors have the public layout, [s, b, np, hn] or [t, np, hn], and outputs are contiguous in it
whatever the kernel returns: the compiler must know the strides. Saved for the backward: q, k, v as
given, out and lse with the sinks applied, and nothing else that grows with the sequence.
"""

import contextlib

import torch
from torch import Tensor

from megatron.core.transformer.sink_attention.attention_params import SCHEMA, AttentionParams
from megatron.core.transformer.sink_attention.registry import operator_backend

_OPTIONS = ", ".join(f"{kind} {name}" for name, kind in SCHEMA.items())


@torch.library.custom_op(
    "megatron_sink_attention::forward",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor? sinks, "
    f"{_OPTIONS}) -> (Tensor, Tensor)",
)
def forward_op(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, *options
) -> tuple[Tensor, Tensor]:
    """out in the layout of query, lse [b, np, s] or [np, t], both with the sinks applied.

    Args:
        options: `AttentionParams.flatten()`.
    """
    params = AttentionParams.unflatten(query, key, options)
    with kernel_context(query):
        tensors = [batch_first(x) for x in (query, key, value)]
        out, lse = operator_backend(params).forward_with_sinks(*tensors, _detached(sinks), params)
    return batch_first(out).contiguous(), lse.contiguous()


@forward_op.register_fake
def _forward_fake(query, key, value, sinks, *options):
    if query.dim() == 4:
        tokens, batch, heads, _ = query.shape
        lse_shape = (batch, heads, tokens)
    else:
        lse_shape = (query.shape[1], query.shape[0])
    lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty(query.shape), query.new_empty(lse_shape, dtype=lse_dtype)


@torch.library.custom_op(
    "megatron_sink_attention::backward",
    mutates_args=(),
    schema="(Tensor dout, Tensor query, Tensor key, Tensor value, Tensor? sinks, Tensor out, "
    f"Tensor lse, bool need_dsinks, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def backward_op(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor,
    need_dsinks: bool,
    *options,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, dsinks; the last is empty where it is not needed."""
    params = AttentionParams.unflatten(query, key, options)
    with kernel_context(query):
        tensors = [batch_first(x) for x in (query, key, value)]
        *grads, dsinks = operator_backend(params).backward_with_sinks(
            *tensors,
            _detached(sinks),
            batch_first(out),
            lse,
            batch_first(dout),
            params,
            need_dsinks,
        )
    if dsinks is None or not need_dsinks:
        dsinks = query.new_empty(0)
    return (*(batch_first(grad).contiguous() for grad in grads), dsinks)


@backward_op.register_fake
def _backward_fake(dout, query, key, value, sinks, out, lse, need_dsinks, *options):
    grads = (x.new_empty(x.shape) for x in (query, key, value))
    dsinks = sinks.new_empty(sinks.shape) if need_dsinks else query.new_empty(0)
    return (*grads, dsinks)


def _setup_context(ctx, inputs, output):
    query, key, value, sinks, cu_seqlens_q, cu_seqlens_k, *options = inputs
    out, lse = output
    ctx.save_for_backward(query, key, value, sinks, out, lse, cu_seqlens_q, cu_seqlens_k)
    ctx.options = options
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, dlse):
    if dlse is not None:
        raise RuntimeError("The lse of sink attention is not differentiable.")
    no_gradients = (None,) * len(SCHEMA)
    if dout is None:
        return (None, None, None, None, *no_gradients)
    *tensors, cu_seqlens_q, cu_seqlens_k = ctx.saved_tensors
    need_dsinks = tensors[3] is not None and ctx.needs_input_grad[3]
    dq, dk, dv, dsinks = backward_op(
        dout, *tensors, need_dsinks, cu_seqlens_q, cu_seqlens_k, *ctx.options
    )
    return (dq, dk, dv, dsinks if need_dsinks else None, *no_gradients)


forward_op.register_autograd(_backward, setup_context=_setup_context)


def batch_first(x: Tensor) -> Tensor:
    """[s, b, np, hn] to [b, s, np, hn] and back; packed tensors stay as they are."""
    x = x.detach()
    return x.transpose(0, 1) if x.dim() == 4 else x


def _detached(x: Tensor | None) -> Tensor | None:
    """Some packages pass tensors on by DLPack, which rejects those that require a gradient."""
    return None if x is None else x.detach()


@contextlib.contextmanager
def kernel_context(x: Tensor):
    """Launch kernels on the device of x, without autocast."""
    device = torch.cuda.device_of(x) if x.is_cuda else contextlib.nullcontext()
    with device, torch.autocast(x.device.type, enabled=False):
        yield
