# Copyright (c) 2026, the megatron-core gptoss authors.

"""Modules of Triton kernels: where triton is missing, plain PyTorch takes their place."""

import functools
import importlib
from types import ModuleType

import torch


@functools.cache
def triton_module(name: str) -> ModuleType | None:
    """The module of this name, or None where it cannot be imported."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def triton_module_for(name: str, tensor: torch.Tensor) -> ModuleType | None:
    """The same, or None for a tensor that kernels which compute in fp32 do not take."""
    if tensor.is_cuda and tensor.dtype in (torch.bfloat16, torch.float16, torch.float32):
        return triton_module(name)
    return None
