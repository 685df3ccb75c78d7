# Copyright (c) 2026, the megatron-core gptoss authors.

"""The interface of a backend.

Tensors: dense q [b, sq, np, hn] and k, v [b, sk, ng, hn], packed [t, np, hn] and [t, ng, hn], of
any strides; lse fp32 (fp64 with fp64 inputs), natural log, [b, np, sq] or [np, t], -inf for a row
that sees no key.
"""

import importlib
import importlib.metadata
from functools import lru_cache

import torch
from torch import Tensor

from megatron.core.transformer.sink_attention.attention_params import Call, Case
from megatron.core.transformer.sink_attention.rescale import apply_sink_, sink_gradient

HALF = (torch.bfloat16, torch.float16)


class Backend:
    """One kernel. A subclass gives name, why_not, forward and backward; the sink comes on top.

    Attributes:
        name: as the argument `backend` says it.
        kernel: what runs, for people.
        remedy: what to do when it cannot run on any case of this machine, one sentence.
        deterministic: its backward can give the same bits every time.
        differentiable: it is made of differentiable operations (`attend`); forward and backward
            are not used.
    """

    name = ""
    kernel = ""
    remedy = ""
    deterministic = True
    differentiable = False

    def why_not(self, case: Case) -> str | None:
        """Why it cannot run this case, one sentence; None if it can."""
        raise NotImplementedError

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """Attention without a sink: out in q's shape and dtype, fresh memory, and lse."""
        raise NotImplementedError

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, call: Call
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv for the out and lse given, which need not be those of forward."""
        raise NotImplementedError

    def forward_sink(
        self, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, call: Call
    ) -> tuple[Tensor, Tensor]:
        """Attention with the sink: out', lse'."""
        out, lse = self.forward(q, k, v, call)
        return (out, lse) if sink is None else apply_sink_(out, lse, sink)

    def backward_sink(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sink: Tensor | None,
        out: Tensor,
        lse: Tensor,
        dout: Tensor,
        call: Call,
        need_dsink: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """dq, dk, dv and dsink for out', lse'."""
        dq, dk, dv = self.backward(q, k, v, out, lse, dout, call)
        dsink = sink_gradient(out, lse, dout, sink) if need_dsink and sink is not None else None
        return dq, dk, dv, dsink


def why_not_flash(case: Case, max_dim: int = 256, multiple: int = 8) -> str | None:
    """What all flash kernels for NVIDIA cards ask for."""
    if case.device.type != "cuda":
        return f"needs a CUDA device, the tensors are on {case.device.type}"
    if case.dtype not in HALF:
        return f"computes in bf16 and fp16 only, the tensors are {_short(case.dtype)}"
    if case.capability < (8, 0):
        return f"needs compute capability 8.0, this card has {_dotted(case.capability)}"
    if case.head_dim > max_dim or case.head_dim % multiple:
        return f"needs a head dim up to {max_dim} and divisible by {multiple}, not {case.head_dim}"
    return None


def dense_last_dim(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Kernels read whole vectors along the last dim."""
    return tuple(t if t.stride(-1) == 1 else t.contiguous() for t in tensors)


def lse_from_flash(lse: Tensor, call: Call) -> Tensor:
    """FlashAttention 2 and 3 write +inf for a row without a key; only these calls have any."""
    if call.same_lengths:
        return lse
    return lse.masked_fill(lse == torch.inf, -torch.inf)


def lse_to_flash(lse: Tensor, call: Call) -> Tensor:
    """The same in the other direction: exp(score - inf) is 0, exp(score + inf) would not be."""
    if call.same_lengths:
        return lse.contiguous()
    return lse.masked_fill(lse == -torch.inf, torch.inf).contiguous()


@lru_cache(maxsize=None)
def import_problem(module: str) -> str | None:
    """Why a module does not import; None if it does. Imports it."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and module.startswith(error.name):
            return f"the Python module {module} is not installed"
        return f"importing {module} failed: {error}"
    except Exception as error:  # a broken build raises whatever it likes
        return f"importing {module} failed: {type(error).__name__}: {str(error).splitlines()[0]}"
    return None


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
