# Copyright (c) 2026, the megatron-core gptoss authors.

"""The interface of a backend.

Tensors: dense q [b, sq, np, hn] and k, v [b, sk, ng, hn], packed [t, np, hn] and [t, ng, hn], with
any strides; lse fp32 (fp64 with fp64 inputs), natural log, [b, np, sq] or [np, t], -inf for a row
that sees no key.
"""

import importlib.metadata
from functools import lru_cache

import torch
from torch import Tensor

from megatron.core.transformer.sink_attention.attention_params import AttentionParams
from megatron.core.transformer.sink_attention.rescale import apply_sink_, sink_gradient

HALF = (torch.bfloat16, torch.float16)


class Backend:
    """One kernel without sinks; the `_with_sinks` methods rescale its output.

    Attributes:
        name: value of the argument `backend`.
        kernel: description for reports.
        hint: how to make it available on this machine, one sentence.
        deterministic: its backward can give the same bits in every run.
        differentiable: it consists of differentiable operations (`attend`). Without context
            parallelism forward and backward are not used.
    """

    name = ""
    kernel = ""
    hint = ""
    deterministic = True
    differentiable = False

    def unsupported_reason(self, params: AttentionParams) -> str | None:
        """Why it cannot run this call, one sentence; None if it can."""
        raise NotImplementedError

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, params: AttentionParams
    ) -> tuple[Tensor, Tensor]:
        """Attention without sinks: out in the shape and dtype of q, newly allocated, and lse."""
        raise NotImplementedError

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
        """dq, dk, dv for the given out and lse, which may differ from those of forward."""
        raise NotImplementedError

    def forward_with_sinks(
        self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, params: AttentionParams
    ) -> tuple[Tensor, Tensor]:
        """Attention with sinks: out', lse'."""
        out, lse = self.forward(q, k, v, params)
        return (out, lse) if sinks is None else apply_sink_(out, lse, sinks)

    def backward_with_sinks(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        out: Tensor,
        lse: Tensor,
        dout: Tensor,
        params: AttentionParams,
        need_dsinks: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """dq, dk, dv and dsinks for out', lse'."""
        dq, dk, dv = self.backward(q, k, v, out, lse, dout, params)
        dsinks = sink_gradient(out, lse, dout, sinks) if need_dsinks and sinks is not None else None
        return dq, dk, dv, dsinks


def flash_unsupported_reason(
    params: AttentionParams, max_dim: int = 256, multiple: int = 8
) -> str | None:
    """Requirements of all flash kernels."""
    if params.device.type != "cuda":
        return f"needs a CUDA device, the tensors are on {params.device.type}"
    if params.dtype not in HALF:
        return f"computes in bf16 and fp16 only, the tensors are {_short(params.dtype)}"
    if params.capability < (8, 0):
        return f"needs compute capability 8.0, this card has {_dotted(params.capability)}"
    if params.head_dim > max_dim or params.head_dim % multiple:
        return (
            f"needs a head dim up to {max_dim} and divisible by {multiple}, not {params.head_dim}"
        )
    return None


def dense_last_dim(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Kernels load vectors along the last dim."""
    return tuple(t if t.stride(-1) == 1 else t.contiguous() for t in tensors)


def lse_from_flash(lse: Tensor, params: AttentionParams) -> Tensor:
    """FlashAttention 2 and 3 return +inf for a row that sees no key, instead of -inf."""
    if params.same_lengths:
        return lse
    return lse.masked_fill(lse == torch.inf, -torch.inf)


def lse_to_flash(lse: Tensor, params: AttentionParams) -> Tensor:
    """The inverse: exp(score - inf) is 0, exp(score + inf) is not."""
    if params.same_lengths:
        return lse.contiguous()
    return lse.masked_fill(lse == -torch.inf, torch.inf).contiguous()


@lru_cache(maxsize=None)
def package_version(name: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
