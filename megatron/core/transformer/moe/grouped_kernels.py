# Copyright (c) 2026, the megatron-core gptoss authors.

"""Which kernels run the experts of a layer on this device, for this dtype."""

import functools
from types import ModuleType

import torch
import torch.nn.functional as F


def has_grouped_mm(dtype: torch.dtype, device: torch.device, *sizes: int) -> bool:
    """Whether PyTorch's grouped_mm multiplies matrices of these inner and outer sizes.

    It takes bf16 on Hopper and Blackwell, with rows that begin at multiples of 16 bytes.
    """
    return (
        device.type == "cuda"
        and dtype == torch.bfloat16
        and all(size > 0 and size % 8 == 0 for size in sizes)
        and _compute_major(device) in (9, 10)
        and hasattr(F, "grouped_mm")
    )


def triton_kernels(tensor: torch.Tensor) -> ModuleType | None:
    """The Triton kernels, where they take this tensor; they compute in fp32."""
    if tensor.is_cuda and tensor.dtype in (torch.bfloat16, torch.float16, torch.float32):
        return _triton_module()
    return None


@functools.cache
def _triton_module() -> ModuleType | None:
    try:
        from megatron.core.transformer.moe import grouped_experts_triton
    except ImportError:
        return None
    return grouped_experts_triton


@functools.cache
def _compute_major(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]
