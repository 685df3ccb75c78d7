# Copyright (c) 2026, the megatron-core gptoss authors.

"""Which kernels run the experts of a layer, for these tensors."""

import functools

import torch
import torch.nn.functional as F

from megatron.core.float8.quantize import Float8Kernels
from megatron.core.kernel_selection import (
    KernelChoice,
    PyTorchOperations,
    TritonKernels,
    triton_or_torch,
)

_PACKAGE = "megatron.core.transformer.moe.grouped_mlp."


class _GroupedMM:
    """PyTorch's grouped_mm, which takes bf16 on Hopper and Blackwell."""

    name = "grouped_mm"

    def unsupported_reason(self, *operands: torch.Tensor) -> str | None:
        if not hasattr(F, "grouped_mm"):
            return "this PyTorch has no grouped_mm"
        return _layout_problem(operands, (9, 10))


class _TritonGemm(TritonKernels):
    """Our Triton kernels, whose tiles are chosen for Hopper; TMA needs aligned addresses."""

    def unsupported_reason(self, *operands: torch.Tensor) -> str | None:
        reason = _layout_problem(operands, (9,))
        if reason is None and any(x.data_ptr() % 16 for x in operands):
            reason = "needs addresses that are multiples of 16 bytes"
        return reason or super().unsupported_reason(*operands)


# The GEMMs; "torch" is one GEMM per expert.
GEMM = KernelChoice(
    "grouped_gemm", (_TritonGemm(_PACKAGE + "gemm_triton"), _GroupedMM(), PyTorchOperations())
)
# The elementwise operations on the routed tokens of all experts, and their sums per expert.
ELEMENTWISE = triton_or_torch("grouped_elementwise", _PACKAGE + "activation_triton")
# The activation between two FP8 GEMMs.
ACTIVATION_FP8 = KernelChoice(
    "activation_fp8", (Float8Kernels(_PACKAGE + "activation_fp8_triton"), PyTorchOperations())
)
# The sum of the rows of each token in unpermute.
UNPERMUTE = triton_or_torch("unpermute", _PACKAGE + "permute_triton")


def _layout_problem(operands: tuple[torch.Tensor, ...], majors: tuple[int, ...]) -> str | None:
    """None for non-empty bf16 operands with rows of multiples of 16 bytes on such a device."""
    for x in operands:
        if not x.is_cuda or _compute_major(x.device) not in majors:
            return "needs a CUDA device of compute capability " + " or ".join(map(str, majors))
        if x.dtype != torch.bfloat16 or x.numel() == 0 or any(n % 8 for n in x.shape[1:]):
            return "needs non-empty bf16 operands with rows of multiples of 16 bytes"
    return None


@functools.cache
def _compute_major(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]
