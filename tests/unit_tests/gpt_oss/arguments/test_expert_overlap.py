# Copyright (c) 2026, the megatron-core gptoss authors.

"""--overlap-moe-expert-parallel-comm: each step's loss, every gradient and every parameter equal
those of the same run without the flag, bit for bit.

The flag runs a layer in pieces, between those of another micro-batch's backward, and not through
the forward of GPTModel, TransformerBlock, TransformerLayer and MoELayer: what one of those does
and the pieces do not would be a wrong number without a message.
"""

import hashlib
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.gpt_oss.arguments.parse import read
from megatron.gpt_oss.errors import UsageError
from megatron.training import step_callbacks
from tests.harness import runs
from tests.harness.tiny_pretrain import write_random_dataset

pytestmark = pytest.mark.ranks(4)

OVERLAP = "--overlap-moe-expert-parallel-comm"
STEPS = 2
# The flag needs bf16. Two micro-batches a rank: the second's forward meets the first's backward.
COMMON = (
    f"--bf16 --train-iters {STEPS} --clip-grad 0.5 --lr-warmup-iters 0 --eval-iters 0 "
    "--expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall --global-batch-size 4"
)
ARGUMENTS = "--preset tiny --tokenizer-type NullTokenizer --vocab-size 100"
CHUNKS, ALL_LOGITS = "--lm-loss-chunk-size 16", "--lm-loss-chunk-size 0"

# world size, flags.
CASES = {
    "ep2": (2, CHUNKS),
    "sequential-all-logits-mbs2": (2, f"{ALL_LOGITS} --no-moe-grouped-gemm --micro-batch-size 2"),
    "ep4-buckets": (
        4,
        f"{CHUNKS} --expert-model-parallel-size 4 --use-distributed-optimizer "
        "--overlap-grad-reduce --overlap-param-gather --ddp-num-buckets 3 --global-batch-size 8",
    ),
    "fp16-one-microbatch": (2, f"{CHUNKS} --fp16 --initial-loss-scale 1024 --global-batch-size 2"),
    "tp2-without-sp": (
        4,
        f"{CHUNKS} --tensor-model-parallel-size 2 --expert-tensor-parallel-size 1",
    ),
    "pp2-vpp2-packed": (
        4,
        f"{CHUNKS} --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 "
        "--dataloader-inter-document-masking --use-distributed-optimizer --overlap-grad-reduce "
        "--overlap-param-gather --global-batch-size 8",
    ),
    "cp2-packed-router-losses": (
        4,
        f"{ALL_LOGITS} --context-parallel-size 2 --dataloader-inter-document-masking "
        "--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.1 "
        "--moe-z-loss-coeff 0.01",
    ),
    "per-token-router-losses-balanced": (
        2,
        f"{CHUNKS} --calculate-per-token-loss --moe-router-load-balancing-type aux_loss "
        "--moe-aux-loss-coeff 0.1 --moe-z-loss-coeff 0.01 --memory balanced",
    ),
    "frozen": (2, f"{CHUNKS} --freeze embedding.* *.self_attention.* *layernorm* *.router.*"),
}

# What other cases have too.
SLOW = ("sequential-all-logits-mbs2", "fp16-one-microbatch", "cp2-packed-router-losses")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return runs.write_inputs(tmp_path_factory.mktemp("expert_overlap"))


@pytest.fixture(scope="module")
def four_layers(tmp_path_factory):
    """For two virtual stages of each of two pipeline stages."""
    return runs.write_inputs(tmp_path_factory.mktemp("four_layers"), num_layers=4)


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """Prefix of documents of 20 to 200 tokens: several begin in most samples of 64."""
    return write_random_dataset(str(tmp_path_factory.mktemp("documents") / "data"))


def digests(model, of) -> dict:
    """A digest of one tensor a parameter, by name, where there is one."""
    found = {}
    for chunk, module in enumerate(model):
        for name, parameter in module.named_parameters():
            tensor = of(parameter)
            if tensor is not None:
                tensor = tensor.detach().float().contiguous().numpy()
                found[f"{chunk}.{name}"] = hashlib.sha256(tensor.tobytes()).hexdigest()
    return found


def train_in_rank(argv: list[str]) -> list:
    """What this rank has to compare, a dictionary a step."""
    from megatron.core.models.common import model_chunk_schedule_plan

    steps, plans = [], []
    run = model_chunk_schedule_plan.TransformerModelChunkSchedulePlan.run

    def counted(*args, **kwargs):
        plans.append(1)
        return run(*args, **kwargs)

    def gradients(event):
        model = event.model
        steps.append(
            {
                "gradients": digests(model, lambda p: getattr(p, "main_grad", None)),
                "parameters": digests(model, lambda p: p),  # before this step's update
            }
        )

    def log(event):
        steps[-1]["loss"] = event.losses
        steps[-1]["grad_norm"] = event.grad_norm

    def prepare():
        step_callbacks.subscribe(step_callbacks.GradientsReady, gradients)
        step_callbacks.subscribe(step_callbacks.TrainingLogged, log)

    model_chunk_schedule_plan.TransformerModelChunkSchedulePlan.run = staticmethod(counted)
    try:
        runs.main_in_rank(argv, prepare)
    finally:
        model_chunk_schedule_plan.TransformerModelChunkSchedulePlan.run = staticmethod(run)
    assert bool(plans) == (OVERLAP in argv)  # the plan ran, or did not
    return steps


