# Copyright (c) 2026, the megatron-core gptoss authors.

"""Attention's bias and the residual added in one pass, where there is no dropout.

A layer spec takes `get_bias_residual_add` in place of upstream's `get_bias_dropout_add`. Upstream's
own fusion (--bias-dropout-fusion) is torch.compile of a function that its warm-up first calls with a
dropout of 0.1, and that a run calls with and without bias, with and without gradient, at one length
and at others: that is past PyTorch's limit of 8 graphs, after which it runs uncompiled.
"""

import functools
from typing import Callable

import torch
from torch import Tensor

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.triton_kernels import triton_module

# How it runs on CUDA: 'triton', or 'eager' (upstream's). benchmarks/elementwise.py compares them.
IMPLEMENTATION = 'triton'
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_triton_module = functools.partial(
    triton_module, 'megatron.core.fusions.fused_bias_residual_triton'
)


def get_bias_residual_add(training: bool, fused: bool) -> Callable:
    """As `get_bias_dropout_add`: a function of ((x, bias), residual, prob).

    On CUDA, without dropout and with a bias, x + bias + residual is computed in fp32 and rounded
    once; anything else is upstream's function.
    """
    upstream = get_bias_dropout_add(training, fused)

    def add(x_with_bias, residual, prob):
        x, bias = x_with_bias
        if bias is None or (training and prob > 0) or not _takes(x, bias, residual):
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


def _takes(x: Tensor, bias: Tensor, residual: Tensor) -> bool:
    return (
        IMPLEMENTATION == 'triton'
        and x.is_cuda
        and x.dtype in _DTYPES
        and x.dtype == residual.dtype == bias.dtype
        and x.shape == residual.shape
        and x.dim() > 1
        and bias.shape == x.shape[-1:]
        and _triton_module() is not None
    )


class _AddBiasAndResidual(torch.autograd.Function):
    """Nothing is kept for the backward."""

    @staticmethod
    def forward(ctx, x, bias, residual):
        return _triton_module().add_bias_and_residual(x, bias, residual)

    @staticmethod
    def backward(ctx, dout):
        dbias = None
        if ctx.needs_input_grad[1]:
            dbias = dout.sum(dim=tuple(range(dout.dim() - 1)))  # PyTorch's sums are fp32
        return dout, dbias, dout
