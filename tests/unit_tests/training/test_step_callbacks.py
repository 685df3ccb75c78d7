# Copyright (c) 2026, the megatron-core gptoss authors.

"""Callbacks of an entry script in upstream's loop, checked against the printed lines."""

import contextlib
import io
import re

import pytest

from megatron.training import step_callbacks
from tests.harness import tiny_pretrain

SAMPLES_PER_STEP = 4


def run_with_output(flags, data, silent: bool = False) -> tuple:
    """Train; what the callbacks received, and what was printed."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        received = tiny_pretrain.run_pretrain(flags, data, silent=silent)
    return received, output.getvalue()


def run(ranks, data, flags: str, world_size: int = 1, **kwargs):
    return ranks.run(
        run_with_output,
        flags.split(),
        data,
        world_size=world_size,
        init_process_group=False,
        **kwargs,
    )


@pytest.fixture(scope="module")
def every_step(ranks, data):
    return run(ranks, data, "--train-iters 4 --eval-interval 2")[0]


def printed_losses(output: str) -> dict:
    pattern = r"iteration +(\d+)/.* lm loss: (\S+)"
    return {int(step): float(loss) for step, loss in re.findall(pattern, output)}


def test_training_log_and_evaluation(every_step):
    """The callbacks get the values of upstream's lines, and those that the lines do not hold."""
    received, output = every_step
    steps = received["steps"]
    assert [step["iteration"] for step in steps] == [1, 2, 3, 4]
    printed = printed_losses(output)
    for step in steps:
        assert step["losses"]["lm loss"] == pytest.approx(printed[step["iteration"]], rel=1e-6)
        assert step["train_iters"] == 4
        assert step["batch_size"] == SAMPLES_PER_STEP
        assert step["consumed_samples"] == SAMPLES_PER_STEP * step["iteration"]
        assert step["tokens_in_batch"] == SAMPLES_PER_STEP * tiny_pretrain.SEQ_LENGTH
        assert step["skipped_iterations"] == step["nan_iterations"] == 0
        assert 1e8 < step["peak_memory"] < 1e11
    norms = [float(norm) for norm in re.findall(r"grad norm: (\S+)", output)]
    assert [step["grad_norm"] for step in steps] == pytest.approx(norms, abs=6e-4)
    rates = [float(rate) for rate in re.findall(r"learning rate: (\S+)", output)]
    assert [step["learning_rate"] for step in steps] == pytest.approx(rates, rel=1e-6)
    times = [float(time) for time in re.findall(r"iteration \(ms\): (\S+)", output)]
    assert [1000 * step["elapsed_per_iteration"] for step in steps] == pytest.approx(times, abs=0.1)

    evaluations = received["evaluations"]
    assert [result["iteration"] for result in evaluations] == [2, 4]
    assert [result["name"] for result in evaluations] == ["", ""]
    assert evaluations[-1]["prefix"] == "iteration 4"
    values = [float(value) for value in re.findall(r"lm loss value: (\S+)", output)]
    got = [result["losses"]["lm loss"] for result in evaluations]
    assert got == pytest.approx(values, rel=1e-6)


def test_every_step_is_reported_by_itself(ranks, data, every_step):
    """Upstream gave the mean of steps 1 and 2 as step 2: compare with an interval of two."""
    losses = [step["losses"]["lm loss"] for step in every_step[0]["steps"]]
    pairs = run(ranks, data, "--train-iters 4 --log-interval 2")[0][0]["steps"]
    assert [step["iteration"] for step in pairs] == [2, 4]
    means = [sum(losses[:2]) / 2, sum(losses[2:]) / 2]
    assert [step["losses"]["lm loss"] for step in pairs] == pytest.approx(means, rel=1e-6)


def test_upstream_is_silenced_and_stages_without_loss_report(ranks, data):
    """On two pipeline stages: the lines are gone, every rank is called, the last has the loss."""
    flags = "--train-iters 3 --pipeline-model-parallel-size 2"
    (first, first_output), (last, last_output) = run(ranks, data, flags, world_size=2, silent=True)
    assert [step["iteration"] for step in first["steps"]] == [1, 2, 3]
    assert [step["losses"] for step in first["steps"]] == [{}, {}, {}]
    assert all(step["losses"]["lm loss"] > 1 for step in last["steps"])
    for key in ("grad_norm", "learning_rate", "consumed_samples"):
        assert [step[key] for step in first["steps"]] == [step[key] for step in last["steps"]]
    for words in ("elapsed time per iteration", "loss value", "memory (MB)", "Theoretical"):
        assert words not in first_output + last_output


