# Copyright (c) 2026, the megatron-core gptoss authors.

"""Flags of Megatron's that no other test runs: each in a training of a few steps.

Where a flag is said to change no number, the losses are those of the run without it; where it
changes the training, they are not.
"""

import pytest

from megatron.gpt_oss.errors import UsageError
from megatron.gpt_oss.training.metrics.jsonl import read_metrics
from megatron.training import checkpoint_integrity
from tests.harness import runs

pytestmark = pytest.mark.ranks(1)

STEPS = "--train-iters 2 --lr-warmup-iters 0 --save-interval 1000 --eval-interval 1000"


def losses(ranks, inputs, run_dir, flags):
    """Losses of the steps, in order."""
    records = runs.start(ranks, inputs, run_dir, f"{STEPS} {flags}")
    return [record["loss"] for record in records if "loss" in record]


@pytest.fixture(scope="module")
def plain_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("plain") / "run"


@pytest.fixture(scope="module")
def plain(ranks, inputs, plain_dir):
    found = losses(ranks, inputs, plain_dir, "")
    assert len(found) == 2
    return found


@pytest.fixture(scope="module")
def adam(ranks, inputs, tmp_path_factory):
    """Three steps without a flag of the optimizer but its name."""
    folder = tmp_path_factory.mktemp("adam")
    return losses(ranks, inputs, folder / "run", "--optimizer adam --train-iters 3")


def without(argv, *flags):
    """A command line that has not these flags, each of which has one value."""
    for flag in flags:
        while flag in argv:
            index = argv.index(flag)
            del argv[index : index + 2]
    return argv


def same(ranks, inputs, plain, tmp_path, flags):
    """The run with these flags is that without them, bit for bit; its directory."""
    assert losses(ranks, inputs, tmp_path / "run", flags) == plain
    return tmp_path / "run"


def test_same_numbers(ranks, inputs, plain, tmp_path):
    """Fusions that this project has otherwise, sizes, and how the ranks talk."""
    flags = (
        "--no-rope-fusion --no-bias-gelu-fusion --no-bias-swiglu-fusion --no-bias-dropout-fusion "
        "--no-masked-softmax-fusion --no-gradient-accumulation-fusion --no-persist-layer-norm "
        "--no-create-attention-mask-in-dataloader --accumulate-allreduce-grads-in-fp32 "
        "--disable-gloo-process-groups --distributed-backend gloo --no-overlap-p2p-communication "
        "--distributed-timeout-seconds-after-init 60 --disable-jit-fuser --trust-remote-code "
        "--mlp-chunks-for-training 1 --use-cpu-initialization"
    )
    same(ranks, inputs, plain, tmp_path, flags)


def test_same_numbers_with_checks(ranks, inputs, plain, tmp_path):
    """What looks at the training, how validation is split, what is recomputed; one document."""
    flags = (
        "--rerun-mode disabled --check-for-spiky-loss --check-for-large-grads --wandb-entity x "
        "--eval-micro-batch-size 2 --eval-global-batch-size 2 --ddp-average-in-collective "
        "--no-align-grad-reduce --no-align-param-gather --deterministic-mode "
        "--recompute-activations --reset-position-ids --reset-attention-mask"
    )
    same(ranks, inputs, plain, tmp_path, flags)


def test_logging(ranks, inputs, plain, tmp_path):
    pytest.importorskip("tensorboard")
    flags = (
        "--log-throughput --log-progress --log-params-norm --log-num-zeros-in-grad "
        "--timing-log-level 2 --timing-log-option all --no-barrier-with-level-1-timing "
        "--logging-level 20 --log-memory-interval 1 "
        f"--tensorboard-dir {tmp_path}/tb --tensorboard-log-interval 1 --tensorboard-queue-size 1 "
        "--log-timers-to-tensorboard --log-world-size-to-tensorboard "
        "--log-validation-ppl-to-tensorboard --no-log-loss-scale-to-tensorboard"
    )
    run_dir = same(ranks, inputs, plain, tmp_path, flags)
    upstream = (run_dir / "megatron-rank0.log").read_text()
    assert "forward-backward" in upstream and "params norm" in upstream
    assert list((tmp_path / "tb").glob("events*"))
    assert (run_dir / "checkpoints" / "progress.txt").is_file()


def test_data(ranks, inputs, plain, tmp_path):
    """Each split from its own files; indices kept in a directory; a file read instead of mapped."""
    data = f"{inputs}/data"
    flags = (
        f"--data-cache-path {tmp_path}/cache --no-mmap-bin-files --num-dataset-builder-threads 2 "
        "--mid-level-dataset-surplus 0.01"
    )
    same(ranks, inputs, plain, tmp_path, flags)
    assert list((tmp_path / "cache").rglob("*.npy"))
    flags += f" --train-data-path {data}"
    several = f"--valid-data-path {data} {data} --multiple-validation-sets"
    for name, more in (
        ("three", f"--valid-data-path {data} --test-data-path {data}"),
        ("sets", f"{several} --validation-set-names one two"),
        ("refused", f"{several} --test-data-path {data}"),
    ):
        argv = runs.command(inputs, tmp_path / name, f"{STEPS} {flags} {more}")
        argv = without(argv, "--data-path", "--split")
        if name == "refused":  # a TypeError of Megatron's, once the training has ended
            (message,) = ranks.run(refusal, argv, world_size=1, init_process_group=False)
            assert "--test-data-path cannot be used with --multiple-validation-sets" in message
            continue
        ranks.run(runs.main_in_rank, argv, world_size=1, init_process_group=False)
        assert len(runs.steps(read_metrics(tmp_path / name / "metrics.jsonl"))) == 2


