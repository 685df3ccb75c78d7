# Copyright (c) 2026, the megatron-core gptoss authors.

"""The experts' activation between two FP8 GEMMs: it writes e4m3, and reads no maximum first.

The clamp bounds everything: |gate| sigmoid(alpha gate) and |up| are at most `limit`, so one scale
fits every output, and a multiple of the largest |dout| of a row, which the GEMM before has found,
fits its gradient. Loose bounds cost e4m3 nothing: values keep their leading bits down to 2^-15 of a
scale's largest. `out` is unweighted; the router's weight is the row scale of the next GEMM.
"""

import torch

from megatron.core.float8 import quantize
from megatron.core.float8.quantize import place_segments, segment_max, to_e4m3
from megatron.core.transformer.moe.grouped_mlp.activation import (
    ClampedSwiGLU,
    swiglu_backward_ref,
    swiglu_forward_ref,
)
from megatron.core.transformer.moe.grouped_mlp.dispatch import ACTIVATION_FP8
from megatron.core.transformer.moe.grouped_mlp.expert_segments import ExpertSegments
from megatron.core.transformer.moe.grouped_mlp.linear import weighted_bias_gradients

# The largest slope of x sigmoid(x), at x = 2.4, is 1.0998.
_MAX_SLOPE = 1.1
# The smallest value of x sigmoid(x) is -0.2785.
_MIN_SILU = 0.2785


def out_scale(constants: ClampedSwiGLU) -> float:
    """The scale of the activation's output: a power of two."""
    largest = (constants.limit + abs(constants.offset)) * _largest_silu(constants)
    return quantize.power_of_two_scale(torch.tensor(largest)).item()


def gradient_bound(constants: ClampedSwiGLU) -> float:
    """|dgate| and |dup| are at most this times |dout * prob|."""
    return max((constants.limit + abs(constants.offset)) * _MAX_SLOPE, _largest_silu(constants))


def swiglu_forward(
    y: torch.Tensor,
    bias: torch.Tensor | None,
    segments: ExpertSegments,
    constants: ClampedSwiGLU,
) -> torch.Tensor:
    """e4m3 [t, n] of y [t, 2n]: (up + offset) * gate * sigmoid(alpha * gate) / out_scale."""
    if (kernels := ACTIVATION_FP8.select(y).module) is not None:
        return kernels.swiglu_forward(y, bias, segments.ends, constants, out_scale(constants))
    ones = torch.ones(y.shape[0], device=y.device)
    return to_e4m3(
        swiglu_forward_ref(y.float(), bias, ones, segments, constants) / out_scale(constants)
    )


def quantize_dout(
    dout: torch.Tensor, bias: torch.Tensor, probs: torch.Tensor, segments: ExpertSegments
):
    """`quantize_rows` of the output's gradient, and gradients of what `linear` adds to the output.

    Args:
        dout: bf16 [t, h].
        bias: [g, h], of fc2.
        probs: [t], the factor of the bias.
    Returns:
        e4m3 [t, h] and scales fp32 [t]; dbias [g, h] and dprobs [t], in the dtypes of both.
    """
    dout = dout.contiguous()
    if (kernels := ACTIVATION_FP8.select(dout).module) is not None:
        return kernels.quantize_dout(dout, bias, probs, segments.ends)
    return *quantize.quantize_rows(dout), *weighted_bias_gradients(dout, bias, probs, segments)


def dy_scales(
    amax: torch.Tensor, probs: torch.Tensor, segments: ExpertSegments, constants: ClampedSwiGLU
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales of the gradient of y: fp32 [t] of rows, [g] of segments.

    Args:
        amax: fp32 [parts, t], of `gemm.grouped_gemm`, of dout.
        probs: [t], the router's weights.
    """
    bound = gradient_bound(constants)
    if (kernels := ACTIVATION_FP8.select(amax).module) is not None:
        return kernels.dy_scales(amax, probs, segments.ends, bound)
    scale = quantize.power_of_two_scale(amax.amax(0) * probs.abs().float() * bound)
    return scale, segment_max(scale, segments)


def swiglu_backward(
    dout: torch.Tensor,
    y: torch.Tensor,
    bias: torch.Tensor | None,
    probs: torch.Tensor,
    scales: tuple[torch.Tensor, torch.Tensor],
    segments: ExpertSegments,
    constants: ClampedSwiGLU,
):
    """Backward of the weighted activation, and the operands of both wgrads.

    Args:
        dout: bf16 [t, n], gradient of the weighted activation.
        y: bf16 [t, 2n], before the bias.
        bias: [g, 2n] or None.
        probs: [t].
        scales: of `dy_scales`.
    Returns:
        dy: e4m3 [t, 2n] under the row scales.
        dy_t: e4m3 [2n, padded_tokens] under the segment scales.
        out_t: e4m3 [n, padded_tokens], the weighted activation, recomputed.
        out_t_scale: fp32 [g], of out_t.
        dbias: [g, 2n] in the dtype of bias, or None.
        dprobs: [t] in the dtype of probs.
    """
    # A router's weight may be above 1, with a scaling factor.
    fraction, exponent = torch.frexp(segment_max(probs.detach().float(), segments))
    weighted_scale = torch.ldexp(torch.full_like(fraction, out_scale(constants)), exponent)
    weighted_scale = torch.where(fraction.isfinite(), weighted_scale, torch.nan)
    num_columns = quantize.padded_tokens(dout, segments)
    if (kernels := ACTIVATION_FP8.select(dout).module) is not None:
        dy, dy_t, out_t, dbias, dprobs = kernels.swiglu_backward(
            dout, y, bias, probs, scales, weighted_scale, segments.ends, constants, num_columns
        )
        return dy, dy_t, out_t, weighted_scale, dbias, dprobs
    owners = segments.owners(y.shape[0])
    dy, dbias, dprobs = swiglu_backward_ref(
        dout.float(), y.float(), bias, probs, segments, constants
    )
    out = swiglu_forward_ref(y.float(), bias, probs, segments, constants)
    rows, whole = scales
    return (
        to_e4m3(dy / rows[:, None]),
        place_segments(to_e4m3(dy / whole[owners][:, None]), segments),
        place_segments(to_e4m3(out / weighted_scale[owners][:, None]), segments),
        weighted_scale,
        dbias,
        dprobs,
    )


def _largest_silu(constants: ClampedSwiGLU) -> float:
    return max(constants.limit, _MIN_SILU / constants.alpha)
