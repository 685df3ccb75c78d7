# Copyright (c) 2026, the megatron-core gptoss authors.

"""Learning rates of Megatron's schedules against their formulas: warm-up, cosine, constant, WSD."""

import math

import pytest
import torch

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

HIGH, LOW, WARMUP, STEPS, DECAY = 3e-4, 3e-5, 10, 100, 20


def rates(style, **changes):
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([{"params": [parameter], "max_lr": HIGH, "min_lr": LOW}])
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=HIGH,
        min_lr=LOW,
        lr_warmup_steps=WARMUP,
        lr_decay_steps=STEPS,
        lr_decay_style=style,
        start_wd=0.1,
        end_wd=0.1,
        wd_incr_steps=STEPS,
        wd_incr_style="constant",
        **changes,
    )
    found = []
    for _ in range(STEPS + 5):
        scheduler.step(1)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def cosine(step):
    return LOW + (HIGH - LOW) * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP))) / 2


def stable_then(shape):
    def rate(step):
        done = max(0.0, (step - (STEPS - DECAY)) / DECAY)
        return LOW + (HIGH - LOW) * shape(done)

    return rate


@pytest.mark.parametrize(
    "style, changes, formula",
    [
        ("cosine", {}, cosine),
        ("constant", {}, lambda step: HIGH),
        ("WSD", {"lr_wsd_decay_style": "linear"}, stable_then(lambda done: 1 - done)),
        ("WSD", {"lr_wsd_decay_style": "minus_sqrt"}, stable_then(lambda done: 1 - done**0.5)),
        (
            "WSD",
            {"lr_wsd_decay_style": "cosine"},
            stable_then(lambda done: (1 + math.cos(math.pi * done)) / 2),
        ),
    ],
    ids=["cosine", "constant", "wsd-linear", "wsd-sqrt", "wsd-cosine"],
)
def test_curve(style, changes, formula):
    if style == "WSD":
        changes["wsd_decay_steps"] = DECAY
    found = rates(style, **changes)
    for step, rate in enumerate(found, start=1):
        expected = HIGH * step / WARMUP if step <= WARMUP else formula(min(step, STEPS))
        assert rate == pytest.approx(expected, rel=1e-6), step
