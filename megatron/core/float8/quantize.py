# Copyright (c) 2026, the megatron-core gptoss authors.

"""Quantise GEMM operands to e4m3 with scales that are powers of two.

A scale is the smallest power of two that keeps what it divides within 448, e4m3's largest value. So
a value keeps its leading bits whatever the scale, and a second scaling by a power of two does not
round again: a row and its transposed copy hold the same numbers. Weights that were MXFP4 are exact.
A row, segment or matrix with infinity or NaN has a scale of NaN, and every product with it is NaN.

Shapes: t tokens of all experts, sorted by expert; g experts; h columns.
"""

import torch

from megatron.core.kernel_selection import KernelChoice, PyTorchOperations, TritonKernels
from megatron.core.transformer.moe.grouped_mlp.expert_segments import ExpertSegments

E4M3 = torch.float8_e4m3fn
SEGMENT = 256  # segments of a transposed operand are padded to multiples of it
_SMALLEST = 2.0**-126


class Float8Kernels(TritonKernels):
    """Triton kernels that write e4m3: they need compute capability 8.9."""

    dtypes = (torch.bfloat16, torch.float16, torch.float32, E4M3)

    def unsupported_reason(self, *tensors: torch.Tensor) -> str | None:
        reason = super().unsupported_reason(*tensors)
        if reason is None and any(tensor.numel() == 0 for tensor in tensors):
            reason = "needs non-empty tensors"
        if reason is None and torch.cuda.get_device_capability(tensors[0].device) < (8, 9):
            reason = "e4m3 needs a CUDA device of compute capability 8.9 or above"
        return reason


QUANTIZE = KernelChoice(
    "float8_quantize",
    (Float8Kernels("megatron.core.float8.quantize_triton"), PyTorchOperations()),
)


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise each row by its own scale.

    Args:
        x: [t, h], bf16, fp16 or fp32.
    Returns:
        e4m3 [t, h] and the scales, fp32 [t]: x ~ q * scale[:, None].
    """
    x = x.contiguous()
    if (kernels := _kernels(x)) is not None:
        return kernels.quantize_rows(x)
    scale = power_of_two_scale(_amax(x, 1))
    return to_e4m3(x.float() / scale[:, None]), scale


def quantize_matrices(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantise the matrix of each expert by its own scale, in both layouts.

    Args:
        weight: [g, k, n], bf16, fp16 or fp32.
    Returns:
        e4m3 [g, k, n]; the same numbers transposed, contiguous [g, n, k]; the scales, fp32 [g].
    """
    weight = weight.contiguous()
    # Triton 3.6 transposes an e4m3 tile that was loaded as fp32 wrongly on sm90; as bf16 rightly.
    kernels = _kernels(weight) if weight.dtype == torch.bfloat16 else None
    if kernels is not None:
        return kernels.quantize_matrices(weight)
    scale = power_of_two_scale(_amax(weight, (1, 2)))
    q = to_e4m3(weight.float() / scale[:, None, None])
    return q, q.transpose(1, 2).contiguous(), scale


def transpose_rows(
    q: torch.Tensor, scale: torch.Tensor, segments: ExpertSegments
) -> tuple[torch.Tensor, torch.Tensor]:
    """The operand of wgrad: rows transposed, each expert's segment under one scale.

    Args:
        q, scale: e4m3 [t, h] and fp32 [t], of `quantize_rows`.
        segments: which rows belong to which expert.
    Returns:
        e4m3 [h, padded_tokens], where the segment of each expert starts at a multiple of
        SEGMENT and is padded with zeros (columns past the last segment are undefined); and the
        scales, fp32 [g]. A value below 2^-9 of its segment's scale becomes 0.
    """
    if (kernels := _kernels(q)) is not None:
        return kernels.transpose_rows(q, scale, segments.ends, padded_tokens(q, segments))
    segment_scale = segment_max(scale, segments)
    factor = scale / segment_scale[segments.owners(q.shape[0])]
    return place_segments(to_e4m3(q.float() * factor[:, None]), segments), segment_scale


def padded_tokens(rows: torch.Tensor, segments: ExpertSegments) -> int:
    """Columns of a transposed operand: an upper bound that needs no count from the device."""
    return padded_count(rows.shape[0]) + segments.num_experts * SEGMENT


def padded_count(count: int) -> int:
    """Columns of a segment of `count` tokens."""
    return -(-count // SEGMENT) * SEGMENT


def segment_max(scale: torch.Tensor, segments: ExpertSegments) -> torch.Tensor:
    """[t] to [g]: the largest magnitude of each segment, NaN above all; 1 for an empty one."""
    if (kernels := _kernels(scale)) is not None:
        return kernels.segment_max(scale, segments.ends)
    largest = scale.new_ones(segments.num_experts)
    for expert, start, end in segments.slices:
        largest[expert] = scale[start:end].abs().amax()
    return largest


def power_of_two_scale(amax: torch.Tensor) -> torch.Tensor:
    """The smallest power of two s with amax / s <= 448, fp32; NaN for infinity and NaN."""
    fraction, exponent = torch.frexp(amax.float())  # fraction in [0.5, 1); 448 = 0.875 x 2^9
    exponent = exponent - 9 + (fraction > 0.875).int()
    scale = torch.ldexp(torch.ones_like(fraction), exponent).clamp_min(_SMALLEST)
    scale = torch.where(amax > 0, scale, _SMALLEST)
    return torch.where(torch.isfinite(amax), scale, torch.nan)


def to_e4m3(x: torch.Tensor) -> torch.Tensor:
    """Round to e4m3; values past 448 saturate, NaN stays."""
    return x.clamp(-448, 448).to(E4M3)


def place_segments(rows: torch.Tensor, segments: ExpertSegments) -> torch.Tensor:
    """[t, h] to [h, padded_tokens]: transposed, with each segment where wgrad expects it."""
    placed = rows.new_zeros(rows.shape[1], padded_tokens(rows, segments))
    column = 0
    for _, start, end in segments.slices:
        placed[:, column : column + end - start] = rows[start:end].t()
        column += padded_count(end - start)
    return placed


def _amax(x, dim):
    return x.abs().amax(dim).float()


def _kernels(*tensors):
    return QUANTIZE.select(*tensors).module
