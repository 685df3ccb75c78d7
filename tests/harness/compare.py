# Copyright (c) 2026, the megatron-core gptoss authors.

"""Errors of a tensor against its reference."""

import torch


def relative_error(
    value: torch.Tensor, expected: torch.Tensor, scale: torch.Tensor | None = None
) -> float:
    """Norm of the difference over the norm of `expected`, in float64; 0 for two empty tensors.

    Args:
        value: any float dtype, on the device of `expected`.
        expected: same shape as `value`.
        scale: its norm replaces that of `expected`, where `expected` is one rank's part or is tiny.
    """
    assert value.shape == expected.shape
    value, expected = value.detach().double(), expected.detach().double()
    scale = expected if scale is None else scale.detach().double()
    return ((value - expected).norm() / scale.norm().clamp_min(1e-300)).item()
