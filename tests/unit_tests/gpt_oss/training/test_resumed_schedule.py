# Copyright (c) 2026, the megatron-core gptoss authors.

"""The learning rate of resumed runs: the command's schedule at the position of the run.

Each case trains a run, resumes it by another command line, and compares the rate of every step with
`reference_schedule.rate`, a function of the step and the command line.
"""

import shutil

import pytest

from tests.harness import runs
from tests.harness.reference_schedule import parsed, rate

BASE = "--lr-decay-style linear --lr-warmup-iters 0 --lr 1e-3 --min-lr 1e-4 --eval-iters 0"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return runs.write_inputs(tmp_path_factory.mktemp("inputs"))


def start(ranks, inputs, run_dir, flags, world_size=1):
    """What the first rank printed, and the records of the steps."""
    # The schedule does not ask how a step's samples are split, unless one has a single sample.
    micro = 1 if "--step-batch-size-schedule" in flags else 2
    argv = runs.command(inputs, run_dir, f"{BASE} --micro-batch-size {micro} {flags}")
    if "--step-batch-size-schedule" in argv:
        index = argv.index("--global-batch-size")
        del argv[index : index + 2]
        where = argv.index("--step-batch-size-schedule") + 1
        argv[where] = argv[where].replace(",", " ")
    printed = ranks.run(runs.main_in_rank, argv, world_size=world_size, init_process_group=False)
    return printed[0], runs.steps(runs.read_metrics(run_dir / "metrics.jsonl"))


def lines(printed):
    """The log lines about the schedule."""
    return [line for line in printed.splitlines() if line.startswith("learning rate at step")]


def expect(records, flags, steps, samples=None):
    """The rate of each step is the reference's; with --train-samples at the samples consumed."""
    for step in steps:
        at = step if parsed(flags).train_iters else samples[step]
        found = records[step]["learning_rate"]
        assert found == pytest.approx(rate(f"{BASE} {flags}", at), rel=1e-6), (step, flags)


DISTOPT = "--use-distributed-optimizer"
CHANGES = {
    "another-lr": ("--lr 5e-4", "lr 5e-4, 0.001 in the checkpoint"),
    "another-min-lr": ("--min-lr 2e-4", "min lr 2e-4, 1e-4 in the checkpoint"),
    "longer": ("--train-iters 12", "decay 12 steps, 8 steps in the checkpoint"),
    "override-flag": ("--train-iters 12 --override-opt-param-scheduler", "decay 12 steps"),
    "decay-iters": ("--lr-decay-iters 6", "decay 6 steps, 8 steps in the checkpoint"),
    "style": ("--lr-decay-style cosine", "decay style cosine, linear in the checkpoint"),
    "batch": ("--global-batch-size 8", "global batch 8, 4 in the checkpoint"),
    "smaller-batch": ("--global-batch-size 2", "global batch 2, 4 in the checkpoint"),
    "warm-up-across": ("--lr-warmup-iters 6", "warm-up 6 steps, 0 steps in the checkpoint"),
    "warm-up-fraction": ("--lr-warmup-fraction 0.25", "warm-up 2 steps, 0 steps in the checkpoint"),
    "wsd": (
        "--lr-decay-style WSD --lr-wsd-decay-iters 3 --lr-wsd-decay-style linear",
        "decay style WSD, linear in the checkpoint",
    ),
    "everything": (
        "--lr 5e-4 --min-lr 0 --train-iters 10 --global-batch-size 8 --lr-decay-style cosine "
        "--lr-warmup-iters 5",
        "decay 10 steps, 8 steps in the checkpoint",
    ),
    "no-load-optim": ("--no-load-optim", "restart from zero (--no-load-optim)"),
}


@pytest.fixture(scope="module")
def stopped(ranks, inputs, tmp_path_factory):
    """A run of 8 steps that ended after 4, once with each optimizer."""
    folders = {}
    for name, flags in (("plain", ""), ("distopt", DISTOPT)):
        folders[name] = tmp_path_factory.mktemp(name)
        flags = f"--train-iters 8 --exit-interval 4 {flags}"
        _, records = start(ranks, inputs, folders[name], flags)
        expect(records, "--train-iters 8", range(1, 5))
    return folders


def copied(folder, destination):
    shutil.copytree(folder, destination)
    return destination


# What either optimizer has of its own: the rates in its groups, and a checkpoint's state that is
# left aside. The schedule, which the other changes are of, is the same object.
OF_THE_OPTIMIZER = ("another-lr", "another-min-lr", "override-flag", "everything", "no-load-optim")


