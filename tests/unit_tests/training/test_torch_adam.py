# Copyright (c) 2026, the megatron-core gptoss authors.

"""Without TransformerEngine and Apex, Adam is PyTorch's fused kernel without temporaries."""

import pytest
import torch

from megatron.core.optimizer import OptimizerConfig, _get_megatron_optimizer_based_on_param_groups
from tests.harness.live_memory import LiveMemory

SIZE = 33


def _build(decoupled):
    """A parameter and Megatron's optimizer for it."""
    parameter = torch.nn.Parameter(torch.randn(SIZE, generator=torch.Generator().manual_seed(0)))
    config = OptimizerConfig(
        optimizer="adam", lr=0.1, weight_decay=0.1, decoupled_weight_decay=decoupled, adam_eps=1e-8
    )
    group = dict(params=[parameter], lr=0.1, max_lr=0.1, min_lr=0.0, wd_mult=1.0, lr_mult=1.0)
    optimizer, _ = _get_megatron_optimizer_based_on_param_groups(
        config, [], [dict(group, is_decoupled_lr=False)], skip_megatron_wrapping=True
    )
    return parameter, optimizer


def _train(parameter, optimizer):
    """Three steps with random gradients in the parameter's dtype."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        parameter.grad = torch.randn(SIZE, generator=generator).to(parameter.dtype)
        optimizer.step()


def test_one_kernel():
    """foreach, the default on a GPU, allocates a temporary as large as all fp32 parameters."""
    parameter, optimizer = _build(True)
    _train(parameter, optimizer)  # allocates the moments
    memory = LiveMemory([parameter, parameter.grad, *optimizer.state[parameter].values()])
    with memory:
        optimizer.step()
    assert memory.peak < parameter.nbytes


@pytest.mark.parametrize("decoupled", [True, False])
def test_values(decoupled):
    """As PyTorch's unfused AdamW (decoupled weight decay) or Adam, in float64."""
    parameter, optimizer = _build(decoupled)
    expected = torch.nn.Parameter(parameter.detach().double())
    reference = torch.optim.AdamW if decoupled else torch.optim.Adam
    _train(expected, reference([expected], lr=0.1, weight_decay=0.1, eps=1e-8, foreach=False))
    _train(parameter, optimizer)
    torch.testing.assert_close(parameter.double(), expected, rtol=1e-5, atol=1e-6)
