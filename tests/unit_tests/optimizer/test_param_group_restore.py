# Copyright (c) 2026, the megatron-core gptoss authors.

"""Only the number of updates is taken from a checkpoint's parameter groups."""

import copy

import pytest
import torch

from megatron.core.optimizer.optimizer import FP32Optimizer


def optimizer(rates, **changes):
    """Megatron's wrapper of an AdamW with a group for each rate, one update made."""
    torch.manual_seed(0)
    common = {"wd_mult": 1.0, "lr_mult": 1.0, "is_expert_parallel": False, "is_decoupled_lr": False}
    groups = [
        {"params": [torch.nn.Parameter(torch.randn(3))], "max_lr": rate, "min_lr": 0.0, **common}
        for rate in rates
    ]
    wrapper = object.__new__(FP32Optimizer)
    wrapper.optimizer = torch.optim.AdamW(groups, lr=1e-3, **changes)
    for group in groups:
        group["params"][0].grad = torch.ones(3)
    wrapper.optimizer.step()
    return wrapper


def test_another_rate():
    """Rates identify groups upstream: 'Could not find parameter group with key'."""
    saved = copy.deepcopy(optimizer([1e-3, 1e-4], betas=(0.9, 0.99)).optimizer.state_dict())
    loaded = optimizer([5e-4, 5e-5], betas=(0.9, 0.95), eps=1e-6)
    loaded.load_state_dict(saved)
    assert [group["max_lr"] for group in loaded.optimizer.param_groups] == [5e-4, 5e-5]
    for group in loaded.optimizer.param_groups:
        assert group["betas"] == (0.9, 0.95) and group["eps"] == 1e-6
        moment = loaded.optimizer.state[group["params"][0]]["exp_avg_sq"]
        assert torch.equal(moment, torch.full((3,), 1 - 0.99, dtype=torch.float32))


@pytest.mark.parametrize("rates", [[1e-3], [1e-3, 5e-4], [1e-3, 1e-4, 1e-5]])
def test_state_by_index(rates):
    """State stored by index does not match other parameter groups."""
    saved = optimizer([1e-3, 1e-4]).optimizer.state_dict()
    with pytest.raises(ValueError, match="divide the parameters differently"):
        optimizer(rates).load_state_dict(saved)


def test_updates_counted_in_groups():
    """Fused optimizers count updates in groups; a group without parameters may have no count."""
    from megatron.core.optimizer.param_group_restore import restored_param_groups

    current = [{"params": [0], "lr": 1.0}, {"params": [], "lr": 2.0}]
    saved = [{"lr": 3.0}, {"lr": 4.0, "step": 7}, {"lr": 5.0, "step": 7}]
    assert restored_param_groups(current, saved) == [
        {"params": [0], "lr": 1.0, "step": 7},
        {"params": [], "lr": 2.0, "step": 7},
    ]
