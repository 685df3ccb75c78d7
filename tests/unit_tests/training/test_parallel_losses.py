# Copyright (c) 2026, the megatron-core gptoss authors.

"""Upstream's pretrain() on the CPU: a sharded run has the losses of the one-process run.

All runs are fp32, start from one checkpoint that a single process wrote, and see the same samples,
so that each step's loss may differ by the order of additions only. A wrong gradient shows in its
norm at once, and in the losses of the two steps that follow, whose learning rate is high: the second
of them has moments of two gradients behind it.
"""

import pytest

from tests.harness import tiny_pretrain
from tests.harness.ranks import RankFailure

pytestmark = pytest.mark.ranks(4)

STEPS = 3
# Additions in another order move a loss by 1.2e-7 and a norm by 3.3e-7 over ten steps.
RELATIVE_TOLERANCE = 1e-5

# world size, flags. Global batch 4 throughout.
LAYOUTS = {
    "tp2": (2, "--tensor-model-parallel-size 2"),
    "tp2-sp": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "pp2": (2, "--pipeline-model-parallel-size 2"),
    "pp2-vpp2": (
        2,
        "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
    ),
    "ep2": (2, "--expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall"),
    "ep2-allgather": (2, "--expert-model-parallel-size 2 --moe-token-dispatcher-type allgather"),
    "ep2-tp2": (
        4,
        "--expert-model-parallel-size 2 --tensor-model-parallel-size 2 --sequence-parallel "
        "--expert-tensor-parallel-size 2 --moe-token-dispatcher-type alltoall",
    ),
    "ep2-tp2-etp1": (
        2,
        "--expert-model-parallel-size 2 --tensor-model-parallel-size 2 --sequence-parallel "
        "--expert-tensor-parallel-size 1 --moe-token-dispatcher-type alltoall",
    ),
    "dp2": (2, ""),
    "dp2-distopt": (2, "--use-distributed-optimizer"),
    "dp2-distopt-overlap": (
        2,
        "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
    ),
    "mbs2": (1, "--micro-batch-size 2"),
    # Grouped experts, from the same checkpoint, against the run with SequentialMLP.
    "grouped": (1, "--moe-grouped-gemm"),
    "grouped-ep2-distopt": (
        2,
        "--moe-grouped-gemm --expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall "
        "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather "
        "--recompute-granularity selective --recompute-modules moe_act",
    ),
    "grouped-ep2-tp2": (
        4,
        "--moe-grouped-gemm --expert-model-parallel-size 2 --tensor-model-parallel-size 2 "
        "--sequence-parallel --expert-tensor-parallel-size 2 --moe-token-dispatcher-type alltoall",
    ),
    "cp2-ep2-mbs2": (
        2,
        "--context-parallel-size 2 --expert-model-parallel-size 2 --micro-batch-size 2",
    ),
    "cp4-each-layer": (
        4,
        "--context-parallel-size 4 --cp-comm-type a2a+p2p all_gather p2p a2a "
        "--hierarchical-context-parallel-sizes 2 2 --recompute-granularity selective",
    ),
}

# Attention within documents; several begin in most samples.
PACKED = "--dataloader-inter-document-masking"
PACKED_LAYOUTS = {
    "cp2-tp2-sp": (
        4,
        "--context-parallel-size 2 --tensor-model-parallel-size 2 --sequence-parallel "
        "--expert-tensor-parallel-size 1 --cp-comm-type a2a",
    ),
    "cp2-pp2-vpp2": (
        4,
        "--context-parallel-size 2 --pipeline-model-parallel-size 2 "
        "--num-layers-per-virtual-pipeline-stage 1",
    ),
    "cp2-ep2-dp2-distopt": (
        4,
        "--context-parallel-size 2 --expert-model-parallel-size 2 --use-distributed-optimizer",
    ),
}

# The others train tiny_pretrain's small model.
FOUR_LAYERS = ("pp2-vpp2", "cp4-each-layer", "cp2-pp2-vpp2")


@pytest.fixture(scope="module")
def files(tmp_path_factory, ranks):
    """Paths of the dataset and of the checkpoints that runs start from, by the model's flags."""
    directory = tmp_path_factory.mktemp("parallel_losses")
    data = tiny_pretrain.write_random_dataset(str(directory / "data"))
    starts = {}
    for model in (tiny_pretrain.SMALL, ""):
        starts[model] = str(directory / f"start{len(starts)}")
        ranks.run(
            tiny_pretrain.write_initial_checkpoint,
            f"--train-iters 1 {model}".split(),
            data,
            starts[model],
            world_size=1,
            init_process_group=False,
        )
    return data, starts


