# Copyright (c) 2026, the megatron-core gptoss authors.

"""FlashAttention 3 (Hopper), built from flash-attention/hopper."""

import importlib
import inspect
from functools import lru_cache
from typing import Callable

import torch
from torch import Tensor

from megatron.core.transformer.sink_attention.attention_params import Call, Case
from megatron.core.transformer.sink_attention.backends.base import (
    Backend,
    dense_last_dim,
    import_problem,
    lse_from_flash,
    lse_to_flash,
    why_not_flash,
)

_MODULES = ("flash_attn_interface", "flash_attn_3.flash_attn_interface")


class Flash3Backend(Backend):
    """flash_attn_interface of the hopper folder."""

    name = "fa3"
    kernel = "FlashAttention 3"
    remedy = "Build flash-attention/hopper, or pip install flash-attn-4, which is faster here."

    def why_not(self, case: Case) -> str | None:
        reason = why_not_flash(case)
        if reason is not None:
            return reason
        if case.capability[0] != 9:
            return f"runs on compute capability 9.x, this card has {case.capability[0]}.x"
        problems = [import_problem(module) for module in _MODULES]
        if None in problems:
            return None
        return next((p for p in problems if "not installed" not in p), problems[0])

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        forward = _interface()._flash_attn_forward
        q, k, v = dense_last_dim(q, k, v)
        names = _argument_names(forward)
        options = dict(softmax_scale=call.scale, causal=call.causal, **_window(names, call))
        if call.packed:
            options.update(
                cu_seqlens_q=call.cu_seqlens_q,
                cu_seqlens_k=call.cu_seqlens_k,
                max_seqlen_q=call.max_seqlen_q,
                max_seqlen_k=call.max_seqlen_k,
            )
        out_name = "out_" if "out_" in names else "out"
        options[out_name] = torch.empty_like(q)
        missing = [name for name in _required(forward) if name not in (*options, "q", "k", "v")]
        options.update(dict.fromkeys(missing))  # None: older versions have no defaults
        out, lse, *_ = forward(q, k, v, **options)
        return out, lse_from_flash(lse, call)

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, call: Call
    ) -> tuple[Tensor, Tensor, Tensor]:
        backward = _interface()._flash_attn_backward
        names = _argument_names(backward)
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        options = dict(
            cu_seqlens_q=call.cu_seqlens_q,
            cu_seqlens_k=call.cu_seqlens_k,
            max_seqlen_q=call.max_seqlen_q if call.packed else None,
            max_seqlen_k=call.max_seqlen_k if call.packed else None,
            dq=dq,
            dk=dk,
            dv=dv,
            softmax_scale=call.scale,
            deterministic=call.deterministic,
            **_window(names, call),
        )
        options["is_causal" if "is_causal" in names else "causal"] = call.causal
        tensors = (*dense_last_dim(dout, q, k, v, out), lse_to_flash(lse, call))
        given = (*options, "dout", "q", "k", "v", "out", "softmax_lse")
        missing = [name for name in _required(backward) if name not in given]
        options.update(dict.fromkeys(missing))
        backward(*tensors, **options)
        return dq, dk, dv


@lru_cache(maxsize=None)
def _interface():
    module = next(module for module in _MODULES if import_problem(module) is None)
    return importlib.import_module(module)


def _window(names: tuple[str, ...], call: Call) -> dict:
    if "window_size_left" in names:
        return {"window_size_left": call.left, "window_size_right": call.right}
    return {"window_size": (call.left, call.right)}


@lru_cache(maxsize=None)
def _signature(function: Callable) -> inspect.Signature:
    # A torch custom op hides the function that it wraps.
    return inspect.signature(getattr(function, "_init_fn", function))


def _argument_names(function: Callable) -> tuple[str, ...]:
    return tuple(_signature(function).parameters)


def _required(function: Callable) -> list[str]:
    parameters = _signature(function).parameters.values()
    return [p.name for p in parameters if p.default is p.empty]
