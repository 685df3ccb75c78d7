# Copyright (c) 2026, the megatron-core gptoss authors.

"""Which kernels run the experts of a layer on this device, for this dtype."""

import functools
from types import ModuleType

import torch
import torch.nn.functional as F

from megatron.core.triton_kernels import triton_module, triton_module_for

# The Triton kernels, where they take a tensor.
triton_kernels = functools.partial(
    triton_module_for, "megatron.core.transformer.moe.grouped_experts_triton"
)


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


def product_kernels(*tensors: torch.Tensor) -> ModuleType | None:
    """The Triton kernels of the experts' products, where they take these operands.

    They do on Hopper, for which their tiles are chosen: bf16, and rows as grouped_mm wants them.
    None elsewhere, and with a triton before 3.6.
    """
    first = tensors[0]
    takes = (
        first.device.type == "cuda"
        and _compute_major(first.device) == 9
        and all(
            tensor.dtype == torch.bfloat16
            and tensor.numel() > 0
            and tensor.data_ptr() % 16 == 0
            and all(size % 8 == 0 for size in tensor.shape[1:])
            for tensor in tensors
        )
    )
    return triton_module("megatron.core.transformer.moe.grouped_product_triton") if takes else None


@functools.cache
def _compute_major(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]