def train(ranks, files, world_size, flags, steps=STEPS, model=tiny_pretrain.SMALL):
    """Train from the common start; one record of callbacks for each rank."""
    data, starts = files
    flags = f"--load {starts[model]} --finetune --train-iters {steps} {model} {flags}".split()
    return ranks.run(
        tiny_pretrain.run_pretrain,
        flags,
        data,
        world_size=world_size,
        init_process_group=False,
    )


def losses(records) -> list:
    """The loss of every step, from the last rank (the last pipeline stage)."""
    return [step["losses"]["lm loss"] for step in records[-1]["steps"]]


@pytest.fixture(scope="module")
def one_process(ranks, files):
    return train(ranks, files, 1, "")[0]


@pytest.fixture(scope="module")
def one_process_of_four_layers(ranks, files):
    return train(ranks, files, 1, "", model="")[0]


def test_one_process(ranks, files):
    """The loop runs to the end, reports every step, learns, and evaluates."""
    record = train(ranks, files, 1, "", steps=10)[0]
    loss = losses([record])
    assert len(loss) == 10
    assert loss[-1] < 0.93 * loss[0]
    assert len(record["evaluations"]) == 1
    assert record["evaluations"][0]["losses"]["lm loss"] < 0.95 * loss[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses(ranks, files, request, layout):
    """Each step's loss, gradient norm and the evaluation equal those of one process."""
    world_size, flags = LAYOUTS[layout]
    if layout in FOUR_LAYERS:
        expected = request.getfixturevalue("one_process_of_four_layers")
        compare(train(ranks, files, world_size, flags, model=""), expected)
    else:
        expected = request.getfixturevalue("one_process")
        compare(train(ranks, files, world_size, flags), expected)


@pytest.fixture(scope="module")
def one_process_packed(ranks, files, one_process):
    record = train(ranks, files, 1, PACKED)[0]
    norm, unpacked = (run["steps"][0]["grad_norm"] for run in (record, one_process))
    assert abs(norm / unpacked - 1) > 10 * RELATIVE_TOLERANCE  # documents were kept apart
    return record


@pytest.fixture(scope="module")
def one_process_packed_of_four_layers(ranks, files):
    return train(ranks, files, 1, PACKED, model="")[0]


@pytest.mark.parametrize("layout", PACKED_LAYOUTS)
def test_packed_losses(ranks, files, request, layout):
    """The same with documents that attention keeps apart, on every pipeline stage."""
    world_size, flags = PACKED_LAYOUTS[layout]
    if layout in FOUR_LAYERS:
        expected = request.getfixturevalue("one_process_packed_of_four_layers")
        compare(train(ranks, files, world_size, f"{PACKED} {flags}", model=""), expected)
    else:
        expected = request.getfixturevalue("one_process_packed")
        compare(train(ranks, files, world_size, f"{PACKED} {flags}"), expected)


def test_skipped_iteration(ranks, files):
    """A skipped step's documents were split one by one, which needs TransformerEngine and lengths
    that 2 * cp divides."""
    flags = f"{PACKED} --iterations-to-skip 2"
    expected = losses(train(ranks, files, 1, flags))
    found = losses(train(ranks, files, 2, f"{flags} --context-parallel-size 2"))
    assert len(expected) == 2
    assert found == pytest.approx(expected, rel=RELATIVE_TOLERANCE)


def test_router_losses(ranks, files):
    """A sequence's load is balanced over all of its ranks, and its router's z-loss counts once."""
    flags = (
        "--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.1 --moe-z-loss-coeff 0.01"
    )
    one = train(ranks, files, 1, flags)
    layout = "--context-parallel-size 2 --expert-model-parallel-size 2"
    split = train(ranks, files, 2, f"{flags} {layout}")
    assert losses(split) == pytest.approx(losses(one), rel=RELATIVE_TOLERANCE)
    norms, expected = ([step["grad_norm"] for step in run[0]["steps"]] for run in (split, one))
    assert norms == pytest.approx(expected, rel=RELATIVE_TOLERANCE)


def compare(records, one_process):
    expected = pytest.approx(losses([one_process]), rel=RELATIVE_TOLERANCE)
    assert losses(records) == expected
    for record in records:
        norms = [step["grad_norm"] for step in record["steps"]]
        expected = [step["grad_norm"] for step in one_process["steps"]]
        assert norms == pytest.approx(expected, rel=RELATIVE_TOLERANCE)
    evaluation = records[-1]["evaluations"][0]["losses"]["lm loss"]
    expected = one_process["evaluations"][0]["losses"]["lm loss"]
    assert evaluation == pytest.approx(expected, rel=RELATIVE_TOLERANCE)


RESUMED = {
    "one-process": ("", 1, "", 1, 0.0),
    "dp2-distopt": ("--use-distributed-optimizer", 2, "--use-distributed-optimizer", 2, 0.0),
    "dp2-distopt-to-pp2": (
        "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable",
        2,
        "--use-distributed-optimizer --pipeline-model-parallel-size 2",
        2,
        RELATIVE_TOLERANCE,
    ),
    "cp2-ep2-to-cp4-ep2": (
        "--context-parallel-size 2 --expert-model-parallel-size 2 --use-distributed-optimizer "
        "--dist-ckpt-optim-fully-reshardable",
        2,
        "--context-parallel-size 4 --expert-model-parallel-size 2 --use-distributed-optimizer",
        4,
        RELATIVE_TOLERANCE,
    ),
    "tp2-to-dp2": (
        "--tensor-model-parallel-size 2 --sequence-parallel --use-distributed-optimizer "
        "--dist-ckpt-optim-fully-reshardable",
        2,
        "--use-distributed-optimizer",
        2,
        RELATIVE_TOLERANCE,
    ),
    # The optimizer's state of one implementation of the experts is that of the other.
    "sequential-to-grouped-ep2": (
        "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable "
        "--expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall",
        2,
        "--moe-grouped-gemm --use-distributed-optimizer --expert-model-parallel-size 2 "
        "--moe-token-dispatcher-type alltoall",
        2,
        RELATIVE_TOLERANCE,
    ),
    "grouped-tp2-to-sequential": (
        "--moe-grouped-gemm --tensor-model-parallel-size 2 --sequence-parallel "
        "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable",
        2,
        "--use-distributed-optimizer",
        1,
        RELATIVE_TOLERANCE,
    ),
}


@pytest.mark.parametrize("case", RESUMED)
def test_checkpoint_resumes(ranks, files, tmp_path, case):
    """A run that loads a checkpoint continues as the run that wrote it: bit for bit with the same
    layout, and within rounding with another. Dropout is on in the first two cases, so that the
    state of the generators counts. The second step's loss shows the moments.
    """
    flags, world_size, resumed_flags, resumed_world_size, tolerance = RESUMED[case]
    common = f"--save {tmp_path} --save-interval 2"
    if not tolerance:
        common += " --attention-dropout 0.1 --hidden-dropout 0.1"
    whole = train(ranks, files, world_size, f"{common} {flags}", steps=4)
    assert [saved["iteration"] for saved in whole[0]["checkpoints"]] == [2, 4]
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("2")
    data, _ = files
    resumed = ranks.run(
        tiny_pretrain.run_pretrain,
        f"--load {tmp_path} --train-iters 4 {tiny_pretrain.SMALL} {common} {resumed_flags}".split(),
        data,
        world_size=resumed_world_size,
        init_process_group=False,
    )
    assert [step["iteration"] for step in resumed[-1]["steps"]] == [3, 4]
    for key, values in (
        ("loss", lambda steps: [step["losses"]["lm loss"] for step in steps]),
        ("norm", lambda steps: [step["grad_norm"] for step in steps]),
        ("rate", lambda steps: [step["learning_rate"] for step in steps]),
        ("samples", lambda steps: [step["consumed_samples"] for step in steps]),
    ):
        expected = values(whole[-1]["steps"][2:])
        assert values(resumed[-1]["steps"]) == pytest.approx(expected, rel=tolerance, abs=0), key


def test_optimizer_of_other_experts(ranks, files, tmp_path):
    """The default format of the distributed optimizer is bound to the order of the parameters,
    of which grouped experts have as many as SequentialMLP: refused, with the setting to change.
    """
    common = f"--save {tmp_path} --save-interval 3 --use-distributed-optimizer"
    train(ranks, files, 1, common)
    flags = f"--load {tmp_path} --train-iters 4 {tiny_pretrain.SMALL} --moe-grouped-gemm {common}".split()
    with pytest.raises(RankFailure, match="moe_grouped_gemm = False; here it is True"):
        ranks.run(
            tiny_pretrain.run_pretrain, flags, files[0], world_size=1, init_process_group=False
        )
