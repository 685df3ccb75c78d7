# Copyright (c) 2026, the megatron-core gptoss authors.

"""Optimizer state of several gradient buckets is resumed; where it was misplaced, it is refused."""

import contextlib
from argparse import Namespace
from dataclasses import replace

import pytest
import torch

from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.training import checkpointing
from megatron.training.checkpoint_integrity import CheckpointLoadError
from megatron.training.optimizer_state_check import (
    MARK,
    MisplacedOptimizerState,
    refuse_unloadable_state,
)
from tests.harness import tiny_pretrain, watched_pretrain
from tests.harness.checkpoint_entries import read_checkpoint

STEPS = 4
COMMON = (
    f"--train-iters {STEPS} --lr-decay-iters {STEPS} --save-interval 2 "
    f"--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable {tiny_pretrain.SMALL}"
)
FOUR_LAYERS = f"{tiny_pretrain.SMALL} --num-layers 4"
BUCKETS = "--overlap-grad-reduce --ddp-num-buckets 3"


def train(ranks, data, directory, flags, world_size, function=watched_pretrain.run, load=None):
    flags = f"{COMMON} --save {directory} --load {load or directory} {flags}".split()
    return ranks.run(function, flags, data, world_size=world_size, init_process_group=False)


def as_earlier_versions(misplaced):
    """This process writes as Megatron-Core 0.19 does: without the mark, and `misplaced`."""
    metadata_of = checkpointing._build_sharded_state_dict_metadata

    def without_mark(*args, **kwargs):
        metadata = metadata_of(*args, **kwargs)
        metadata.pop(MARK)
        return metadata

    checkpointing._build_sharded_state_dict_metadata = without_mark
    state_of = DistributedOptimizer.sharded_param_state_fully_reshardable
    if not misplaced:
        return

    def with_raw_offsets(self, model_sharded_state_dict, is_loading=False, metadata=None):
        state = state_of(self, model_sharded_state_dict, is_loading, metadata)
        if is_loading:
            return state
        world = self.get_parameter_state_dp_zero(use_gloo_comm=False, return_on_all_ranks=True)
        index = 0
        for number, buffer in enumerate(self.buffers):
            (tensors,) = world[number].values()
            for begin, end, _ in buffer.param_index_map.values():
                for key, entry in state[index].items():
                    values = tensors[key][begin:end]
                    values = torch.nn.functional.pad(values, (0, end - begin - len(values)))
                    state[index][key] = replace(entry, data=values.reshape(entry.data.shape))
                index += 1
        return state

    DistributedOptimizer.sharded_param_state_fully_reshardable = with_raw_offsets


def run_as_earlier(flags, data, misplaced=True):
    originals = (
        checkpointing._build_sharded_state_dict_metadata,
        DistributedOptimizer.sharded_param_state_fully_reshardable,
    )
    as_earlier_versions(misplaced)
    try:
        return watched_pretrain.run(flags, data)
    finally:
        checkpointing._build_sharded_state_dict_metadata = originals[0]
        DistributedOptimizer.sharded_param_state_fully_reshardable = originals[1]


def run_unmarked(flags, data):
    return run_as_earlier(flags, data, misplaced=False)


def run_refused(flags, data):
    """The error message on this rank."""
    with pytest.raises(MisplacedOptimizerState) as info:
        watched_pretrain.run(flags, data)
    return str(info.value)


def tensors(directory, step):
    entries = read_checkpoint(str(directory / f"iter_{step:07d}"))
    return {
        name.removeprefix("optimizer.state."): value
        for name, value in entries.items()
        if name.startswith("optimizer.state.")
    }


def steps(records, first):
    return [
        (step["losses"]["lm loss"], step["grad_norm"])
        for step in records[-1]["steps"]  # the last stage has the loss
        if step["iteration"] >= first
    ]


def close(one, other):
    return len(one) == len(other) > 0 and torch.allclose(
        torch.tensor(one), torch.tensor(other), rtol=2e-4
    )


