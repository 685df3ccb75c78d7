# Copyright (c) 2026, the megatron-core gptoss authors.

"""A run that is killed and resumed is bit-identical to one that was not killed."""

import pytest
import torch

from tests.harness import tiny_pretrain, watched_pretrain
from tests.harness.checkpoint_entries import read_checkpoint
from tests.harness.ranks import RankFailure

STEPS, SAVE_INTERVAL, KILLED_AFTER = 4, 2, 3
# Dropout on, so that the random number generators take part.
COMMON = (
    f"--train-iters {STEPS} --save-interval {SAVE_INTERVAL} --hidden-dropout 0.1 "
    f"--attention-dropout 0.1 --lr-warmup-iters 3 {tiny_pretrain.SMALL}"
)
EP = "--expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall"
LAYOUTS = {
    "one-rank": (1, ""),
    "dp2-ep2-distopt": (2, f"{EP} --use-distributed-optimizer --dist-ckpt-optim-fully-reshardable"),
    # The optimizer state as it lies in the buckets, which is the default.
    "dp2-ep2-distopt-buckets": (
        2,
        f"{EP} --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sigkill_between_checkpoints(ranks, tmp_path, layout):
    """Killed after step 3, resumed from the checkpoint of step 2: steps 3 and 4 are the same.

    Compared bit for bit: samples, loss, gradient norm and learning rate of each step, and every
    tensor and random number generator state of the last checkpoint, optimizer state included.
    """
    world_size, flags = LAYOUTS[layout]
    data = tiny_pretrain.write_random_dataset(str(tmp_path / "data"))

    def train(name: str, kill_after=None):
        folder = tmp_path / name
        return ranks.run(
            watched_pretrain.run,
            f"{COMMON} {flags} --save {folder} --load {folder}".split(),
            data,
            kill_after,
            world_size=world_size,
            init_process_group=False,
        )

    whole = train("whole")
    with pytest.raises(RankFailure, match="died with exit code -9"):
        train("killed", kill_after=KILLED_AFTER)
    tracker = tmp_path / "killed" / "latest_checkpointed_iteration.txt"
    assert tracker.read_text() == str(SAVE_INTERVAL)
    resumed = train("killed")

    for expected, record in zip(whole, resumed):
        assert [step["iteration"] for step in record["steps"]] == [3, 4]
        for key in ("losses", "grad_norm", "learning_rate", "consumed_samples"):
            values = [step[key] for step in record["steps"]]
            assert values == [step[key] for step in expected["steps"][SAVE_INTERVAL:]], key
        num_samples = 4 // world_size * (STEPS - SAVE_INTERVAL + 1)  # One batch for validation.
        assert len(record["samples"]) == num_samples
        assert record["samples"] == expected["samples"][-num_samples:]
    # A run that repeats its steps would pass, too.
    assert len({step["grad_norm"] for step in whole[0]["steps"]}) == STEPS

    last = f"iter_{STEPS:07d}"
    expected = read_checkpoint(str(tmp_path / "whole" / last))
    entries = read_checkpoint(str(tmp_path / "killed" / last))
    assert entries.keys() == expected.keys()
    num_tensors = 0
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            num_tensors += 1
            assert torch.equal(entries[name].view(torch.uint8), value.view(torch.uint8)), name
        elif "rng_state" in name:
            assert same(entries[name], value), name
    assert num_tensors >= 10
    assert any("rng_state" in name for name in expected)


def same(left, right) -> bool:
    """Equality of nested containers that hold tensors and arrays."""
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    if hasattr(left, "getvalue"):  # A pickled object that was not opened.
        return left.getvalue() == right.getvalue()
    return bool((left == right) if not hasattr(left, "all") else (left == right).all())
