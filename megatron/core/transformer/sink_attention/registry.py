# Copyright (c) 2026, the megatron-core gptoss authors.

"""The attention backends, and which of them runs a call."""

from functools import lru_cache

from megatron.core.kernel_selection import KernelChoice
from megatron.core.transformer.sink_attention.attention_params import AttentionParams
from megatron.core.transformer.sink_attention.backends.aten_fa2 import AtenFlashBackend
from megatron.core.transformer.sink_attention.backends.base import Backend
from megatron.core.transformer.sink_attention.backends.cudnn import CudnnBackend
from megatron.core.transformer.sink_attention.backends.fa2 import Flash2Backend
from megatron.core.transformer.sink_attention.backends.fa3 import Flash3Backend
from megatron.core.transformer.sink_attention.backends.fa4 import Flash4Backend, Flash4NativeBackend
from megatron.core.transformer.sink_attention.backends.flex import FlexBackend
from megatron.core.transformer.sink_attention.backends.math import MathBackend
from megatron.core.transformer.sink_attention.measured_order import backend_order

# Supports every call.
REFERENCE = "math"

_CHOICE = KernelChoice(
    "backend",
    (
        Flash4Backend(),
        Flash4NativeBackend(),
        Flash3Backend(),
        Flash2Backend(),
        CudnnBackend(),
        AtenFlashBackend(),
        FlexBackend(),
        MathBackend(),
    ),
    order=backend_order,
)
BACKENDS: dict[str, Backend] = _CHOICE.implementations
# Those that the operators of ops.py can run.
_OPERATORS = KernelChoice(
    "backend",
    (backend for backend in BACKENDS.values() if not backend.differentiable),
    order=lambda params: (n for n in backend_order(params) if not BACKENDS[n].differentiable),
)


def unsupported_reasons(params: AttentionParams) -> dict[str, str | None]:
    """For every backend: None if it can run the call, else the reason why not."""
    return _CHOICE.unsupported_reasons(params)


def select_backend(params: AttentionParams) -> Backend:
    """The backend of a call: the fastest that can run it for "auto", else the named one.

    Raises:
        ValueError: the name is unknown, or that backend cannot run the call.
    """
    return _select(_CHOICE, params.without_cu_seqlens())


def operator_backend(params: AttentionParams) -> Backend:
    """The backend inside the operators: eager code has selected it, compiled code passes "auto"."""
    if params.backend != "auto":
        return BACKENDS[params.backend]
    return _select(_OPERATORS, params.without_cu_seqlens())


@lru_cache(maxsize=1024)
def _select(choice: KernelChoice, params: AttentionParams) -> Backend:
    return choice.select(params, name=params.backend)
