# Copyright (c) 2026, the megatron-core gptoss authors.

"""Which backends there are, which of them can run a case, and which one "auto" takes."""

from functools import lru_cache

from megatron.core.transformer.sink_attention.attention_params import Case
from megatron.core.transformer.sink_attention.autotable import order
from megatron.core.transformer.sink_attention.backends.aten_fa2 import AtenFlashBackend
from megatron.core.transformer.sink_attention.backends.base import Backend
from megatron.core.transformer.sink_attention.backends.cudnn import CudnnBackend
from megatron.core.transformer.sink_attention.backends.fa2 import Flash2Backend
from megatron.core.transformer.sink_attention.backends.fa3 import Flash3Backend
from megatron.core.transformer.sink_attention.backends.fa4 import Flash4Backend, Flash4NativeBackend
from megatron.core.transformer.sink_attention.backends.flex import FlexBackend
from megatron.core.transformer.sink_attention.backends.math import MathBackend

BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Flash4Backend(),
        Flash4NativeBackend(),
        Flash3Backend(),
        Flash2Backend(),
        CudnnBackend(),
        AtenFlashBackend(),
        FlexBackend(),
        MathBackend(),
    )
}


def why_not(case: Case) -> dict[str, str | None]:
    """For every backend: None if it can run the case, else the reason in one sentence."""
    return {name: backend.why_not(case) for name, backend in BACKENDS.items()}


@lru_cache(maxsize=1024)
def choose(case: Case, name: str = "auto", operators_only: bool = False) -> Backend:
    """The backend of a call.

    Args:
        name: "auto" or a backend's. One that is named must be able to run the case.
        operators_only: leave out, for "auto", what is made of differentiable operations.
    Raises:
        ValueError: the name is unknown, or that backend cannot run the case; says which can.
    """
    if name == "auto":
        # math runs everything, so there always is one.
        backends = (BACKENDS[n] for n in order(case))
        backends = (b for b in backends if not (operators_only and b.differentiable))
        return next(b for b in backends if b.why_not(case) is None)
    if name not in BACKENDS:
        raise ValueError(f"backend: '{name}' is unknown; wanted 'auto' or one of {_names()}.")
    reason = BACKENDS[name].why_not(case)
    if reason is not None:
        able = ", ".join(n for n, problem in why_not(case).items() if problem is None)
        raise ValueError(f"backend: '{name}' cannot run this call: {reason}. Able here: {able}.")
    return BACKENDS[name]


def _names() -> str:
    return ", ".join(f"'{name}'" for name in BACKENDS)
