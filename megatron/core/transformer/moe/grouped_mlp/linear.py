# Copyright (c) 2026, the megatron-core gptoss authors.

"""One matrix product for each expert's rows, and its gradients.

    y[rows of e] = x[rows of e] @ weight[e] + scale[rows of e] * bias[e]

Shapes: t rows over all experts, g experts, k inputs, n outputs. All experts are done in one kernel,
Triton's on Hopper and PyTorch's grouped_mm on Blackwell; elsewhere there is one product for each
expert that has a row.
"""

import torch
import torch.nn.functional as F

from megatron.core.transformer.moe.grouped_mlp.dispatch import (
    has_grouped_mm,
    product_kernels,
    triton_kernels,
)
from megatron.core.transformer.moe.grouped_mlp.expert_segments import RowGroups


def grouped_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    groups: RowGroups,
    bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multiply each expert's rows by its matrix, and add its bias, weighted row by row.

    Args:
        x: [t, k], any float.
        weight: [g, k, n], dtype of x.
        groups: the experts' rows; their sizes add up to t.
        bias: [g, n], any float, or None.
        scale: [t], what each row's bias is multiplied by; needed with a bias. Any float.
    Returns:
        [t, n], dtype of x.
    Raises:
        ValueError: a bias without a scale.
    """
    if bias is not None and scale is None:
        raise ValueError("grouped_linear was given a bias and no scale. Give one number a row.")
    return _GroupedLinear.apply(x, weight, bias, scale, groups)


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, scale, groups):
        ctx.groups = groups
        ctx.save_for_backward(x, weight, bias, scale)
        return grouped_product(x, weight, groups, bias, scale)

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias, scale = ctx.saved_tensors
        dy = dy.contiguous()
        dx = dweight = dbias = dscale = None
        if bias is not None and any(ctx.needs_input_grad[2:4]):
            dbias, dscale = weighted_bias_gradients(dy, bias, scale, ctx.groups)
        if ctx.needs_input_grad[0]:
            dx = grouped_product(dy, weight.transpose(1, 2), ctx.groups)
        if ctx.needs_input_grad[1]:
            dweight = grouped_weight_gradient(x, dy, ctx.groups)
        return dx, dweight, dbias, dscale, None


def grouped_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    groups: RowGroups,
    bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """[t, k] by [g, k, n], perhaps a transposed view, to [t, n], and the weighted bias; no gradient."""
    x = x.contiguous()
    if (kernels := product_kernels(x, weight)) is not None:
        if bias is not None:
            bias, scale = bias.contiguous(), scale.contiguous()
        return kernels.grouped_product(x, weight, groups.ends, bias, scale)
    if has_grouped_mm(x, weight):
        y = F.grouped_mm(x, weight, offs=groups.ends)
    else:
        y = x.new_empty(x.shape[0], weight.shape[2])
        for group, start, end in groups.slices:
            torch.mm(x[start:end], weight[group], out=y[start:end])
    if bias is not None:
        add_weighted_bias_(y, bias, scale, groups)
    return y


def grouped_weight_gradient(x: torch.Tensor, dy: torch.Tensor, groups: RowGroups) -> torch.Tensor:
    """[t, k] and [t, n] to [g, k, n]: x^T dy over each expert's rows, 0 where it has none."""
    x = x.contiguous()
    if (kernels := product_kernels(x, dy)) is not None:
        return kernels.grouped_weight_gradient(x, dy, groups.ends)
    if has_grouped_mm(x, dy):
        return zero_where_empty_(F.grouped_mm(x.t(), dy, offs=groups.ends), groups)
    dweight = x.new_zeros(groups.num_groups, x.shape[1], dy.shape[1])
    for group, start, end in groups.slices:
        torch.mm(x[start:end].t(), dy[start:end], out=dweight[group])
    return dweight


def zero_where_empty_(dweight: torch.Tensor, groups: RowGroups) -> torch.Tensor:
    """Clear what belongs to experts without a row, in place.

    A product over no rows at all is nothing that PyTorch's documentation or tests speak of.
    """
    if (kernels := triton_kernels(dweight)) is not None:
        kernels.zero_where_empty_(dweight, groups.ends)
    else:
        empty = groups.ends == torch.cat((groups.ends.new_zeros(1), groups.ends[:-1]))
        dweight.masked_fill_(empty[:, None, None], 0)
    return dweight


def add_weighted_bias_(
    y: torch.Tensor, bias: torch.Tensor, scale: torch.Tensor, groups: RowGroups
) -> None:
    """y[row] += scale[row] * bias[expert of row], rounded once to the dtype of y."""
    if (kernels := triton_kernels(y)) is not None:
        kernels.add_weighted_bias_(y, bias, scale, groups.ends)
    else:
        y.copy_(y + scale[:, None] * bias[groups.owners(y.shape[0])])


def weighted_bias_gradients(
    dy: torch.Tensor, bias: torch.Tensor, scale: torch.Tensor, groups: RowGroups
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of `add_weighted_bias_`: of bias and of scale, in their dtypes."""
    if (kernels := triton_kernels(dy)) is not None:
        return kernels.weighted_bias_gradients(dy, bias, scale, groups.ends)
    wide = torch.promote_types(torch.promote_types(dy.dtype, scale.dtype), torch.float32)
    dy = dy.to(wide)
    dbias = groups.sum_rows(dy * scale[:, None])
    dscale = (dy * bias[groups.owners(dy.shape[0])]).sum(1)
    return dbias.to(bias.dtype), dscale.to(scale.dtype)
