# Copyright (c) 2026, the megatron-core gptoss authors.

"""--freeze and --lr-multiplier: weights, optimizer state, and resume."""

import shutil
from argparse import Namespace
from fnmatch import fnmatchcase

import pytest
import torch

from megatron.gpt_oss.errors import UsageError
from megatron.gpt_oss.training.parameter_patterns import (
    check_patterns,
    parse_multipliers,
    pattern_hook,
)
from tests.harness import runs
from tests.harness.checkpoint_entries import read_checkpoint
from tests.harness.models import TINY

CONSTANT = "--lr-warmup-iters 0 --lr-decay-style constant --weight-decay 0.1"
DISTOPT = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
EP2 = f"--expert-model-parallel-size 2 {DISTOPT}"
PP2 = "--pipeline-model-parallel-size 2"
SMALL = "--global-batch-size 2 --eval-iters 0"


def weights(run_dir, step):
    """The model's tensors of a checkpoint; the two layers are rows of one tensor."""
    entries = read_checkpoint(str(run_dir / "checkpoints" / f"iter_{step:07d}"))
    return {
        name: value
        for name, value in entries.items()
        if isinstance(value, torch.Tensor) and name.startswith(("decoder", "embedding", "output"))
    }


def states(run_dir, step):
    """Names of the parameters that the optimizer has moments of."""
    entries = read_checkpoint(str(run_dir / "checkpoints" / f"iter_{step:07d}"))
    start = "optimizer.state.exp_avg."
    return {name.removeprefix(start) for name in entries if name.startswith(start)}


def resume(ranks, inputs, source, run_dir, step, flags, world_size):
    """The steps of a run that has the checkpoint of `step` of another one and nothing else of it."""
    name = f"iter_{step:07d}"
    shutil.copytree(source / "checkpoints" / name, run_dir / "checkpoints" / name)
    (run_dir / "checkpoints" / "latest_checkpointed_iteration.txt").write_text(str(step))
    return runs.steps(runs.start(ranks, inputs, run_dir, flags, world_size))


@pytest.fixture(scope="module")
def start_weights(ranks, inputs, tmp_path_factory):
    """The model's tensors before the first step, the same in each layout."""
    run_dir = tmp_path_factory.mktemp("start")
    zero = f"{CONSTANT} {SMALL} --train-iters 1 --freeze embedding.* --lr 1e-30 --min-lr 0"
    runs.start(ranks, inputs, run_dir, zero)
    return weights(run_dir, 1)


def test_words():
    assert parse_multipliers(["*.a=0.1", "b=c=2", "*.a=3"]) == {"*.a": 3.0, "b=c": 2.0}
    for word in ("*.a", "*.a=", "=2", "*.a=-1", "*.a=nan", "*.a=inf"):
        with pytest.raises(UsageError, match="expected PATTERN=FACTOR with a factor of 0 or more"):
            parse_multipliers([word])


@pytest.mark.parametrize("layout", ["", EP2, PP2], ids=["one-rank", "ep2-distopt", "pp2"])
def test_frozen(ranks, inputs, tmp_path, layout):
    """Frozen weights stay bit for bit, have no moments, and a resumed run continues as one did."""
    world_size = 2 if layout else 1
    patterns = ("*.router.*", "embedding.*")
    held = "decoder.layers.1.self_attention.linear_qkv.*"
    flags = f"{CONSTANT} --train-iters 4 --save-interval 2 --monitor-interval 4 {SMALL} {layout}"
    frozen = f"{flags} --freeze {' '.join(patterns)} --lr-multiplier {held}=0"
    records = runs.start(ranks, inputs, tmp_path / "run", frozen, world_size)
    before, after = weights(tmp_path / "run", 2), weights(tmp_path / "run", 4)
    free = runs.start(ranks, inputs, tmp_path / "free", f"{flags} --exit-interval 2", world_size)
    assert runs.steps(records)[1]["loss"] == pytest.approx(runs.steps(free)[1]["loss"], rel=1e-6)
    moving = weights(tmp_path / "free", 2)
    moments = states(tmp_path / "run", 4)
    for name, tensor in before.items():
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            assert torch.equal(tensor, after[name]), name
            assert name not in moments
            assert not torch.equal(tensor, moving[name]), name
        elif "linear_qkv." in name and "norm" not in name and "layers.self" in name:
            assert torch.equal(tensor[1], after[name][1]), name  # layer 1, of pipeline stage 1
            assert not torch.equal(tensor[0], after[name][0]), name
        else:
            assert not torch.equal(tensor, after[name]), name
            assert name in moments
    norms = runs.only(records, "norms")[4]["grad_norm"]
    assert "router" not in norms and "embedding" not in norms and norms["experts"] > 0

    resumed = resume(ranks, inputs, tmp_path / "run", tmp_path / "two", 2, frozen, world_size)
    assert sorted(resumed) == [3, 4]
    for step in (3, 4):
        for key in ("loss", "grad_norm"):
            assert resumed[step][key] == runs.steps(records)[step][key]