def train(ranks, inputs: Path, run_dir: Path, world_size: int, flags: str) -> list:
    argv = runs.command(inputs, run_dir, f"{COMMON} {flags}")
    if "--fp16" in argv:
        argv.remove("--bf16")
    return ranks.run(train_in_rank, argv, world_size=world_size, init_process_group=False)


def order_in_rank(argv: list[str]) -> list[bool]:
    """For each combine of the first layer: whether record_stream was called for its token order."""
    from megatron.core import device_utils
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    combine, used, recorded = MoEAlltoAllTokenDispatcher.combine_postprocess, [], []
    record_stream = device_utils.record_stream

    def postprocess(self, hidden_states):
        used.append(self.reversed_local_input_permutation_mapping)
        return combine(self, hidden_states)

    MoEAlltoAllTokenDispatcher.combine_postprocess = postprocess
    device_utils.record_stream = lambda tensor, stream: recorded.append(tensor)
    try:
        runs.main_in_rank(argv)
    finally:
        MoEAlltoAllTokenDispatcher.combine_postprocess = combine
        device_utils.record_stream = record_stream
    return [any(order is tensor for tensor in recorded) for order in used]


def test_order_of_tokens_is_kept_for_its_stream(ranks, inputs, tmp_path):
    """The combine runs on the communication's stream and its backward reads the order of the
    tokens, memory of the computation's stream, which could be given to another tensor before."""
    flags = f"{COMMON} {ALL_LOGITS} {OVERLAP} --train-iters 1 --eval-iters 0"
    argv = runs.command(inputs, tmp_path / "run", flags)
    for of_rank in ranks.run(order_in_rank, argv, world_size=2, init_process_group=False):
        assert of_rank and all(of_rank)


REFUSED = {
    "--expert-model-parallel-size 1": "--expert-model-parallel-size is 1",
    "--moe-token-dispatcher-type allgather": "--moe-token-dispatcher-type allgather",
    "--pipeline-model-parallel-size 2": "--num-virtual-stages-per-pipeline-rank 2",
    "--memory lean": "full-layer recompute",
    "--memory experts": "splits the MoE layer",
    "--recompute-granularity selective --recompute-modules moe": "splits the MoE layer",
    "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1": "full-layer",
    "--delay-wgrad-compute": "Drop --delay-wgrad-compute",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_refused_before_a_process_group(flags):
    words = f"{ARGUMENTS} --bf16 {OVERLAP} --expert-model-parallel-size 2 {flags}".split()
    with pytest.raises(UsageError, match=re.escape(REFUSED[flags])):
        read(words)


@pytest.mark.parametrize(
    "flags",
    [
        "--bf16",
        "--fp16",
        "--bf16 --memory balanced",
        "--bf16 --recompute-activations",
        "--bf16 --pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2",
    ],
)
def test_accepted(flags):
    read(f"{ARGUMENTS} {OVERLAP} --expert-model-parallel-size 2 {flags}".split())


def test_needs_bf16_and_stands_before_delayed_gradients():
    with pytest.raises(UsageError, match="Give --bf16"):
        read(f"{ARGUMENTS} {OVERLAP} --expert-model-parallel-size 2".split())
    with pytest.raises(UsageError, match="--delay-wgrad-compute needs"):
        read(f"{ARGUMENTS} --delay-wgrad-compute".split())


def test_failed_process_ends():
    """An unknown error ends the process although an exit handler blocks."""
    code = (
        "import time, atexit\n"
        "from megatron.gpt_oss import errors\n"
        "errors.SECONDS_TO_EXIT = 1\n"
        "atexit.register(time.sleep, 1000)\n"
        'def main(): raise TypeError("no such keyword")\n'
        "errors.run_main(main)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ended.returncode == -signal.SIGALRM
    assert "TypeError: no such keyword" in ended.stderr


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.slow] if case in SLOW else []) for case in CASES],
)
def test_equals_the_run_without(ranks, request, documents, tmp_path, case):
    world_size, flags = CASES[case]
    inputs = request.getfixturevalue("four_layers" if "vpp" in case else "inputs")
    if "vpp" in case:
        flags += " --preset-layers 4"
    if "packed" in case:
        flags += f" --data-path {documents}"
    expected = train(ranks, inputs, tmp_path / "without", world_size, flags)
    found = train(ranks, inputs, tmp_path / "with", world_size, f"{flags} {OVERLAP}")
    assert len(expected[0]) == STEPS
    for rank in range(world_size):
        for step in range(STEPS):
            assert found[rank][step] == expected[rank][step], (rank, step)