@pytest.mark.parametrize(
    "change, optimizer",
    [(change, "plain") for change in CHANGES] + [(name, "distopt") for name in OF_THE_OPTIMIZER],
)
def test_change(ranks, inputs, stopped, tmp_path, change, optimizer):
    """Resumed at step 4 of 8 by another command, without a further flag."""
    flags, words = CHANGES[change]
    flags = f"--train-iters 8 {flags} {DISTOPT if optimizer == 'distopt' else ''}"
    run_dir = copied(stopped[optimizer], tmp_path / "run")
    printed, records = start(ranks, inputs, run_dir, flags)
    last = parsed(flags).train_iters
    assert sorted(records) == list(range(1, last + 1))
    expect(records, "--train-iters 8", range(1, 5))
    expect(records, flags, range(5, last + 1))
    (line,) = lines(printed)
    assert words in line
    at = f"learning rate at step 5: {short(records[5]['learning_rate'])} by this command, "
    assert line.startswith(at + f"{short(rate(f'{BASE} --train-iters 8', 5))} by the checkpoint's")


def short(value):
    mantissa, exponent = f"{value:.6e}".split("e")  # in single precision as in double
    return f"{float(mantissa):.2f}e{int(exponent)}"


def test_same_command(ranks, inputs, stopped, tmp_path):
    """Nothing changes, and nothing is logged."""
    printed, records = start(
        ranks, inputs, copied(stopped["plain"], tmp_path / "run"), "--train-iters 8"
    )
    expect(records, "--train-iters 8", range(1, 9))
    assert not lines(printed)


def test_multipliers_change(ranks, inputs, tmp_path):
    """Another factor, another number of groups, other betas and weight decay: this command's."""
    flags = "--train-iters 4 --save-interval 2 --lr-multiplier *.softmax_offset=0.5 *.router.*=2"
    other = (
        "--train-iters 4 --lr-multiplier *.softmax_offset=3 --adam-beta2 0.9 --adam-eps 1e-6 "
        "--weight-decay 0.2"
    )
    for name, optimizer in (("plain", ""), ("distopt", DISTOPT)):
        run_dir = tmp_path / name
        start(ranks, inputs, run_dir, f"{flags} --exit-interval 2 {optimizer}")
        argv = runs.command(inputs, run_dir, f"{BASE} {other} {optimizer}")
        printed, groups = ranks.run(main_with_groups, argv, world_size=1, init_process_group=False)[
            0
        ]
        (line,) = lines(printed)
        for words in ("multiples of the first, (1, 3), (0.5, 1, 2) in", "betas (0.9, 0.9), ("):
            assert words in line
        for words in ("eps 1e-6, 1e-8 in", "weight decay 0.2, 0.01 in"):
            assert words in line
        high = {group["max_lr"] for group in groups}
        assert sorted(high) == pytest.approx([1e-3, 3e-3])
        for group in groups:
            assert tuple(group["betas"]) == (0.9, 0.9) and group["eps"] == 1e-6
            assert group["weight_decay"] == pytest.approx(0.2 * group["wd_mult"])
            assert group["lr"] == pytest.approx(group["max_lr"] / 1e-3 * 1e-4)


def main_with_groups(argv):
    """What main() prints, and the optimizer's groups at the end."""
    from megatron.training import step_callbacks

    groups = []

    def step_ended(event):
        groups[:] = [
            {name: value for name, value in group.items() if name != "params"}
            for group in event.optimizer.param_groups
        ]

    def prepare():
        step_callbacks.subscribe(step_callbacks.StepEnded, step_ended)

    printed = runs.main_in_rank(argv, prepare=prepare)
    return printed, groups


def test_optimizer_left_out_of_the_checkpoint(ranks, inputs, tmp_path):
    """--no-save-optim: the schedule stands at the step, the moments restart, a line says so."""
    start(ranks, inputs, tmp_path / "run", "--train-iters 8 --exit-interval 4 --no-save-optim")
    kept = "--train-iters 8 --use-checkpoint-opt-param-scheduler"
    argv = runs.command(inputs, copied(tmp_path / "run", tmp_path / "kept"), f"{BASE} {kept}")
    message = ranks.run(error_of, argv, world_size=1, init_process_group=False)[0]
    assert "was saved without its schedule (--no-save-optim). Drop the flag" in message
    printed, records = start(ranks, inputs, tmp_path / "run", "--train-iters 8")
    expect(records, "--train-iters 8", range(1, 9))
    (line,) = lines(printed)
    assert line == (
        "learning rate at step 5: 4.38e-4 by this command; the optimizer's moments restart from "
        "zero (the checkpoint was saved with --no-save-optim)"
    )


