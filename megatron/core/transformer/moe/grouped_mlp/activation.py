# Copyright (c) 2026, the megatron-core gptoss authors.

"""Bias, clamped SwiGLU and router weight of the experts in one kernel, with its own backward.

    gate, up = (y + bias[expert]).chunk(2)
    gate, up = clamp(gate, max=limit), clamp(up, -limit, limit)
    out = (up + offset) * gate * sigmoid(alpha * gate) * probs

The backward recomputes all of it from y and saves nothing else. Source: transformers
`GptOssExperts` (alpha 1.702, limit 7, offset 1); SwiGLU is alpha 1, no limit, offset 0.
"""

from dataclasses import dataclass

import torch

from megatron.core.transformer.moe.grouped_mlp.dispatch import ELEMENTWISE
from megatron.core.transformer.moe.grouped_mlp.expert_segments import ExpertSegments


@dataclass(frozen=True)
class ClampedSwiGLU:
    """The constants of the activation.

    Attributes:
        alpha: factor of the gate inside the sigmoid.
        limit: gate is clamped from above, up on both sides; None does not clamp.
        offset: added to up.
    """

    alpha: float = 1.702
    limit: float | None = 7.0
    offset: float = 1.0


def weighted_bias_swiglu(
    y: torch.Tensor,
    bias: torch.Tensor | None,
    probs: torch.Tensor,
    segments: ExpertSegments,
    constants: ClampedSwiGLU = ClampedSwiGLU(),
) -> torch.Tensor:
    """Activation of the routed tokens of all experts.

    Args:
        y: [t, 2n], gate then up, before the bias, any float. Saved for the backward.
        bias: [g, 2n], any float, or None.
        probs: [t], the router's weights, any float.
        segments: which tokens belong to which expert.
        constants: of the activation.
    Returns:
        [t, n], dtype of y, computed in fp32 at least and rounded once.
    """
    return _WeightedBiasSwiGLU.apply(y, bias, probs, segments, constants)


class _WeightedBiasSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, bias, probs, segments, constants):
        y = y.contiguous()
        ctx.segments, ctx.constants = segments, constants
        ctx.save_for_backward(y, bias, probs)
        if (kernels := ELEMENTWISE.select(y).module) is not None:
            return kernels.swiglu_forward(y, bias, probs, segments.ends, constants)
        return swiglu_forward_ref(y, bias, probs, segments, constants)

    @staticmethod
    def backward(ctx, dout):
        y, bias, probs = ctx.saved_tensors
        dout = dout.contiguous()
        if (kernels := ELEMENTWISE.select(y).module) is not None:
            grads = kernels.swiglu_backward(dout, y, bias, probs, ctx.segments.ends, ctx.constants)
        else:
            grads = swiglu_backward_ref(dout, y, bias, probs, ctx.segments, ctx.constants)
        return *grads, None, None


def swiglu_forward_ref(y, bias, probs, segments, constants):
    """`weighted_bias_swiglu` in plain PyTorch, without its gradient."""
    gate, up, _, _ = _biased_and_clamped(y, bias, probs, segments, constants)
    out = (up + constants.offset) * gate * torch.sigmoid(constants.alpha * gate)
    return (out * probs[:, None]).to(y.dtype)


def swiglu_backward_ref(dout, y, bias, probs, segments, constants):
    """The gradients of y, bias and probs, in their dtypes, from that of the output."""
    gate, up, gate_passes, up_passes = _biased_and_clamped(y, bias, probs, segments, constants)
    sigmoid = torch.sigmoid(constants.alpha * gate)
    silu = gate * sigmoid
    dout = dout.to(gate.dtype)
    dprobs = (dout * (up + constants.offset) * silu).sum(1)
    dout = dout * probs[:, None]
    dup = _where(up_passes, dout * silu)
    dsilu = sigmoid * (1 + constants.alpha * gate * (1 - sigmoid))
    dgate = _where(gate_passes, dout * (up + constants.offset) * dsilu)
    dy = torch.cat((dgate, dup), dim=1)
    dbias = None if bias is None else segments.sum_rows(dy).to(bias.dtype)
    return dy.to(y.dtype), dbias, dprobs.to(probs.dtype)


def _biased_and_clamped(y, bias, probs, segments, constants):
    """gate, up, and masks of where each passes its gradient on (at a bound it does)."""
    y = y.to(torch.promote_types(torch.promote_types(y.dtype, probs.dtype), torch.float32))
    if bias is not None:
        y = y + bias[segments.owners(y.shape[0])]
    gate, up = y.chunk(2, dim=1)
    if constants.limit is None:
        return gate, up, None, None
    limit = constants.limit
    passes = gate <= limit, (up >= -limit) & (up <= limit)
    return gate.clamp(max=limit), up.clamp(-limit, limit), *passes


def _where(passes, grad):
    return grad if passes is None else torch.where(passes, grad, 0)
