# Copyright (c) 2026, the megatron-core gptoss authors.

"""A non-finite loss or gradient stops the run, and the message names its origin.

Two ranks, each with two of the four experts of a layer, checkpoints after every step. The trouble
is planted at step 3, so that the checkpoint of step 2 must stay as it was and be resumed from.
"""

import math

import pytest
import torch

from megatron.core.utils import get_attr_wrapped_model
from megatron.training import step_callbacks
from megatron.training.non_finite import NonFiniteError, NonFiniteTensor, RankReport, describe
from tests.harness import tiny_pretrain, watched_pretrain
from tests.harness.ranks import RankFailure

STEPS, PLANTED_AT = 4, 3
EP2 = f"{tiny_pretrain.SMALL} --expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall"
DISTOPT = f"{EP2} --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"


def train(ranks, data, folder, flags, function=watched_pretrain.run):
    flags = f"--save {folder} --load {folder} --save-interval 1 --train-iters {STEPS} {flags}"
    return ranks.run(
        stopped_or_not, function, flags.split(), data, world_size=2, init_process_group=False
    )


def stopped_or_not(function, flags, data):
    """What the run logged, or what it was stopped with; so that the rank can be used again."""
    try:
        return function(flags, data)
    except NonFiniteError as error:
        return str(error)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def expert(model, layer: int, index: int) -> torch.nn.Module:
    decoder = get_attr_wrapped_model(model, "decoder")
    return decoder.layers[layer].mlp.experts.local_experts[index]


def run_hurt(hurt, flags, data):
    """Train, and call `hurt(model)` on rank 1 before the first micro-batch of step 3."""
    done = []

    def before_forward(step, model):
        if step == PLANTED_AT and torch.distributed.get_rank() == 1 and not done:
            done.append(hurt(model))

    return watched_pretrain.run(flags, data, before_forward=before_forward)


def nan_in_weight(flags, data):
    def hurt(model):
        with torch.no_grad():
            expert(model, 1, 1).linear_fc2.weight[3, 5] = math.nan

    return run_hurt(hurt, flags, data)


def inf_in_gradient(flags, data):
    """The gradient of one expert overflows on rank 1, whose loss is as finite as ever."""

    def hurt(model):
        expert(model, 0, 1).linear_fc1.weight.register_hook(lambda gradient: gradient * 1e38 * 1e38)

    return run_hurt(hurt, flags, data)


def huge_gradient(flags, data):
    """Finite, but its square is beyond fp32."""

    def hurt(model):
        weight = get_attr_wrapped_model(model, "output_layer").weight
        weight.register_hook(lambda gradient: gradient * 1e25)

    return run_hurt(hurt, flags, data)


def transient_nan(flags, data):
    """NaN in one gradient, once: not when the step is repeated."""

    def hurt(model):
        weight = expert(model, 0, 1).linear_fc1.weight
        handles = []

        def hook(gradient):
            handles[0].remove()
            return gradient * math.nan

        handles.append(weight.register_hook(hook))

    return run_hurt(hurt, flags, data)


def infinite_loss(flags, data):
    """log(0) on rank 1: the loss is infinite, and the gradient of the softmax is not."""

    def loss_func(loss_mask, output):
        loss, num_tokens, reported = original(loss_mask, output)
        if torch.distributed.get_rank() == 1:
            loss = loss + torch.tensor(math.inf)
        return loss, num_tokens, reported

    original = tiny_pretrain.loss_func
    tiny_pretrain.loss_func = loss_func
    try:
        return watched_pretrain.run(flags, data)
    finally:
        tiny_pretrain.loss_func = original


def nan_after_update(flags, data):
    """The weights become NaN between the update and the save of step 3."""

    def before_forward(step, model):
        def spoil(event):
            if event.iteration == PLANTED_AT and torch.distributed.get_rank() == 1:
                with torch.no_grad():
                    expert(model, 0, 0).linear_fc1.weight[0, 0] = math.inf

        if not planted:
            planted.append(step_callbacks.subscribe(step_callbacks.TrainingLogged, spoil))

    planted = []
    return watched_pretrain.run(flags, data, before_forward=before_forward)


