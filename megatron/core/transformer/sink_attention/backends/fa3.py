# Copyright (c) 2026, the megatron-core gptoss authors.

"""FlashAttention 3 (Hopper), built from flash-attention/hopper."""

import importlib
import inspect
from functools import lru_cache
from typing import Callable

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
)

_MODULES = ("flash_attn_interface", "flash_attn_3.flash_attn_interface")


class Flash3Backend(Backend):
    """flash_attn_interface of the hopper directory."""

    name = "fa3"
    kernel = "FlashAttention 3"
    hint = "Build flash-attention/hopper, or pip install flash-attn-4, which is faster here."

    def unsupported_reason(self, params: AttentionParams) -> str | None:
        reason = flash_unsupported_reason(params)
        if reason is not None:
            return reason
        if params.capability[0] != 9:
            return f"runs on compute capability 9.x, this card has {params.capability[0]}.x"
        problems = [import_problem(module) for module in _MODULES]
        if None in problems:
            return None
        return next((p for p in problems if "not installed" not in p), problems[0])

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, params: AttentionParams
    ) -> tuple[Tensor, Tensor]:
        forward = _interface()._flash_attn_forward
        q, k, v = dense_last_dim(q, k, v)
        names = _argument_names(forward)
        options = dict(
            softmax_scale=params.softmax_scale, causal=params.causal, **_window_size(names, params)
        )
        if params.packed:
            options.update(
                cu_seqlens_q=params.cu_seqlens_q,
                cu_seqlens_k=params.cu_seqlens_k,
                max_seqlen_q=params.max_seqlen_q,
                max_seqlen_k=params.max_seqlen_k,
            )
        out_name = "out_" if "out_" in names else "out"
        options[out_name] = torch.empty_like(q)
        missing = [name for name in _required(forward) if name not in (*options, "q", "k", "v")]
        options.update(dict.fromkeys(missing))  # None: older versions have no defaults
        out, lse, *_ = forward(q, k, v, **options)
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
        backward = _interface()._flash_attn_backward
        names = _argument_names(backward)
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        options = dict(
            cu_seqlens_q=params.cu_seqlens_q,
            cu_seqlens_k=params.cu_seqlens_k,
            max_seqlen_q=params.max_seqlen_q if params.packed else None,
            max_seqlen_k=params.max_seqlen_k if params.packed else None,
            dq=dq,
            dk=dk,
            dv=dv,
            softmax_scale=params.softmax_scale,
            deterministic=params.deterministic,
            **_window_size(names, params),
        )
        options["is_causal" if "is_causal" in names else "causal"] = params.causal
        tensors = (*dense_last_dim(dout, q, k, v, out), lse_to_flash(lse, params))
        given = (*options, "dout", "q", "k", "v", "out", "softmax_lse")
        missing = [name for name in _required(backward) if name not in given]
        options.update(dict.fromkeys(missing))
        backward(*tensors, **options)
        return dq, dk, dv


@lru_cache(maxsize=None)
def _interface():
    module = next(module for module in _MODULES if import_problem(module) is None)
    return importlib.import_module(module)


def _window_size(names: tuple[str, ...], params: AttentionParams) -> dict:
    if "window_size_left" in names:
        left, right = params.window_size
        return {"window_size_left": left, "window_size_right": right}
    return {"window_size": params.window_size}


@lru_cache(maxsize=None)
def _signature(function: Callable) -> inspect.Signature:
    # A torch custom op hides the function that it wraps.
    return inspect.signature(getattr(function, "_init_fn", function))


def _argument_names(function: Callable) -> tuple[str, ...]:
    return tuple(_signature(function).parameters)


def _required(function: Callable) -> list[str]:
    parameters = _signature(function).parameters.values()
    return [p.name for p in parameters if p.default is p.empty]