def test_frozen_embedding_with_recomputation(ranks, inputs, tmp_path):
    """The first layer's input needs no gradient then; its weights do."""
    flags = f"{CONSTANT} --train-iters 1 --monitor-interval 1 --freeze embedding.*"
    expected = runs.only(runs.start(ranks, inputs, tmp_path / "all", flags), "norms")[1]
    flags += " --recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    found = runs.only(runs.start(ranks, inputs, tmp_path / "again", flags), "norms")[1]
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)


@pytest.mark.parametrize("layout", ["", EP2, PP2], ids=["one-rank", "ep2-distopt", "pp2"])
def test_learning_rates(ranks, inputs, tmp_path, start_weights, layout):
    """AdamW's first update, weight decay included, is proportional to the learning rate."""
    world_size = 2 if layout else 1
    flags = f"{CONSTANT} {SMALL} --train-iters 3 --save-interval 1 {layout}"
    factors = {"*": 1.0, "*.softmax_offset": 0.1, "*.experts.*": 2.0, "output_layer.*": 0.5}
    words = " ".join(f"{pattern}={factor}" for pattern, factor in factors.items())
    runs.start(ranks, inputs, tmp_path / "one", f"{flags} --exit-interval 1", world_size)
    records = runs.start(
        ranks, inputs, tmp_path / "run", f"{flags} --lr-multiplier {words}", world_size
    )
    plain, scaled = weights(tmp_path / "one", 1), weights(tmp_path / "run", 1)
    seen = set()
    for name, tensor in start_weights.items():
        factor = [f for pattern, f in factors.items() if fnmatchcase(name, pattern)][-1]
        seen.add(factor)
        limit = 1e-5 * float(tensor.abs().max()) + 1e-6
        difference = (scaled[name] - tensor) - factor * (plain[name] - tensor)
        assert difference.abs().max() < limit, name
        assert (plain[name] - tensor).abs().max() > 5e-4, name  # lr 1e-3
    assert seen == set(factors.values())
    assert runs.steps(records)[1]["learning_rate"] == pytest.approx(1e-3)

    flags += f" --lr-multiplier {words}"
    resumed = resume(ranks, inputs, tmp_path / "run", tmp_path / "two", 1, flags, world_size)
    assert sorted(resumed) == [2, 3]
    for step in (2, 3):
        for key in ("loss", "grad_norm"):
            assert resumed[step][key] == runs.steps(records)[step][key]


def arguments(**changes):
    values = {"freeze": [], "lr_multiplier": [], "save": "somewhere", "no_save_optim": False}
    values.update(decoupled_lr=None, lr_warmup_init=0.0, recompute_granularity=None)
    return Namespace(**{**values, **changes})


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"freeze": ["router"]}, "--freeze router matches no parameter. Example names: emb"),
        ({"lr_multiplier": ["*.rooter.*=2"]}, "--lr-multiplier *.rooter.* matches no parameter"),
        (
            {"freeze": ["decoder.layers.1.mlp.*"]},
            "a checkpoint holds optimizer state for all layers and experts or for none",
        ),
        (
            {"freeze": ["decoder.layers.1.mlp.experts.linear_fc1.*"]},
            "a checkpoint holds optimizer state for all layers and experts or for none",
        ),
        ({"freeze": ["*"]}, "--freeze * leaves no parameter to train"),
    ],
)
def test_patterns_that_do_not_fit(make_model, changes, words):
    model = [make_model(TINY)]
    with pytest.raises(UsageError) as error:
        pattern_hook(arguments(**changes))(model)
    assert words in str(error.value)
    # Without optimizer state in checkpoints, some layers may be frozen.
    if "checkpoint" in words:
        pattern_hook(arguments(**changes, no_save_optim=True))([make_model(TINY)])


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"lr_multiplier": ["*.router.*=x"]}, "expected PATTERN=FACTOR"),
        (
            {"lr_multiplier": ["*=2"], "decoupled_lr": 1e-4},
            "both set the learning rate of embedding",
        ),
        ({"lr_multiplier": ["*=0"], "lr_warmup_init": 1e-5}, "Give --lr-warmup-init 0"),
    ],
)
def test_flags_that_do_not_go(changes, words):
    with pytest.raises(UsageError, match=words):
        check_patterns(arguments(**changes))
    check_patterns(arguments(lr_multiplier=["*=2"]))
    check_patterns(arguments(decoupled_lr=1e-4))
