# Copyright (c) 2026, the megatron-core gptoss authors.

"""CPU functions that replace the kernels of other packages, with the same conventions.

Same names, arguments and layouts as the packages', checked as strictly as they check: what is
tested with them is our side of each call. The figures come from the definition.
"""

import contextlib
import sys
import types

import torch

from megatron.core.transformer.sink_attention.attention_params import AttentionParams
from megatron.core.transformer.sink_attention.backends.math import MathBackend

_MATH = MathBackend()


def _params(q, k, scale, left, cu_q, cu_k, max_q, max_k, causal, right=None):
    assert right in ((0, None) if causal else (-1, None))
    left = -1 if left is None else left
    assert causal or left == -1
    dim = 0 if q.dim() == 3 else 1
    return AttentionParams(
        device=q.device,
        dtype=q.dtype,
        head_dim=q.shape[-1],
        num_tokens_q=q.shape[dim],
        num_tokens_k=k.shape[dim],
        packed=cu_q is not None,
        window_size=(left, 0 if causal else -1),
        same_lengths=False,
        softmax_scale=scale,
        max_seqlen_q=max_q,
        max_seqlen_k=max_k,
        cu_seqlens_q=cu_q,
        cu_seqlens_k=cu_k,
    )


def _forward(q, k, v, empty_lse, scale, left, cu_q, cu_k, max_q, max_k, causal, right=None):
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    assert (q.dim() == 4) == (cu_q is None)
    if cu_q is not None:
        assert max_q >= (cu_q[1:] - cu_q[:-1]).max() and max_k >= (cu_k[1:] - cu_k[:-1]).max()
    params = _params(q, k, scale, left, cu_q, cu_k, max_q, max_k, causal, right)
    out, lse = _MATH.forward(q, k, v, params)
    return out, lse.masked_fill(lse == -torch.inf, empty_lse)


def _backward(dout, q, k, v, out, lse, scale, left, cu_q, cu_k, max_q, max_k, causal, right=None):
    assert lse.dtype == torch.float32 and lse.is_contiguous()
    shape = (q.shape[1], q.shape[0]) if q.dim() == 3 else (q.shape[0], q.shape[2], q.shape[1])
    assert lse.shape == shape and not (lse == -torch.inf).any()
    assert dout.shape == out.shape == q.shape and dout.dtype == q.dtype
    lse = lse.masked_fill(lse == torch.inf, -torch.inf)
    params = _params(q, k, scale, left, cu_q, cu_k, max_q, max_k, causal, right)
    grads = _MATH.backward(q, k, v, out, lse, dout, params)
    if cu_q is not None:  # what a kernel may leave unwritten
        for rows in (slice(a, b) for a, b, n in zip(cu_k, cu_k[1:], cu_q.diff()) if n == 0):
            for grad in grads[1:]:
                grad[rows] = torch.nan
    return grads


@contextlib.contextmanager
def aten_kernels():
    """CPU kernels for PyTorch's own operators, for as long as the context lasts."""
    library = torch.library.Library("aten", "IMPL")
    try:
        library.impl("_flash_attention_forward", _aten_flash_forward, "CPU")
        library.impl("_flash_attention_backward", _aten_flash_backward, "CPU")
        library.impl("_scaled_dot_product_cudnn_attention", _cudnn_forward, "CPU")
        library.impl("_scaled_dot_product_cudnn_attention_backward", _cudnn_backward, "CPU")
        yield
    finally:
        library._destroy()


def _aten_flash_forward(q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, debug, **options):
    assert dropout == 0.0 and (cu_q is None or max_q > 1)
    left, right = options["window_size_left"], options["window_size_right"]
    lengths = (cu_q, cu_k, max_q, max_k)
    out, lse = _forward(q, k, v, torch.inf, options["scale"], left, *lengths, causal, right)
    empty = q.new_empty(0)
    return out, lse, empty, empty, empty


def _aten_flash_backward(
    dout, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout, causal, state, unused, **options
):
    assert dropout == 0.0
    left, right = options["window_size_left"], options["window_size_right"]
    lengths = (cu_q, cu_k, max_q, max_k)
    return _backward(dout, q, k, v, out, lse, options["scale"], left, *lengths, causal, right)


def _cudnn_forward(q, k, v, bias, lse_wanted, dropout=0.0, causal=False, debug=False, *, scale):
    assert bias is None and lse_wanted
    assert not causal or q.shape[2] == k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    lengths = (None, None, q.shape[1], k.shape[1])
    out, lse = _forward(q, k, v, torch.inf, scale, None, *lengths, causal)
    empty = q.new_empty(0)
    lengths = (None, None, q.shape[1], k.shape[1])
    return out.transpose(1, 2), lse.unsqueeze(-1), *lengths, empty, empty, empty


def _cudnn_backward(
    dout, q, k, v, out, lse, seed, offset, bias, cu_q, cu_k, max_q, max_k, dropout, causal, *, scale
):
    assert bias is None and cu_q is None
    # Its plan is cached by the strides of q, k, v alone: all must be of Megatron's layout.
    assert all(x.permute(2, 0, 1, 3).is_contiguous() for x in (q, k, v, out, dout))
    q, k, v, out, dout = (x.transpose(1, 2) for x in (q, k, v, out, dout))
    assert lse.shape[-1] == 1
    lse = lse.squeeze(-1)
    grads = _backward(dout, q, k, v, out, lse, scale, None, None, None, max_q, max_k, causal)
    return tuple(grad.transpose(1, 2) for grad in grads)