def error_of(argv):
    """The one sentence that ends main()."""
    from megatron.gpt_oss.errors import RunError, UsageError

    try:
        runs.main_in_rank(argv)
    except (RunError, UsageError) as error:
        return str(error)


def test_schedule_of_the_checkpoint(ranks, inputs, stopped, tmp_path):
    """--use-checkpoint-opt-param-scheduler, at another batch size too; then once more."""
    run_dir = copied(stopped["plain"], tmp_path / "run")
    other = "--lr 5e-4 --min-lr 2e-4 --lr-decay-style cosine --global-batch-size 8"
    flags = f"--train-iters 10 {other} --use-checkpoint-opt-param-scheduler"
    printed, _ = start(ranks, inputs, run_dir, f"{flags} --exit-interval 6")
    assert "4.38e-4 by the checkpoint's schedule, which is kept; 3.5" in lines(printed)[0]
    _, records = start(ranks, inputs, run_dir, flags)
    expect(records, "--train-iters 8", range(1, 11))
    printed, records = start(ranks, inputs, run_dir, "--train-iters 12")
    expect(records, "--train-iters 12", range(11, 13))


def test_samples(ranks, inputs, tmp_path):
    """--train-samples counts in samples: another batch size, and as many samples in the end."""
    flags = "--train-samples 40"
    start(ranks, inputs, tmp_path / "run", f"{flags} --exit-interval 4 --global-batch-size 2")
    printed, records = start(ranks, inputs, tmp_path / "run", flags)
    samples = {step: 2 * step if step <= 4 else 8 + 4 * (step - 4) for step in range(1, 13)}
    assert sorted(records) == list(range(1, 13))
    expect(records, flags, range(1, 13), samples)
    assert "global batch 4, 2 in the checkpoint" in lines(printed)[0]
    assert records[12]["tokens"] == 40 * 64


def test_samples_then_iterations(ranks, inputs, tmp_path):
    """A run that counted in samples continues in iterations, and back."""
    start(ranks, inputs, tmp_path / "run", "--train-samples 32 --exit-interval 4")
    flags = "--train-iters 10"
    printed, records = start(ranks, inputs, tmp_path / "run", f"{flags} --exit-interval 6")
    expect(records, flags, range(5, 7))
    assert "decay 10 steps, 32 samples in the checkpoint" in lines(printed)[0]
    flags = "--train-samples 40"
    _, records = start(ranks, inputs, tmp_path / "run", flags)
    expect(records, flags, range(7, 11), {step: 4 * step for step in range(1, 11)})


STEP_BATCH = "--step-batch-size-schedule 0:1,128:2,384:4"


def test_batch_size_schedule(ranks, inputs, tmp_path):
    """The rate counts in iterations whatever a step's batch is; resumed within the ramp."""
    wsd = "--lr-decay-style WSD --lr-wsd-decay-iters 3 --lr-wsd-decay-style linear --min-lr 0"
    flags = f"--train-iters 7 {STEP_BATCH} {wsd}"
    batches = [1, 1, 2, 2, 4, 4, 4]
    consumed = [64 * sum(batches[: step + 1]) for step in range(7)]
    printed, whole = start(ranks, inputs, tmp_path / "whole", flags)
    assert " 1 x 64 tokens per step" in printed
    start(ranks, inputs, tmp_path / "two", f"{flags} --exit-interval 3")
    printed, two = start(ranks, inputs, tmp_path / "two", flags)
    assert not lines(printed) and " 2 x 64 tokens per step" in printed
    for records in (whole, two):
        expect(records, flags, range(1, 8))
        assert [records[step]["tokens"] for step in range(1, 8)] == consumed
    assert [two[step]["loss"] for step in range(1, 8)] == [
        whole[step]["loss"] for step in range(1, 8)
    ]
    flags = flags.replace("--train-iters 7", "--train-iters 10")
    _, longer = start(ranks, inputs, tmp_path / "two", flags)
    expect(longer, flags, range(8, 11))


