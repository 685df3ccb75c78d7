# Copyright (c) 2026, the megatron-core gptoss authors.

"""--fp8: the experts' GEMMs in FP8 on the local route, from the command line to the weights."""

import pytest

from megatron.gpt_oss.arguments.parse import read
from megatron.gpt_oss.errors import UsageError
from tests.harness import runs

TINY = "--preset tiny --bf16 --tokenizer-type NullTokenizer --vocab-size 100"
LONG_FORM = "--fp8-format e4m3 --fp8-recipe rowwise"


@pytest.mark.parametrize("flags", ["--fp8", LONG_FORM])
def test_accepted(flags):
    """Both forms; Megatron's own `fp8`, which is TransformerEngine's, stays off."""
    args = read(f"{TINY} {flags}".split()).args
    assert args.expert_fp8_recipe == "rowwise" and args.fp8 is None
    assert read(TINY.split()).args.expert_fp8_recipe is None


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--fp8 --fp8-format e4m3", "--fp8 and --fp8-format e4m3: give one of them"),
        ("--fp8 --fp8-recipe rowwise", "--fp8 and --fp8-recipe rowwise: give one of them"),
        ("--fp8-format hybrid --fp8-recipe rowwise", "--fp8-format hybrid --fp8-recipe rowwise"),
        ("--fp8-format e4m3", "--fp8-recipe delayed needs TransformerEngine"),
        ("--fp8-format e4m3 --fp8-recipe tensorwise", "tensorwise needs TransformerEngine"),
        ("--fp8-recipe rowwise", "needs --fp8-format e4m3"),
        ("--fp8 --no-moe-grouped-gemm", "Drop --no-moe-grouped-gemm"),
        ("--fp8 --transformer-impl transformer_engine", "--fp8-format and --fp8-recipe"),
        (f"{LONG_FORM} --transformer-impl transformer_engine", "TransformerEngine has tensorwise"),
    ],
)
def test_refused(flags, message):
    with pytest.raises(UsageError) as refused:
        read(f"{TINY} {flags}".split())
    assert message in str(refused.value)


def test_needs_bf16():
    with pytest.raises(UsageError, match="--fp8 needs --bf16"):
        read(f"{TINY} --fp8".replace("--bf16 ", "").split())


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return runs.write_inputs(tmp_path_factory.mktemp("expert_fp8"))


PARALLEL = (
    "--bf16 --expert-model-parallel-size 2 --use-distributed-optimizer --overlap-grad-reduce "
    "--overlap-param-gather --global-batch-size 4 --save-interval 3"
)


@pytest.mark.ranks(2)
def test_training(ranks, inputs, tmp_path):
    """Losses follow those of bf16, on two ranks with the distributed optimizer; resumes either way."""
    losses = {}
    for name, words in {"first": ("--fp8 --memory lean", ""), "last": ("", "--fp8")}.items():
        for iterations, fp8 in zip((3, 6), words):
            flags = f"{PARALLEL} {fp8} --train-iters {iterations}"
            records = runs.start(ranks, inputs, tmp_path / name, flags, 2)
        losses[name] = [step["loss"] for step in runs.steps(records).values()]
    assert len(losses["first"]) == len(losses["last"]) == 6
    for fp8, bf16 in zip(losses["first"], losses["last"]):
        assert 0 < abs(fp8 - bf16) < 0.02 * bf16
    assert losses["first"][-1] < losses["first"][0] - 0.1
