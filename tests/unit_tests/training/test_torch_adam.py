# Copyright (c) 2026, the megatron-core gptoss authors.

"""Without TransformerEngine and Apex, AdamW is PyTorch's, in the form that needs no memory of its own."""

import pytest
import torch

from megatron.core.optimizer import OptimizerConfig, _get_megatron_optimizer_based_on_param_groups


def _step(decoupled):
    """A parameter after three steps, and the optimizer's defaults."""
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(33))
    start = parameter.detach().clone()
    gradients = torch.randn(3, 33)
    config = OptimizerConfig(
        optimizer="adam", lr=0.1, weight_decay=0.1, decoupled_weight_decay=decoupled, adam_eps=1e-8
    )
    group = dict(params=[parameter], lr=0.1, max_lr=0.1, min_lr=0.0, wd_mult=1.0, lr_mult=1.0)
    optimizer, _ = _get_megatron_optimizer_based_on_param_groups(
        config, [], [dict(group, is_decoupled_lr=False)], skip_megatron_wrapping=True
    )
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return start, gradients, parameter.detach(), optimizer.defaults


def _adam_ref(start, gradients, decoupled, lr=0.1, decay=0.1, betas=(0.9, 0.999), eps=1e-8):
    """Kingma and Ba's algorithm, and Loshchilov and Hutter's weight decay, in float64."""
    x = start.double()
    first, second = torch.zeros_like(x), torch.zeros_like(x)
    for step, gradient in enumerate(gradients.double(), start=1):
        if decoupled:
            x = x - lr * decay * x
        else:
            gradient = gradient + decay * x
        first = betas[0] * first + (1 - betas[0]) * gradient
        second = betas[1] * second + (1 - betas[1]) * gradient**2
        mean = first / (1 - betas[0] ** step)
        x = x - lr * mean / ((second / (1 - betas[1] ** step)).sqrt() + eps)
    return x


def test_one_kernel():
    """foreach, the default on a GPU, makes a temporary as large as all parameters in fp32."""
    *_, defaults = _step(True)
    assert defaults["fused"] is True


@pytest.mark.parametrize("decoupled", [True, False])
def test_values(decoupled):
    start, gradients, found, _ = _step(decoupled)
    expected = _adam_ref(start, gradients, decoupled)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