@pytest.mark.parametrize(
    "flags, words",
    [
        (
            "--rampup-batch-size 2 2 30 --global-batch-size 8",
            'Megatron ignores it. Give --step-batch-size-schedule "0:2 640:4 1280:6 1920:8" in',
        ),
        ("--step-batch-size-schedule 0:1,oops", "cannot be parsed. Give pairs TOKENS:BATCH"),
        ("--step-batch-size-schedule 64:1", "Start it with 0:BATCH"),
        ("--step-batch-size-schedule 0:4,640:2", "2 follows 4"),
        (
            "--step-batch-size-schedule 0:2,640:3 --micro-batch-size 2",
            "batch size 3 is not a multiple of 2",
        ),
        ("--min-lr 1e-2", "args.min_lr <= args.lr (--min-lr is 0.01, --lr is 0.001)"),
        ("--min-lr -0.01", "--min-lr -0.01: expected 0 or more, and at most --lr 0.001"),
        ("--lr-warmup-init 1e-2", "--lr-warmup-init 0.01: expected"),
        ("--lr-warmup-fraction 1.5", "--lr-warmup-fraction 1.5: expected a fraction"),
        (
            "--use-checkpoint-opt-param-scheduler --override-opt-param-scheduler",
            "Drop one of them; without both",
        ),
    ],
)
def test_refused(ranks, inputs, tmp_path, flags, words):
    argv = runs.command(inputs, tmp_path / "run", f"{BASE} --train-iters 8 {flags}")
    if "--step-batch-size-schedule" in argv:
        index = argv.index("--global-batch-size")
        del argv[index : index + 2]
        where = argv.index("--step-batch-size-schedule") + 1
        argv[where] = argv[where].replace(",", " ")
    message = ranks.run(error_of, argv, world_size=1, init_process_group=False)[0]
    assert words in message, message


def test_starts_anew(ranks, inputs, stopped, tmp_path):
    """--finetune, and a checkpoint of weights alone: step 0, the schedule's beginning, no line."""
    where = stopped["plain"] / "checkpoints"
    flags = f"--train-iters 4 --load {where} --finetune --lr 5e-4"
    printed, records = start(ranks, inputs, tmp_path / "run", flags)
    expect(records, flags, range(1, 5))
    assert f"starts at step 0 from the weights of {where}" in printed and not lines(printed)
    assert records[4]["tokens"] == 4 * 4 * 64
    printed, _ = start(ranks, inputs, tmp_path / "hf", "--train-iters 1")
    assert f"starts from {inputs}/hf" in printed


def test_finished_run(ranks, inputs, stopped, tmp_path):
    """Nothing is left to train, at the last step or beyond it."""
    run_dir = copied(stopped["plain"], tmp_path / "run")
    for flags in ("--train-iters 4", "--train-iters 3", "--train-samples 16"):
        _, records = start(ranks, inputs, run_dir, flags)
        assert sorted(records) == [1, 2, 3, 4]
    _, records = start(ranks, inputs, run_dir, "--train-iters 8")
    expect(records, "--train-iters 8", range(1, 9))


def test_layout_changes_with_the_rate(ranks, inputs, stopped, tmp_path):
    """Two ranks resume what one has saved, at another rate and batch size."""
    flags = f"--train-iters 8 --lr 5e-4 --global-batch-size 8 {DISTOPT}"
    run_dir = copied(stopped["distopt"], tmp_path / "run")
    _, records = start(ranks, inputs, run_dir, flags, world_size=2)
    expect(records, flags, range(5, 9))


def test_tokens_at_another_length(ranks, inputs, stopped, tmp_path):
    """Tokens are those that were consumed, over any number of starts."""
    run_dir = copied(stopped["plain"], tmp_path / "run")
    flags = "--train-iters 8 --seq-length 32"
    printed, records = start(ranks, inputs, run_dir, f"{flags} --exit-interval 6")
    assert "sequence length 32, 64 in the checkpoint" in lines(printed)[0]
    assert [records[step]["tokens"] for step in (4, 5, 6)] == [1024, 1152, 1280]
    _, records = start(ranks, inputs, run_dir, "--train-iters 8")
    assert [records[step]["tokens"] for step in (7, 8)] == [1536, 1792]
    expect(records, "--train-iters 8", range(1, 9))


def test_last_step_is_evaluated_once(ranks, inputs, tmp_path):
    """Also where a finished run is started again."""
    flags = f"{BASE} --train-iters 4 --eval-iters 1 --eval-interval 2"
    for _ in range(2):
        records = runs.start(ranks, inputs, tmp_path / "run", flags)
        seen = [record["step"] for record in records if "valid_loss" in record]
        assert seen == [2, 4]
    records = runs.start(
        ranks, inputs, tmp_path / "odd", flags.replace("--train-iters 4", "--train-iters 3")
    )
    assert [record["step"] for record in records if "valid_loss" in record][-1] == 3
