# Copyright (c) 2026, the megatron-core gptoss authors.

"""Grouped GEMM with e4m3 operands: one GEMM per expert over its tokens, in bf16 out of fp32 sums.

Operands come from `quantize`. Shapes: t tokens of all experts, g experts, k inputs, n outputs.
Triton kernels run on Hopper; elsewhere, and as their reference, the operands are dequantised and
multiplied in fp32.
"""

import torch

from megatron.core.float8.quantize import E4M3, padded_count
from megatron.core.kernel_selection import KernelChoice, PyTorchOperations, TritonKernels
from megatron.core.transformer.moe.grouped_mlp.expert_segments import ExpertSegments


class _Float8Gemm(TritonKernels):
    """The tiles are chosen for Hopper; TMA needs rows of multiples of 16 bytes."""

    dtypes = (E4M3,)

    def unsupported_reason(self, *operands: torch.Tensor) -> str | None:
        reason = super().unsupported_reason(*operands)
        if reason is None and torch.cuda.get_device_capability(operands[0].device)[0] != 9:
            reason = "needs a CUDA device of compute capability 9.0"
        if reason is None and any(x.shape[-1] % 16 or x.numel() == 0 for x in operands):
            reason = "needs non-empty operands with rows of multiples of 16 bytes"
        return reason


GEMM = KernelChoice(
    "float8_gemm", (_Float8Gemm("megatron.core.float8.gemm_triton"), PyTorchOperations())
)


def grouped_gemm(
    x: torch.Tensor,
    row_scale: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    segments: ExpertSegments,
    bias: torch.Tensor | None = None,
    bias_scale: torch.Tensor | None = None,
    row_amax: bool = False,
):
    """y[row] = row_scale[row] * scale[e] * (x[row] @ weight[e]^T) + bias_scale[row] * bias[e].

    Args:
        x: e4m3 [t, k], sorted by expert.
        row_scale: fp32 [t].
        weight: e4m3 [g, n, k].
        scale: fp32 [g].
        segments: which rows belong to which expert.
        bias, bias_scale: any float, [g, n] and [t]; or None.
        row_amax: also return fp32 [parts, t], whose maximum over `parts` is that of |y| in each row.
    Returns:
        bf16 [t, n], rounded once; with row_amax a tuple.
    """
    if (kernels := GEMM.select(x, weight).module) is not None:
        return kernels.grouped_gemm(
            x, row_scale, weight, scale, segments.ends, bias, bias_scale, row_amax
        )
    y = row_scale.new_empty(x.shape[0], weight.shape[1])
    for expert, start, end in segments.slices:
        y[start:end] = x[start:end].float() @ weight[expert].float().t() * scale[expert]
    y *= row_scale[:, None]
    if bias is not None:
        y += bias_scale[:, None] * bias[segments.owners(y.shape[0])]
    y = y.to(torch.bfloat16)
    return (y, y.abs().amax(1).float()[None]) if row_amax else y


def grouped_wgrad(
    x: torch.Tensor,
    dy: torch.Tensor,
    scale: torch.Tensor,
    segments: ExpertSegments,
    total: torch.Tensor | None = None,
) -> torch.Tensor:
    """scale[e] * x^T dy over each expert's tokens, 0 where it has none.

    Args:
        x, dy: e4m3 [k, padded_tokens] and [n, padded_tokens], of `quantize.transpose_rows`.
        scale: fp32 [g], the product of both scales.
        segments: the tokens of each expert.
        total: fp32 [g, k, n], to which the products are added; None for a new tensor.
    Returns:
        `total`, or bf16 [g, k, n].
    """
    if (kernels := GEMM.select(x, dy).module) is not None:
        return kernels.grouped_wgrad(x, dy, scale, segments.ends, total)
    dweight = scale.new_zeros(segments.num_experts, x.shape[0], dy.shape[0])
    column = 0
    for expert, start, end in segments.slices:
        tokens = slice(column, column + end - start)
        dweight[expert] = x[:, tokens].float() @ dy[:, tokens].float().t() * scale[expert]
        column += padded_count(end - start)
    return dweight.to(torch.bfloat16) if total is None else total.add_(dweight)