def flash2_module():
    """flash_attn.flash_attn_interface of flash-attn 2.8."""

    def _flash_attn_forward(
        q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap,
        alibi_slopes, return_softmax,
    ):  # fmt: skip
        assert not return_softmax
        lengths = (None, None, q.shape[1], k.shape[1])
        window = (window_size_left, *lengths, causal, window_size_right)
        out, lse = _forward(q, k, v, torch.inf, softmax_scale, *window)
        return out, lse, None, None

    def _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
        causal, window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None,
        return_softmax=False, block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False,
    ):  # fmt: skip
        assert max_seqlen_q > 1
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        window = (window_size_left, *lengths, causal, window_size_right)
        out, lse = _forward(q, k, v, torch.inf, softmax_scale, *window)
        return out, lse, None, None

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal,
        window_size_left, window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        lengths = (None, None, q.shape[1], k.shape[1])
        window = (window_size_left, *lengths, causal, window_size_right)
        grads = _backward(dout, q, k, v, out, softmax_lse, softmax_scale, *window)
        for target, grad in zip((dq, dk, dv), grads):
            target.copy_(grad)

    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
        max_seqlen_k, dropout_p, softmax_scale, causal, window_size_left, window_size_right,
        softcap, alibi_slopes, deterministic, rng_state=None, zero_tensors=False,
    ):  # fmt: skip
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        window = (window_size_left, *lengths, causal, window_size_right)
        grads = _backward(dout, q, k, v, out, softmax_lse, softmax_scale, *window)
        for target, grad in zip((dq, dk, dv), grads):
            target.copy_(grad)

    return _module("flash_attn.flash_attn_interface", locals())


def flash3_module():
    """flash_attn_interface of flash-attention/hopper, late 2025."""

    def _flash_attn_forward(
        q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None,
        cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, max_seqlen_q=None,
        max_seqlen_k=None, page_table=None, softmax_scale=None, causal=False, window_size_left=-1,
        window_size_right=-1, attention_chunk=0, softcap=0.0, num_splits=1,
    ):  # fmt: skip
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        if cu_seqlens_q is None:
            assert max_seqlen_q is None
            lengths = (None, None, q.shape[1], k.shape[1])
        window = (window_size_left, *lengths, causal, window_size_right)
        out, lse = _forward(q, k, v, torch.inf, softmax_scale, *window)
        return out_.copy_(out), lse, None, None

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None,
        sequed_k=None, max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None,
        softmax_scale=None, is_causal=False, window_size_left=-1, window_size_right=-1,
        softcap=0.0, deterministic=False, sm_margin=0,
    ):  # fmt: skip
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        if cu_seqlens_q is None:
            lengths = (None, None, q.shape[1], k.shape[1])
        window = (window_size_left, *lengths, is_causal, window_size_right)
        grads = _backward(dout, q, k, v, out, softmax_lse, softmax_scale, *window)
        for target, grad in zip((dq, dk, dv), grads):
            target.copy_(grad)

    return _module("flash_attn_interface", locals())


def flash4_module():
    """flash_attn.cute.interface of flash-attn-4 4.0.0b36; -inf for a row without a key."""

    def _flash_attn_fwd(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None,
        max_seqlen_k=None, softmax_scale=None, causal=False, window_size_left=None,
        window_size_right=None, learnable_sink=None, return_lse=False, out=None,
    ):  # fmt: skip
        assert return_lse
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        if cu_seqlens_q is None:
            lengths = (None, None, q.shape[1], k.shape[1])
        params = _params(q, k, softmax_scale, window_size_left, *lengths, causal, window_size_right)
        result, lse = _MATH.forward_with_sinks(q, k, v, learnable_sink, params)
        return out.copy_(result), lse, None, None, None

    def _flash_attn_bwd(
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0,
        window_size_left=None, window_size_right=None, cu_seqlens_q=None, cu_seqlens_k=None,
        max_seqlen_q=None, max_seqlen_k=None, deterministic=False, learnable_sink=None,
    ):  # fmt: skip
        assert lse.dtype == torch.float32
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        if cu_seqlens_q is None:
            lengths = (None, None, q.shape[1], k.shape[1])
        params = _params(q, k, softmax_scale, window_size_left, *lengths, causal, window_size_right)
        grads = _MATH.backward_with_sinks(q, k, v, learnable_sink, out, lse, dout, params, True)
        return grads if learnable_sink is not None else grads[:3]

    return _module("flash_attn.cute.interface", locals())


def _module(name, functions):
    """The module and its parents, for sys.modules."""
    module = types.ModuleType(name)
    for key, value in functions.items():
        setattr(module, key, value)
    modules = {name: module}
    while "." in name:
        name, child = name.rsplit(".", 1)
        parent = modules[name] = types.ModuleType(name)
        parent.__path__ = []
        setattr(parent, child, modules[f"{name}.{child}"])
    return modules


STUBS = {
    "fa2": flash2_module,
    "fa3": flash3_module,
    "fa4": flash4_module,
    "fa4_native": flash4_module,
}


@contextlib.contextmanager
def stub(name, monkeypatch):
    """The kernels of one backend on the CPU."""
    if name in STUBS:
        from megatron.core.transformer.sink_attention.backends import fa3

        fa3._interface.cache_clear()
        for module, value in STUBS[name]().items():
            monkeypatch.setitem(sys.modules, module, value)
        if name == "fa3":
            monkeypatch.setattr(fa3, "_interface", lambda: sys.modules["flash_attn_interface"])
        yield
    elif name in ("aten_fa2", "cudnn"):
        with aten_kernels():
            yield
    else:
        yield