@pytest.fixture(scope="module")
def initial(ranks, data, tmp_path_factory):
    """Weights to begin with, for random ones depend on the layout."""
    return write_initial(ranks, data, tmp_path_factory.mktemp("initial"), tiny_pretrain.SMALL)


def write_initial(ranks, data, directory, model):
    ranks.run(
        tiny_pretrain.write_initial_checkpoint,
        model.split(),
        data,
        str(directory),
        world_size=1,
        init_process_group=False,
    )
    return directory


@pytest.fixture(scope="module")
def one_process(ranks, data, initial, tmp_path_factory):
    """(directory, what it logged) of one process, whose buffers have one bucket."""
    directory = tmp_path_factory.mktemp("one")
    return directory, train(ranks, data, directory, "--finetune", 1, load=initial)


@pytest.fixture(scope="module")
def four_layers(ranks, data, tmp_path_factory):
    """(directory of the initial weights, directory of one process that ended after its save)."""
    initial = write_initial(ranks, data, tmp_path_factory.mktemp("initial_four"), FOUR_LAYERS)
    directory = tmp_path_factory.mktemp("one_four")
    flags = f"{FOUR_LAYERS} --finetune --train-iters 2"
    train(ranks, data, directory, flags, 1, load=initial)
    return initial, directory


@pytest.fixture(scope="module")
def misplaced(ranks, data, initial, tmp_path_factory):
    """Directory of a run that wrote what Megatron-Core 0.19 writes."""
    directory = tmp_path_factory.mktemp("misplaced")
    train(ranks, data, directory, f"{BUCKETS} --finetune", 2, run_as_earlier, load=initial)
    return directory


