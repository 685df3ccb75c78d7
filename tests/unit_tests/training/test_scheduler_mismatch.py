# Copyright (c) 2026, the megatron-core gptoss authors.

"""A checkpoint of another learning-rate schedule: what is said, and that nothing goes on by itself."""

import types

import pytest

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler


def scheduler(decay_steps, override=False, use_checkpoint=False):
    optimizer = types.SimpleNamespace(param_groups=[])
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=0.1,
        min_lr=0.0,
        lr_warmup_steps=0,
        lr_decay_steps=decay_steps,
        lr_decay_style='cosine',
        start_wd=0.1,
        end_wd=0.1,
        wd_incr_steps=decay_steps,
        wd_incr_style='constant',
        override_opt_param_scheduler=override,
        use_checkpoint_opt_param_scheduler=use_checkpoint,
    )


def test_message():
    with pytest.raises(ValueError) as error:
        scheduler(24).load_state_dict(scheduler(12).state_dict())
    assert str(error.value) == (
        "The checkpoint's schedule has 12 for total number of iterations (in samples where it "
        "counts), this command's has 24. Give --override-opt-param-scheduler to go on with this "
        "command's, --use-checkpoint-opt-param-scheduler with the checkpoint's."
    )


@pytest.mark.parametrize('flag, found', [('override', 24), ('use_checkpoint', 12)])
def test_what_the_message_says(flag, found):
    loaded = scheduler(24, **{flag: True})
    loaded.load_state_dict(scheduler(12).state_dict())
    assert loaded.lr_decay_steps == found