@pytest.mark.parametrize("mode", ["", "--async-save --async-strategy mcore"], ids=["", "async"])
def test_checkpoint_saved(ranks, data, tmp_path, mode):
    """Called when a checkpoint is complete and the tracker file names it."""
    flags = f"--train-iters 3 --save {tmp_path} --save-interval 1 {mode}"
    for received, _ in run(ranks, data, flags, world_size=2):
        saved = received["checkpoints"]
        assert [checkpoint["iteration"] for checkpoint in saved] == [1, 2, 3]
        for checkpoint in saved:
            assert checkpoint["save_dir"] == str(tmp_path)
            assert checkpoint["checkpoint"] == str(tmp_path / f"iter_{checkpoint['iteration']:07d}")
            assert checkpoint["tracker"] == str(checkpoint["iteration"])
            assert 0 < checkpoint["blocking_seconds"] < 60
            assert (checkpoint["background_seconds"] > 0) == bool(mode)


def run_with_model_callbacks(flags, data) -> dict:
    """Norms of all gradients when they are said to be ready, and weights before and after."""
    seen = {"ready": [], "ended": [], "steps": []}

    def weights(model):
        return sum(float(p.detach().double().sum()) for p in model[0].parameters())

    def ready(event):
        gradients = [p.main_grad for p in event.model[0].parameters()]
        norm = sum(float(g.double().square().sum()) for g in gradients) ** 0.5
        seen["ready"].append((event.iteration, norm, weights(event.model)))

    def ended(event):
        assert hasattr(event.optimizer, "param_groups")
        seen["ended"].append((event.iteration, weights(event.model), len(seen["steps"])))

    step_callbacks.clear()
    step_callbacks.subscribe(step_callbacks.GradientsReady, ready)
    step_callbacks.subscribe(step_callbacks.StepEnded, ended)
    args = tiny_pretrain.parse(flags, data)
    step_callbacks.subscribe(
        step_callbacks.TrainingLogged, lambda event: seen["steps"].append(vars(event))
    )
    tiny_pretrain.pretrain(
        tiny_pretrain.pretrain_cfg_container_from_args(
            args, tiny_pretrain.gpt_config_from_args(args)
        ),
        tiny_pretrain.provide_datasets,
        tiny_pretrain.ModelType.encoder_or_decoder,
        tiny_pretrain.forward_step,
    )
    step_callbacks.clear()
    return seen


def test_model_callbacks(ranks, data):
    """Gradients are seen reduced and not clipped, before the update; the end of a step after it."""
    flags = "--train-iters 3 --clip-grad 0.01 --lr-warmup-iters 0 --use-cpu-initialization".split()
    seen = ranks.run(run_with_model_callbacks, flags, data, world_size=1, init_process_group=False)[
        0
    ]
    assert [entry[0] for entry in seen["ready"]] == [1, 2, 3]
    assert [entry[0] for entry in seen["ended"]] == [1, 2, 3]
    assert [entry[2] for entry in seen["ended"]] == [1, 2, 3]  # the step's line came before
    for step, (_, norm, _) in zip(seen["steps"], seen["ready"]):
        assert norm == pytest.approx(step["grad_norm"], rel=1e-5) and norm > 0.02
    for (_, _, before), (_, after, _) in zip(seen["ready"], seen["ended"]):
        assert before != after


def test_clear():
    calls = []
    first, second = (step_callbacks.CheckpointWaits(number, None) for number in (1, 2))
    step_callbacks.subscribe(step_callbacks.CheckpointWaits, calls.append)
    step_callbacks.silence_upstream_log()
    step_callbacks.publish(first)
    step_callbacks.publish(step_callbacks.ScheduleChanged(1, ""))
    step_callbacks.clear()
    step_callbacks.publish(second)
    assert calls == [first]
    assert not step_callbacks.upstream_log_silenced()


def test_full_validation_of_one_set(ranks, data):
    """--full-validation with a single validation set: «'int' object is not subscriptable».

    The set has 8 samples: two iterations of the global batch pass through it once.
    """
    flags = "--train-iters 3 --eval-iters 2"
    once = run(ranks, data, flags)[0][0]["evaluations"][-1]["losses"]["lm loss"]
    full = run(ranks, data, f"{flags} --full-validation")[0][0]["evaluations"][-1]
    assert full["losses"]["lm loss"] == pytest.approx(once, rel=1e-6)