LAYOUTS = {
    "overlap-grad-reduce": BUCKETS,
    "expert-parallel": f"{BUCKETS} --overlap-param-gather --expert-model-parallel-size 2",
    "virtual-stages": f"{FOUR_LAYERS} --overlap-grad-reduce --ddp-bucket-size 3000 "
    "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_several_buckets(ranks, data, tmp_path, request, layout):
    """All optimizer tensors are those of one process; a resumed run continues without a difference."""
    if layout == "virtual-stages":
        initial, reference = request.getfixturevalue("four_layers")
    else:
        initial = request.getfixturevalue("initial")
        reference, _ = request.getfixturevalue("one_process")
    flags = f"{LAYOUTS[layout]} --finetune"
    whole = train(ranks, data, tmp_path / "whole", flags, 2, load=initial)
    expected, found = tensors(reference, 2), tensors(tmp_path / "whole", 2)
    assert found.keys() == expected.keys() and len(found) > 40
    for name, value in expected.items():
        difference = (found[name] - value).norm() / value.norm().clamp(min=1e-12)
        assert difference < 2e-3, name
    flags = f"{LAYOUTS[layout]} --ckpt-step 2"
    resumed = train(ranks, data, tmp_path / "resumed", flags, 2, load=tmp_path / "whole")
    assert steps(resumed, 3) == steps(whole, 3)


def test_resumes_with_other_buckets(ranks, data, tmp_path, one_process):
    """Written with one bucket by one process, read with three by two, and back."""
    reference, expected = one_process
    flags = f"{BUCKETS} --ckpt-step 2"
    two = train(ranks, data, tmp_path / "two", flags, 2, load=reference)
    assert close(steps(two, 3), steps(expected, 3))
    whole = train(ranks, data, tmp_path / "three", BUCKETS, 2)
    one = train(ranks, data, tmp_path / "one", "--ckpt-step 2", 1, load=tmp_path / "three")
    assert close(steps(one, 3), steps(whole, 3))


@pytest.mark.parametrize("world_size, flags", [(2, BUCKETS), (1, "")], ids=["two", "one"])
def test_misplaced_state_is_refused(ranks, data, misplaced, world_size, flags):
    messages = train(ranks, data, misplaced, f"{flags} --ckpt-step 2", world_size, run_refused)
    assert len(set(messages)) == 1
    assert "iter_0000002" in messages[0] and "with --ddp-num-buckets 3" in messages[0]
    assert "--no-load-optim" in messages[0] and "--finetune" in messages[0]
    share = float(messages[0].partition(" % of the weights")[0].rpartition(" ")[2])
    assert 30 < share < 100


@pytest.mark.parametrize("flags", ["--no-load-optim", "--finetune"])
def test_weights_of_misplaced_state_are_right(ranks, data, tmp_path, misplaced, one_process, flags):
    """The first loss after the resume is that of the model's weights in one process."""
    reference, expected = one_process
    flags = f"{flags} --ckpt-step 2 --override-opt-param-scheduler --train-iters 3"
    records = train(ranks, data, tmp_path / "of", f"{BUCKETS} {flags}", 2, load=misplaced)
    fresh = train(ranks, data, tmp_path / "reference", flags, 1, load=reference)
    assert close(steps(records, 0)[:1], steps(fresh, 0)[:1])


@pytest.mark.parametrize("flags", ["", BUCKETS], ids=["one-bucket", "several"])
def test_right_state_without_the_mark_is_loaded(ranks, data, tmp_path, flags):
    """One bucket of an earlier version, or several of another Megatron that places them right."""
    whole = train(ranks, data, tmp_path / "whole", flags, 2, run_unmarked)
    resumed = train(
        ranks, data, tmp_path / "resumed", f"{flags} --ckpt-step 2", 2, load=tmp_path / "whole"
    )
    assert steps(resumed, 3) == steps(whole, 3)


def test_bf16(ranks, data, tmp_path):
    """fp32 weights differ from the model's by rounding alone, and the moments of no other."""
    flags = f"--bf16 {BUCKETS}"
    whole = train(ranks, data, tmp_path / "whole", flags, 2, run_unmarked)
    resumed = train(
        ranks, data, tmp_path / "resumed", f"{flags} --ckpt-step 2", 2, load=tmp_path / "whole"
    )
    assert steps(resumed, 3) == steps(whole, 3)
    train(ranks, data, tmp_path / "misplaced", flags, 2, run_as_earlier)
    messages = train(ranks, data, tmp_path / "misplaced", flags, 2, run_refused)
    assert len(set(messages)) == 1 and "--no-load-optim" in messages[0]


@pytest.mark.parametrize(
    "saved, size, kind, refused",
    [
        (1, 2, None, True),
        (2, 1, None, True),
        (2, 4, None, False),
        (2, 2, None, False),
        (2, 4, "dp_reshardable", True),
        (2, 2, "dp_reshardable", False),
        (1, 2, "fully_reshardable", False),
        (1, 2, "fully_sharded_model_space", False),
    ],
)
def test_other_expert_sizes(saved, size, kind, refused):
    """Both sizes and what to do, where there was a traceback about entries or shapes."""
    args, saved_args = (Namespace(expert_model_parallel_size=value) for value in (size, saved))
    metadata = None if kind is None else {"distrib_optim_sharding_type": kind}
    with pytest.raises(CheckpointLoadError) if refused else contextlib.nullcontext() as info:
        refuse_unloadable_state(args, saved_args, metadata)
    if refused:
        message = str(info.value)
        assert f"--expert-model-parallel-size {saved}" in message and f"load with {size}" in message
        assert "--no-load-optim" in message and "--finetune" in message


def test_resumes_at_another_expert_size(ranks, data, tmp_path, one_process):
    """From one process without expert parallelism to two ranks with it, and back."""
    reference, expected = one_process
    experts = "--expert-model-parallel-size 2"
    two = train(ranks, data, tmp_path / "two", f"{experts} --ckpt-step 2", 2, load=reference)
    assert close(steps(two, 3), steps(expected, 3))
    whole = train(ranks, data, tmp_path / "whole", experts, 2)
    one = train(ranks, data, tmp_path / "one", "--ckpt-step 2", 1, load=tmp_path / "whole")
    assert close(steps(one, 3), steps(whole, 3))