# Rank 1's experts 0 and 1 are the model's 2 and 3.
CASES = {
    "nan-in-weight": (
        nan_in_weight,
        DISTOPT,
        [
            "Step 3: the loss or a gradient is not finite (norm of the gradients: nan). Rank 1: "
            "the parameter decoder.layers.1.mlp.experts.local_experts.3.linear_fc2.weight holds 1 "
            "NaN among 1920 values.",
            "In the forward pass: rank 1: the output of "
            "decoder.layers.1.mlp.experts.local_experts.3.linear_fc2 holds",
        ],
    ),
    "inf-in-gradient": (
        inf_in_gradient,
        DISTOPT,
        [
            "Step 3: the loss or a gradient is not finite",
            "Rank 1: the gradient of "
            "decoder.layers.0.mlp.experts.local_experts.3.linear_fc1.weight holds",
            "micro-batch 0; the forward pass was finite.",
        ],
    ),
    "transient": (
        transient_nan,
        EP2,
        [
            "Step 3: ",
            "Rank 1: the norm of the gradients of ",
            " was nan before they were reduced. A rerun of the same batch was finite",
        ],
    ),
    "huge-gradient": (
        huge_gradient,
        EP2,
        ["Rank 1: each gradient is finite, but their norm is not", "of output_layer.weight."],
    ),
    "after-update": (
        nan_after_update,
        EP2,
        [
            "Step 3: weights are not finite after the update. Rank 1: "
            "decoder.layers.0.mlp.experts.local_experts.2.linear_fc1.weight holds 1 inf among"
        ],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_named_and_resumed(ranks, data, tmp_path, case):
    """The run ends on all ranks, the message tells where, and the checkpoints are as before."""
    function, flags, expected = CASES[case]
    folder = tmp_path / "checkpoints"
    message, on_rank_1 = train(ranks, data, folder, flags, function)
    assert isinstance(message, str), "the run was not stopped"
    assert message == on_rank_1
    for part in expected:
        assert part in message
    assert (folder / "latest_checkpointed_iteration.txt").read_text() == str(PLANTED_AT - 1)
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == [
        "iter_0000001",
        "iter_0000002",
    ]

    if case == "nan-in-weight":
        resumed = train(ranks, data, folder, flags)[0]["steps"]
        whole = train(ranks, data, tmp_path / "whole", flags)[0]["steps"]
        assert [step["losses"] for step in resumed] == [step["losses"] for step in whole[2:]]


def test_unchecked_updates_are_left_out(ranks, data, tmp_path):
    """With --no-check-for-nan-in-loss-and-grad a bad step is skipped, and the weights survive."""
    flags = f"{EP2} --no-check-for-nan-in-loss-and-grad"
    steps = train(ranks, data, tmp_path / "checkpoints", flags, transient_nan)[0]["steps"]
    assert [step["iteration"] for step in steps] == [1, 2, 3, 4]
    assert steps[2]["skipped_iterations"] == 1
    assert math.isfinite(steps[3]["losses"]["lm loss"])


def test_origin_among_the_ranks():
    """Experts send what they compute to other ranks: the sender is named first."""

    def report(rank, forward=None, backward=None):
        return RankReport(rank, [], forward, backward, [], False, (0.0, ""))

    # Rank 0 gets the NaN of rank 1's expert through the dispatcher, inside of layer 2's MLP, and
    # rank 2, of the next pipeline stage, in layer 5.
    reports = [
        report(0, NonFiniteTensor(0, 2, True, 40, "mlp")),
        report(1, NonFiniteTensor(0, 2, False, 44, "expert")),
        report(2, NonFiniteTensor(0, 5, False, 3, "norm")),
    ]
    text = describe(reports, norm_is_finite=False)
    assert text.splitlines()[0] == "Rank 1: expert."
    assert "After it: rank 0: mlp." in text and "After it: rank 2: norm." in text

    reports = [
        report(0, backward=NonFiniteTensor(0, 2, False, 10, "the gradient of pre_mlp_layernorm")),
        report(1, backward=NonFiniteTensor(0, 2, False, 44, "the gradient of mlp.experts.fc1")),
        report(2, backward=NonFiniteTensor(0, 1, False, 3, "the gradient of a layer below")),
    ]
    assert describe(reports, False).startswith("Rank 1: the gradient of mlp.experts.fc1.")
    assert describe([report(0)], norm_is_finite=True) is None


def test_infinite_loss_in_the_first_step(ranks, data, tmp_path):
    """The first step is checked, too; no checkpoint is written."""
    flags = f"{EP2} --save {tmp_path} --save-interval 1 --train-iters {STEPS}".split()
    with pytest.raises(RankFailure) as failure:
        ranks.run(infinite_loss, flags, data, world_size=2, init_process_group=False)
    for rank in (0, 1):
        assert f"Rank {rank} of 2 failed" in str(failure.value)
    assert "NonFiniteError: Step 1: the loss or a gradient is not finite" in str(failure.value)
    assert "Rank 1: the gradient of " in str(failure.value)
    assert not list(tmp_path.iterdir())
