# Copyright (c) 2026, the megatron-core gptoss authors.

"""Losses of the router through Megatron's flags, each against its formula on the same logits.

Off, Switch-type (a micro-batch at a time), of the global batch, z-loss.
"""

import pytest
import torch

from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from tests.harness.models import TINY

COEFFICIENT = 0.01
BATCHES = 3
SIZES = (5, 2)  # tokens, sequences


def router_of(model):
    router = next(module for module in model.modules() if isinstance(module, TopKRouter))
    with torch.no_grad():
        router.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(3))
        router.bias.normal_(std=0.3, generator=torch.Generator().manual_seed(4))
    return router.train()


def inputs():
    generator = torch.Generator().manual_seed(5)
    # A mean other than zero prefers some experts.
    return [
        torch.randn(*SIZES, TINY.hidden_size, generator=generator) + 0.1 for _ in range(BATCHES)
    ]


def gradient_of_router_loss(make_model, **flags):
    """Gradient of the router's weight from the losses that it adds itself, and the logged values."""
    model = make_model(TINY, seq_length=16, **flags)
    router = router_of(model)
    get_moe_metrics_tracker().clear()
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1))  # as the schedules do: it stays
    for hidden in inputs():
        probabilities, _ = router(hidden)
        (0 * probabilities.sum()).backward()  # of what comes after: nothing
    tracked = {
        name: float(entry.values[0]) for name, entry in get_moe_metrics_tracker().metrics.items()
    }
    weight = router.weight.detach().double().requires_grad_()
    logits = [
        (hidden.double() @ weight.T + router.bias.detach().double()).flatten(0, 1)
        for hidden in inputs()
    ]
    return router.weight.grad.double(), tracked, weight, logits


def switch_loss(logits, counted=None):
    """E / (k T) sum over experts of their choices and mean probability (Switch, for top k)."""
    counted = logits if counted is None else counted
    chosen = counted.topk(TINY.num_experts_per_tok).indices.flatten()
    share = torch.bincount(chosen, minlength=TINY.num_experts) / chosen.numel()
    return TINY.num_experts * (share * torch.softmax(logits, -1).mean(0)).sum()


def check(found, expected_loss, weight):
    expected = torch.autograd.grad(expected_loss, weight)[0]
    assert expected.abs().max() > 1e-5
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_off(make_model):
    """The presets' default: the router learns from the language model's loss alone."""
    found, tracked, _, _ = gradient_of_router_loss(make_model)
    assert not found.any() and not tracked


def test_switch(make_model):
    found, tracked, weight, logits = gradient_of_router_loss(
        make_model,
        moe_router_load_balancing_type=["aux_loss"],
        moe_aux_loss_coeff=[COEFFICIENT],
    )
    loss = sum(switch_loss(batch) for batch in logits)
    check(found, COEFFICIENT * loss, weight)
    assert tracked["load_balancing_loss"] == pytest.approx(float(loss), rel=1e-4)


def test_global_batch(make_model):
    """Shares are those of all micro-batches of the step so far, this one included."""
    found, tracked, weight, logits = gradient_of_router_loss(
        make_model,
        moe_router_load_balancing_type=["global_aux_loss"],
        moe_aux_loss_coeff=[COEFFICIENT],
    )
    loss = sum(
        switch_loss(batch, torch.cat(logits[: index + 1])) for index, batch in enumerate(logits)
    )
    check(found, COEFFICIENT * loss, weight)
    assert tracked["global_load_balancing_loss"] == pytest.approx(float(loss), rel=1e-4)
    assert float(loss) != pytest.approx(
        float(sum(switch_loss(batch) for batch in logits)), rel=1e-3
    )


def test_z_loss(make_model):
    found, tracked, weight, logits = gradient_of_router_loss(
        make_model, moe_z_loss_coeff=COEFFICIENT
    )
    loss = sum(torch.logsumexp(batch, -1).square().mean() for batch in logits)
    check(found, COEFFICIENT * loss, weight)
    assert tracked["z_loss"] == pytest.approx(float(loss), rel=1e-4)


def test_frozen(make_model):
    """--freeze '*.router.*': no gradient, whatever losses are on."""
    from argparse import Namespace

    from megatron.gpt_oss.training.parameter_patterns import pattern_hook

    model = make_model(TINY, seq_length=16, moe_z_loss_coeff=COEFFICIENT)
    args = Namespace(
        freeze=["*.router.*"],
        lr_multiplier=[],
        save=None,
        no_save_optim=None,
        recompute_granularity=None,
    )
    pattern_hook(args)([model])
    ids = torch.arange(16).view(1, 16)
    model(ids, ids, None, labels=ids).mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert all((gradient is None) == (".router." in name) for name, gradient in gradients.items())
