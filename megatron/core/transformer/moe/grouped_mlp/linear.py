# Copyright (c) 2026, the megatron-core gptoss authors.

"""Grouped GEMM: one GEMM per expert over its routed tokens, and its gradients.

    y[tokens of e] = x[tokens of e] @ weight[e] + scale[tokens of e] * bias[e]

Shapes: t routed tokens over all experts, g experts, k inputs, n outputs. One kernel runs all
experts, Triton's on Hopper and PyTorch's grouped_mm on Blackwell (`dispatch.GEMM`); elsewhere there
is one GEMM for each expert that has a token.
"""

import torch
import torch.nn.functional as F

from megatron.core.transformer.moe.grouped_mlp.dispatch import ELEMENTWISE, GEMM
from megatron.core.transformer.moe.grouped_mlp.expert_segments import ExpertSegments


def grouped_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    segments: ExpertSegments,
    bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multiply the routed tokens of each expert by its weight, and add its bias, scaled per token.

    Args:
        x: [t, k], any float.
        weight: [g, k, n], dtype of x.
        segments: which tokens belong to which expert.
        bias: [g, n], any float, or None.
        scale: [t], factor of the bias of each token; needed with a bias. Any float.
    Returns:
        [t, n], dtype of x.
    Raises:
        ValueError: a bias without a scale.
    """
    if bias is not None and scale is None:
        raise ValueError("grouped_linear: bias without scale. Give one scale per routed token.")
    return _GroupedLinear.apply(x, weight, bias, scale, segments)


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, scale, segments):
        ctx.segments = segments
        ctx.save_for_backward(x, weight, bias, scale)
        return grouped_gemm(x, weight, segments, bias, scale)

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias, scale = ctx.saved_tensors
        dy = dy.contiguous()
        dx = dweight = dbias = dscale = None
        if bias is not None and any(ctx.needs_input_grad[2:4]):
            dbias, dscale = weighted_bias_gradients(dy, bias, scale, ctx.segments)
        if ctx.needs_input_grad[0]:
            dx = grouped_gemm(dy, weight.transpose(1, 2), ctx.segments)
        if ctx.needs_input_grad[1]:
            dweight = grouped_wgrad(x, dy, ctx.segments)
        return dx, dweight, dbias, dscale, None


def grouped_gemm(
    x: torch.Tensor,
    weight: torch.Tensor,
    segments: ExpertSegments,
    bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Forward of `grouped_linear`, and dgrad with transposed views of the weight; no autograd."""
    x = x.contiguous()
    gemm = GEMM.select(x, weight)
    if gemm.name == "triton":
        if bias is not None:
            bias, scale = bias.contiguous(), scale.contiguous()
        return gemm.module.grouped_gemm(x, weight, segments.ends, bias, scale)
    if gemm.name == "grouped_mm":
        y = F.grouped_mm(x, weight, offs=segments.ends)
    else:
        y = x.new_empty(x.shape[0], weight.shape[2])
        for expert, start, end in segments.slices:
            torch.mm(x[start:end], weight[expert], out=y[start:end])
    if bias is not None:
        add_weighted_bias_(y, bias, scale, segments)
    return y


def grouped_wgrad(x: torch.Tensor, dy: torch.Tensor, segments: ExpertSegments) -> torch.Tensor:
    """wgrad: [t, k] and [t, n] to [g, k, n], x^T dy per expert, 0 for an expert without tokens."""
    x = x.contiguous()
    gemm = GEMM.select(x, dy)
    if gemm.name == "triton":
        return gemm.module.grouped_wgrad(x, dy, segments.ends)
    if gemm.name == "grouped_mm":
        return zero_where_empty_(F.grouped_mm(x.t(), dy, offs=segments.ends), segments)
    dweight = x.new_zeros(segments.num_experts, x.shape[1], dy.shape[1])
    for expert, start, end in segments.slices:
        torch.mm(x[start:end].t(), dy[start:end], out=dweight[expert])
    return dweight


def zero_where_empty_(dweight: torch.Tensor, segments: ExpertSegments) -> torch.Tensor:
    """Zero the gradient of experts without a token, in place: grouped_mm does not document it."""
    if (kernels := ELEMENTWISE.select(dweight).module) is not None:
        kernels.zero_where_empty_(dweight, segments.ends)
    else:
        empty = segments.ends == torch.cat((segments.ends.new_zeros(1), segments.ends[:-1]))
        dweight.masked_fill_(empty[:, None, None], 0)
    return dweight


def add_weighted_bias_(
    y: torch.Tensor, bias: torch.Tensor, scale: torch.Tensor, segments: ExpertSegments
) -> None:
    """y[token] += scale[token] * bias[expert of token], rounded once to the dtype of y."""
    if (kernels := ELEMENTWISE.select(y).module) is not None:
        kernels.add_weighted_bias_(y, bias, scale, segments.ends)
    else:
        y.copy_(y + scale[:, None] * bias[segments.owners(y.shape[0])])


def weighted_bias_gradients(
    dy: torch.Tensor, bias: torch.Tensor, scale: torch.Tensor, segments: ExpertSegments
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of bias and scale in `add_weighted_bias_`, in their dtypes."""
    if (kernels := ELEMENTWISE.select(dy).module) is not None:
        return kernels.weighted_bias_gradients(dy, bias, scale, segments.ends)
    wide = torch.promote_types(torch.promote_types(dy.dtype, scale.dtype), torch.float32)
    dy = dy.to(wide)
    dbias = segments.sum_rows(dy * scale[:, None])
    dscale = (dy * bias[segments.owners(dy.shape[0])]).sum(1)
    return dbias.to(bias.dtype), dscale.to(scale.dtype)
