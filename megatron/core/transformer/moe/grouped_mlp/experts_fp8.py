# Copyright (c) 2026, the megatron-core gptoss authors.

"""The experts of a layer with all six GEMMs in FP8: one autograd function.

    y    = x @ W1                      rows of x, matrices of W1
    h    = swiglu(y + b1)              one scale for all
    out  = prob * (h @ W2 + b2)        prob is h's row scale
    dh   = dout @ W2^T                 rows of dout
    dW2  = (prob * h)^T dout           segments of both
    dx   = dy @ W1^T                   rows of dy, by a bound
    dW1  = x^T dy                      segments of both

Saved for the backward: x transposed in e4m3, and y in bf16. The backward recomputes h from y.
"""

from dataclasses import dataclass

import torch

from megatron.core.float8.gemm import grouped_gemm, grouped_wgrad
from megatron.core.float8.quantize import quantize_matrices, quantize_rows, transpose_rows
from megatron.core.transformer.moe.grouped_mlp import activation_fp8
from megatron.core.transformer.moe.grouped_mlp.activation import ClampedSwiGLU
from megatron.core.transformer.moe.grouped_mlp.expert_segments import ExpertSegments
from megatron.core.transformer.transformer_config import TransformerConfig

RECIPES = ("rowwise",)
MULTIPLE = 16  # bytes of a row that TMA loads


@dataclass(frozen=True)
class QuantizedMatrices:
    """A weight [g, k, n] in e4m3.

    Attributes:
        natural: [g, k, n], for dgrad.
        transposed: [g, n, k], for the forward.
        scale: fp32 [g].
    """

    natural: torch.Tensor
    transposed: torch.Tensor
    scale: torch.Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, weight: torch.Tensor) -> "QuantizedMatrices":
        """Quantise a weight."""
        return cls(*quantize_matrices(weight))


def config_fp8_recipe(config: TransformerConfig) -> str | None:
    """The recipe of the local experts; None for GEMMs in the dtype of the weights."""
    return getattr(config, "expert_fp8_recipe", None)


def check_experts_fp8(
    config: TransformerConfig, constants: ClampedSwiGLU | None, weight: torch.Tensor
) -> None:
    """Refuse what these experts cannot compute.

    Args:
        weight: [g, f, h], of fc2 on this rank.
    Raises:
        ValueError: one sentence with what FP8 needs, and what to do.
    """
    recipe = config_fp8_recipe(config)
    width, hidden_size = weight.shape[1:]
    needs = None
    if recipe not in RECIPES:
        needs = f"one of the recipes {', '.join(RECIPES)}, not {recipe}"
    elif weight.dtype != torch.bfloat16:
        needs = f"bf16 weights, not {weight.dtype}"
    elif constants is None or constants.limit is None:
        needs = (
            "an activation with gate and clamp (activation_func_clamp_value), by which it scales"
        )
    elif width % MULTIPLE or hidden_size % MULTIPLE:
        needs = (
            f"a hidden size and an expert width on each rank in multiples of {MULTIPLE}, not "
            f"{hidden_size} and {width}"
        )
    elif weight.is_cuda and (found := torch.cuda.get_device_capability(weight.device))[0] != 9:
        needs = "a Hopper GPU (compute capability 9.0), not {}.{}".format(*found)
    if needs is not None:
        raise ValueError(f"FP8 experts need {needs}. Drop --fp8-format to train them in bf16.")


def experts_fp8(
    x: torch.Tensor,
    probs: torch.Tensor,
    weights: tuple[torch.Tensor, torch.Tensor],
    biases: tuple[torch.Tensor | None, torch.Tensor | None],
    quantized: tuple[QuantizedMatrices, QuantizedMatrices],
    segments: ExpertSegments,
    constants: ClampedSwiGLU,
) -> torch.Tensor:
    """Output of all experts.

    Args:
        x: bf16 [t, h], sorted by expert.
        probs: [t], the router's weights, any float.
        weights: bf16 [g, h, 2f] and [g, f, h]: they get the gradients.
        biases: [g, 2f] and [g, h], or None.
        quantized: the same weights in e4m3: what is multiplied.
        segments: which tokens belong to which expert.
        constants: of the activation, with a limit.
    Returns:
        bf16 [t, h].
    """
    return _ExpertsFP8.apply(x, probs, *weights, *biases, quantized, segments, constants)


class _ExpertsFP8(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, probs, weight1, weight2, bias1, bias2, quantized, segments, constants):
        fc1, fc2 = quantized
        x_rows, x_scale = quantize_rows(x)
        y = grouped_gemm(x_rows, x_scale, fc1.transposed, fc1.scale, segments)
        x_t, x_t_scale = transpose_rows(x_rows, x_scale, segments)
        del x_rows
        h = activation_fp8.swiglu_forward(y, bias1, segments, constants)
        prob = probs.float()
        scale = fc2.scale * activation_fp8.out_scale(constants)
        out = grouped_gemm(
            h, prob, fc2.transposed, scale, segments, bias2, None if bias2 is None else prob
        )
        # Saved as tensors, which the engine frees: an attribute would keep those of the last step.
        ctx.save_for_backward(
            x_t, x_t_scale, y, probs, bias1, bias2, fc1.natural, fc1.scale, fc2.natural, fc2.scale
        )
        ctx.segments, ctx.constants = segments, constants
        return out

    @staticmethod
    def backward(ctx, dout):
        x_t, x_t_scale, y, probs, bias1, bias2, *quantized = ctx.saved_tensors
        weight1, scale1, weight2, scale2 = quantized
        segments, constants = ctx.segments, ctx.constants
        dbias2 = dprobs2 = None
        if bias2 is None:
            dout_rows, dout_scale = quantize_rows(dout)
        else:
            dout_rows, dout_scale, dbias2, dprobs2 = activation_fp8.quantize_dout(
                dout, bias2, probs, segments
            )
        dh, amax = grouped_gemm(dout_rows, dout_scale, weight2, scale2, segments, row_amax=True)
        dout_t, dout_t_scale = transpose_rows(dout_rows, dout_scale, segments)
        del dout_rows
        scales = activation_fp8.dy_scales(amax, probs, segments, constants)
        dy, dy_t, h_t, h_scale, dbias1, dprobs = activation_fp8.swiglu_backward(
            dh, y, bias1, probs, scales, segments, constants
        )
        del dh, y
        dweight2 = grouped_wgrad(h_t, dout_t, h_scale * dout_t_scale, segments)
        del h_t, dout_t
        dx = grouped_gemm(dy, scales[0], weight1, scale1, segments)
        del dy
        dweight1 = grouped_wgrad(x_t, dy_t, x_t_scale * scales[1], segments)
        if dprobs2 is not None:
            dprobs = dprobs + dprobs2
        return dx, dprobs, dweight1, dweight2, dbias1, dbias2, None, None, None
