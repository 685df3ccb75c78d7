# Copyright (c) 2026, the megatron-core gptoss authors.

"""Bias of the attention output and residual added in one kernel, without dropout.

A layer spec uses `get_bias_residual_add` in place of upstream's `get_bias_dropout_add`. Upstream's
fusion (--bias-dropout-fusion) is torch.compile of a function that is called with and without
dropout, bias and gradient, and with several lengths. That exceeds PyTorch's limit of 8 graphs, and
the function then runs uncompiled.
"""

from typing import Callable

import torch
from torch import Tensor

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.kernel_selection import KernelChoice, PyTorchOperations, TritonKernels


class _TritonAdd(TritonKernels):
    """x + bias + residual of one dtype in one kernel."""

    def unsupported_reason(self, x: Tensor, bias: Tensor, residual: Tensor) -> str | None:
        if not x.dtype == residual.dtype == bias.dtype:
            return "needs one dtype"
        if x.dim() < 2 or x.shape != residual.shape or bias.shape != x.shape[-1:]:
            return "needs x and residual of one shape [..., h] and a bias [h]"
        return super().unsupported_reason(x)


_TRITON = _TritonAdd("megatron.core.fusions.fused_bias_residual_triton")
# benchmarks/kernels/elementwise.py compares them; 'eager' is upstream's function.
BIAS_RESIDUAL = KernelChoice("bias_residual", (_TRITON, PyTorchOperations("eager")))


def get_bias_residual_add(training: bool, fused: bool) -> Callable:
    """As `get_bias_dropout_add`: a function of ((x, bias), residual, prob).

    On CUDA, with a bias and without dropout, it computes x + bias + residual in fp32 and rounds
    once. Otherwise it is upstream's function.
    """
    upstream = get_bias_dropout_add(training, fused)

    def add(x_with_bias, residual, prob):
        x, bias = x_with_bias
        if bias is None or (training and prob > 0) or not _runs_on_triton(x, bias, residual):
            return upstream(x_with_bias, residual, prob)
        return add_bias_and_residual(x, bias, residual)

    return add


def add_bias_and_residual(x: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    """x + bias + residual by the Triton kernel.

    Args:
        x: [s, b, h] or any [..., h], on CUDA.
        bias: [h].
        residual: as x, in its dtype.
    Returns:
        As x, contiguous. The gradient of x and of residual is that of the output, the same tensor.
    """
    return _AddBiasAndResidual.apply(x, bias, residual)


def add_bias_and_residual_ref(x: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    """The same in plain PyTorch: in fp32 (fp64 for fp64), rounded once."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.to(wide) + bias.to(wide) + residual.to(wide)).to(x.dtype)


def _runs_on_triton(x: Tensor, bias: Tensor, residual: Tensor) -> bool:
    return BIAS_RESIDUAL.select(x, bias, residual) is _TRITON


class _AddBiasAndResidual(torch.autograd.Function):
    """Saves nothing for the backward."""

    @staticmethod
    def forward(ctx, x, bias, residual):
        return _TRITON.module.add_bias_and_residual(x, bias, residual)

    @staticmethod
    def backward(ctx, dout):
        dbias = None
        if ctx.needs_input_grad[1]:
            dbias = dout.sum(dim=tuple(range(dout.dim() - 1)))  # PyTorch's sums are fp32
        return dout, dbias, dout
