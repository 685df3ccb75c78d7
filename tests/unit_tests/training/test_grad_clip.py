# Copyright (c) 2026, the megatron-core gptoss authors.

"""Gradient norm and clipping without TransformerEngine and Apex."""

import pytest
import torch

from megatron.core.optimizer import clip_grads
from tests.harness.live_memory import LiveMemory


def gradients(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = [(33, 7), (5,), (1,), (400, 3)]
    return [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]


def test_clipped_in_place():
    """A copy of each gradient was made, 2 GB for 32 matrices of gpt-oss-20b, and copied back."""
    parameters = [torch.nn.Parameter(torch.zeros_like(value)) for value in gradients()]
    for parameter, gradient in zip(parameters, gradients()):
        parameter.grad = gradient
    memory = LiveMemory(known=[parameter.grad for parameter in parameters])
    with memory:
        clip_grads.clip_grad_by_total_norm_fp32(parameters, max_norm=1.0, total_norm=3.0)
    for parameter, gradient in zip(parameters, gradients()):
        torch.testing.assert_close(parameter.grad, gradient * (1 / (3 + 1e-6)))
    assert memory.peak <= 4  # bytes: one flag


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_norm(dtype):
    """Regression: the norm of each bf16 gradient was rounded to 8 bits."""
    grads = gradients(dtype)
    norm, _ = clip_grads.l2_norm_impl(2048 * 32, None, [grads], False)
    expected = torch.cat([value.double().flatten() for value in grads]).norm()
    assert norm.dtype == torch.float32 and norm.shape == (1,)
    torch.testing.assert_close(norm[0].double(), expected, rtol=1e-6, atol=0)


def test_norm_does_not_wait():
    """Regression: each norm was copied to the CPU separately; an empty tensor has no norm."""
    grads = [value.to("meta") for value in gradients()]
    norm, _ = clip_grads.l2_norm_impl(2048 * 32, None, [grads], False)
    assert norm.is_meta and norm.shape == (1,)


def test_norm_of_nothing():
    norm, _ = clip_grads.l2_norm_impl(2048 * 32, None, [[]], False)
    assert norm.tolist() == [0.0]
