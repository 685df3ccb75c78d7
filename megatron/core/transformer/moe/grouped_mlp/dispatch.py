# Copyright (c) 2026, the megatron-core gptoss authors.

"""Which kernels run the experts of a layer on this device, for this dtype."""

import functools
from collections.abc import Sequence
from types import ModuleType

import torch
import torch.nn.functional as F

from megatron.core.triton_kernels import triton_module, triton_module_for

# The Triton kernels, where they take a tensor.
triton_kernels = functools.partial(
    triton_module_for, "megatron.core.transformer.moe.grouped_mlp.activation_triton"
)


def has_grouped_mm(*operands: torch.Tensor) -> bool:
    """Whether PyTorch's grouped_mm multiplies these.

    It takes bf16 on Hopper and Blackwell, with rows that begin at multiples of 16 bytes.
    """
    return _in_bf16_rows(operands, (9, 10)) and hasattr(F, "grouped_mm")


def product_kernels(*operands: torch.Tensor) -> ModuleType | None:
    """The Triton kernels of the experts' products, where they take these operands.

    They do on Hopper, for which their tiles are chosen: what grouped_mm takes, at addresses that are
    multiples of 16 bytes. None elsewhere, and with a triton before 3.6.
    """
    if not _in_bf16_rows(operands, (9,)) or any(x.data_ptr() % 16 for x in operands):
        return None
    return triton_module("megatron.core.transformer.moe.grouped_mlp.gemm_triton")


def _in_bf16_rows(operands: Sequence[torch.Tensor], majors: tuple[int, ...]) -> bool:
    """bf16 on a device of such a compute capability, in rows of multiples of 16 bytes, not empty."""
    return all(
        x.is_cuda
        and x.dtype == torch.bfloat16
        and x.numel() > 0
        and all(size % 8 == 0 for size in x.shape[1:])
        and _compute_major(x.device) in majors
        for x in operands
    )


@functools.cache
def _compute_major(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]