def test_cyclic(ranks, inputs, plain, tmp_path):
    """--dataloader-type cyclic draws samples in another order."""
    found = losses(ranks, inputs, tmp_path / "run", "--dataloader-type cyclic")
    assert len(found) == 2 and found != plain
    same(ranks, inputs, plain, tmp_path / "single", "--dataloader-type single")


@pytest.mark.parametrize(
    "flags",
    [
        "--adam-beta1 0.5",
        "--start-weight-decay 0.5 --end-weight-decay 0.9 --weight-decay-incr-style linear",
        "--optimizer sgd --sgd-momentum 0.5",
    ],
)
def test_optimizer(ranks, inputs, plain, adam, tmp_path, flags):
    """The third step feels it; the first two losses are before and after one step."""
    found = losses(ranks, inputs, tmp_path / "run", f"{flags} --train-iters 3")
    assert found[0] == plain[0] and len(found) == 3
    assert found[2] != adam[2] and adam[:2] == plain


def test_schedule_in_samples(ranks, inputs, tmp_path):
    """Four steps of four samples: up in two, held for one, down in one."""
    flags = (
        "--train-samples 16 --lr-decay-samples 16 --lr-warmup-samples 8 --lr-decay-style WSD "
        "--lr-wsd-decay-samples 4 --lr-wsd-decay-style linear --eval-interval 1000"
    )
    argv = runs.command(inputs, tmp_path / "run", flags)
    argv = without(argv, "--lr-warmup-iters")
    ranks.run(runs.main_in_rank, argv, world_size=1, init_process_group=False)
    steps = runs.steps(read_metrics(tmp_path / "run" / "metrics.jsonl"))
    rates = [steps[step]["learning_rate"] for step in sorted(steps)]
    assert len(rates) == 4 and rates[0] < rates[1] == rates[2] > rates[3]


def test_end_of_a_run(ranks, inputs, plain, tmp_path):
    flags = (
        "--exit-duration-in-mins 1000 --manual-gc --manual-gc-interval 1 --no-manual-gc-eval "
        "--empty-unused-memory-level 1 --exit-signal-handler --exit-signal SIGTERM "
        "--persistent-save-interval 1 --save-retain-interval 2 --no-save-rng --no-load-rng "
        "--ckpt-fully-parallel-load --dist-ckpt-strictness log_all --train-sync-interval 1"
    )
    run_dir = same(ranks, inputs, plain, tmp_path, flags)
    assert checkpoint_integrity.choose(str(run_dir / "checkpoints")).iteration == 2
    runs.start(ranks, inputs, run_dir, f"{STEPS} {flags} --train-iters 3")
    assert sorted(runs.steps(read_metrics(run_dir / "metrics.jsonl"))) == [1, 2, 3]


def test_start_of_a_run(ranks, inputs, plain, plain_dir, tmp_path):
    with pytest.raises(Exception, match="--load .* holds no checkpoint"):
        losses(ranks, inputs, tmp_path / "none", "--exit-on-missing-checkpoint")
    flags = f"--pretrained-checkpoint {plain_dir}/checkpoints --start-eval-at-iter 1"
    found = losses(ranks, inputs, tmp_path / "other", flags)
    assert len(found) == 2 and found[0] < plain[1]  # its weights are two steps further
    flags = f"{STEPS} {flags} --skip-train"
    records = runs.start(ranks, inputs, tmp_path / "skipped", flags)
    assert not runs.steps(records) and any("validation" in str(record) for record in records)


def test_balanced_routing(ranks, inputs, plain, tmp_path):
    """Tokens go to experts at random; made-up data."""
    flags = "--moe-router-force-load-balancing"
    found = losses(ranks, inputs, tmp_path / "run", flags)
    assert len(found) == 2 and found != plain
    argv = runs.command(inputs, tmp_path / "mock", f"{STEPS} --mock-data")
    argv = without(argv, "--data-path", "--split")
    ranks.run(runs.main_in_rank, argv, world_size=1, init_process_group=False)
    assert len(runs.steps(read_metrics(tmp_path / "mock" / "metrics.jsonl"))) == 2


def refusal(argv):
    from megatron.gpt_oss.training.pretrain import main

    try:
        main(argv)
    except UsageError as error:
        return str(error)
    return ""


def test_let_through(ranks, inputs, tmp_path):
    """--allow-untested-flags runs it and says so; the log has the line."""
    flags = f"{STEPS} --moe-per-layer-logging --img-h 3"
    argv = runs.command(inputs, tmp_path / "run", flags)
    (refused,) = ranks.run(refusal, argv, world_size=1, init_process_group=False)
    assert "--moe-per-layer-logging is refused" in refused
    assert not (tmp_path / "run").exists()
    argv += ["--allow-untested-flags"]
    (printed,) = ranks.run(runs.main_in_rank, argv, world_size=1, init_process_group=False)
    assert (
        "Allowed although not tested here: --moe-per-layer-logging, --img-h 3 (docs/flags.md)"
        in printed
    )
    assert len(runs.steps(read_metrics(tmp_path / "run" / "metrics.jsonl"))) == 2
