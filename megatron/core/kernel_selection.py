# Copyright (c) 2026, the megatron-core gptoss authors.

"""Which implementation of an operation runs: the one mechanism for attention, experts and fusions.

An operation has a `KernelChoice` of implementations, each of which states why it cannot run a call.
`select` returns the first that can. The order is that of the list, or a measured one.
"""

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Protocol

import torch


class Implementation(Protocol):
    """One implementation of an operation.

    Attributes:
        name: unique among the implementations of the operation.
    """

    name: str

    def unsupported_reason(self, *call) -> str | None:
        """Why it cannot run a call, one sentence; None if it can."""


class KernelChoice:
    """The implementations of one operation.

    Args:
        argument: the argument or flag that names one of them, for messages.
        implementations: the fastest first; one of them supports every call.
        order: function of a call that returns the names to try, the fastest first; by default all
            names in the given order.
    """

    def __init__(
        self,
        argument: str,
        implementations: Iterable[Implementation],
        order: Callable[..., Iterable[str]] | None = None,
    ):
        self.argument = argument
        self.implementations = {x.name: x for x in implementations}
        self._order = order if order is not None else lambda *call: self.implementations
        self._preferred: tuple[str, ...] = ()

    def unsupported_reasons(self, *call) -> dict[str, str | None]:
        """For every implementation: None if it can run the call, else the reason why not."""
        return {name: x.unsupported_reason(*call) for name, x in self.implementations.items()}

    def select(self, *call, name: str = "auto") -> Implementation:
        """The implementation that runs a call.

        Args:
            name: "auto" for the first that can run it, or a name.
        Raises:
            ValueError: the name is unknown, or that implementation cannot run the call.
        """
        if name == "auto":
            names = (*self._preferred, *self._order(*call), *self.implementations)
            candidates = (self.implementations[n] for n in names)
            return next(x for x in candidates if x.unsupported_reason(*call) is None)
        if name not in self.implementations:
            names = ", ".join(f"'{n}'" for n in self.implementations)
            raise ValueError(
                f"{self.argument}: '{name}' is unknown; wanted 'auto' or one of {names}."
            )
        reason = self.implementations[name].unsupported_reason(*call)
        if reason is not None:
            reasons = self.unsupported_reasons(*call)
            supported = ", ".join(n for n, problem in reasons.items() if problem is None)
            raise ValueError(
                f"{self.argument}: '{name}' cannot run this call: {reason}. Supported here: "
                f"{supported}."
            )
        return self.implementations[name]

    @contextlib.contextmanager
    def prefer(self, name: str) -> Iterator[None]:
        """Try one implementation before all others, for benchmarks and tests."""
        if name not in self.implementations:
            raise ValueError(f"{self.argument}: '{name}' is unknown.")
        before, self._preferred = self._preferred, (name,)
        try:
            yield
        finally:
            self._preferred = before


class TritonKernels:
    """The Triton kernels of a module, which compute in fp32 on CUDA tensors.

    Args:
        module: full name of the module; it is imported at the first call that could use it.
    """

    name = "triton"
    dtypes = (torch.bfloat16, torch.float16, torch.float32)

    def __init__(self, module: str):
        self._module = module

    @functools.cached_property
    def module(self) -> ModuleType:
        """The module with the kernels."""
        return importlib.import_module(self._module)

    @functools.cached_property
    def _missing(self) -> str | None:
        # Only what is not installed: a defect of the kernels must not select another implementation.
        try:
            self.module
        except ImportError as error:
            return f"importing {self._module} failed: {error}"
        return None

    def unsupported_reason(self, *tensors: torch.Tensor) -> str | None:
        if not all(tensor.is_cuda for tensor in tensors):
            return "needs CUDA tensors"
        if not all(tensor.dtype in self.dtypes for tensor in tensors):
            return "computes in fp32 and takes bf16, fp16 and fp32"
        return self._missing


class PyTorchOperations:
    """Plain PyTorch, for every call."""

    module = None

    def __init__(self, name: str = "torch"):
        self.name = name

    def unsupported_reason(self, *call) -> None:
        return None


def triton_or_torch(argument: str, module: str) -> KernelChoice:
    """Triton kernels where they run, plain PyTorch elsewhere.

    `select(*tensors).module` is the module of the kernels, or None for plain PyTorch.
    """
    return KernelChoice(argument, (TritonKernels(module), PyTorchOperations()))


@functools.cache
def import_problem(module: str) -> str | None:
    """Why a module does not import; None if it does. Imports it."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and module.startswith(error.name):
            return f"the Python module {module} is not installed"
        return f"importing {module} failed: {error}"
    except Exception as error:  # a broken build raises any exception
        return f"importing {module} failed: {type(error).__name__}: {str(error).splitlines()[0]}"
    return None
