# Copyright (c) 2026, the megatron-core gptoss authors.

"""Position of a resumed run in its schedule; test_resumed_schedule.py tests complete runs."""

import copy
import random
import types
from argparse import Namespace

import pytest

from megatron.core import num_microbatches_calculator as microbatches
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from tests.harness import tiny_pretrain, watched_pretrain
from tests.harness.reference_schedule import parsed, rate


@pytest.fixture
def position(monkeypatch):
    """The module, whose lines are kept in `lines`."""
    from megatron.training import run_position, step_callbacks

    lines = []
    step_callbacks.clear()
    step_callbacks.subscribe(step_callbacks.ScheduleChanged, lambda event: lines.append(event.line))
    monkeypatch.setattr(run_position, "print_rank_0", lambda line: None)
    monkeypatch.setattr(run_position, "lines", lines, raising=False)
    yield run_position
    step_callbacks.clear()
    microbatches.destroy_num_microbatches_calculator()


class Run:
    """Arguments, scheduler and counters of a run, without a model."""

    def __init__(self, position, flags, batch, checkpoint=None, **others):
        self.position, given = position, parsed(flags)
        self.args = Namespace(
            **vars(given),
            global_batch_size=batch,
            step_batch_size_schedule=None,
            seq_length=64,
            no_load_optim=False,
            no_save_optim=False,
            consumed_train_samples=0,
        )
        vars(self.args).update(others)
        microbatches.destroy_num_microbatches_calculator()
        microbatches.init_num_microbatches_calculator(
            0, global_batch_size=batch, micro_batch_size=1, data_parallel_size=1
        )
        unit = batch if given.train_iters else 1
        kind = "iters" if given.train_iters else "samples"
        end = getattr(given, f"lr_decay_{kind}") or getattr(given, f"train_{kind}")
        warmup = getattr(given, f"lr_warmup_{kind}") or 0
        if given.lr_warmup_fraction is not None:
            warmup = given.lr_warmup_fraction * end
        wsd = getattr(given, f"lr_wsd_decay_{kind}")
        group = {"max_lr": given.lr, "min_lr": given.min_lr or 0.0, "default_config": True}
        self.scheduler = OptimizerParamScheduler(
            types.SimpleNamespace(param_groups=[group]),
            init_lr=given.lr_warmup_init or 0.0,
            max_lr=given.lr,
            min_lr=given.min_lr or 0.0,
            lr_warmup_steps=warmup * unit,
            lr_decay_steps=end * unit,
            lr_decay_style=given.lr_decay_style,
            start_wd=0.1,
            end_wd=0.1,
            wd_incr_steps=end * unit,
            wd_incr_style="constant",
            use_checkpoint_opt_param_scheduler=others.get("keep", False),
            wsd_decay_steps=None if wsd is None else wsd * unit,
            lr_wsd_decay_style=given.lr_wsd_decay_style,
        )
        self.iteration = 0
        if checkpoint is not None:
            self.iteration = checkpoint["iteration"]
            saved = checkpoint["args"]
            self.args.consumed_train_samples = saved.consumed_train_samples
            position.resume(self.scheduler, checkpoint, self.iteration, self.args)

    def train(self, iterations, skip=()):
        """The rates that the log gives, by step."""
        rates = {}
        for _ in range(iterations):
            batch = self.args.global_batch_size
            self.iteration += 1
            if self.iteration not in skip:
                self.scheduler.step(self.position.increment(self.scheduler, self.args, batch))
            self.args.consumed_train_samples += batch
            rates[self.iteration] = self.scheduler.optimizer.param_groups[0]["lr"]
        return rates

    def checkpoint(self):
        state = self.position.state_dict(self.scheduler, self.args)
        groups = [{**self.scheduler.optimizer.param_groups[0], "params": [0]}]
        return copy.deepcopy(
            {
                "args": self.args,
                "iteration": self.iteration,
                "opt_param_scheduler": state,
                "optimizer": {"param_groups": groups, "state": {}},
            }
        )


def drawn(random_numbers):
    """A command line."""
    choose = random_numbers.choice
    kind = choose(["iters", "iters", "samples"])
    train = choose([12, 16, 20]) * (1 if kind == "iters" else 4)
    words = [f"--train-{kind} {train} --lr {choose([1e-3, 5e-4])} --min-lr {choose([0, 1e-4])}"]
    words.append(choose(["", f"--lr-decay-{kind} {train - 3}"]))
    words.append(
        choose(["", f"--lr-warmup-{kind} {train // 2}", "--lr-warmup-fraction 0.3"])
        + choose(["", " --lr-warmup-init 1e-5"])
    )
    style = choose(["linear", "cosine", "constant", "WSD", "inverse-square-root"])
    words.append(f"--lr-decay-style {style}")
    if style == "WSD":
        shape = choose(["linear", "cosine", "exponential", "minus_sqrt"])
        words.append(f"--lr-wsd-decay-{kind} {train // 3} --lr-wsd-decay-style {shape}")
    return " ".join(words)


@pytest.mark.parametrize("seed", range(40))
def test_drawn_commands(position, seed):
    """Three starts, each by another command line and batch size."""
    numbers = random.Random(seed)
    checkpoint = None
    for _ in range(3):
        flags, batch = drawn(numbers), numbers.choice([2, 4, 8])
        run = Run(position, flags, batch, checkpoint)
        behind, consumed = run.iteration, run.args.consumed_train_samples
        for step, found in run.train(numbers.choice([3, 5])).items():
            at = step if parsed(flags).train_iters else consumed + (step - behind) * batch
            expected = rate(flags, at, batch)
            assert found == pytest.approx(expected, rel=1e-12), (step, flags, batch)
        checkpoint = run.checkpoint()


LINEAR = "--lr 1e-3 --min-lr 1e-4 --train-iters"


def test_skipped_updates(position):
    """Resumed by the same command, a run that skipped an update is that which did not stop."""
    whole = Run(position, f"{LINEAR} 8", 4).train(8, skip=(2, 3))
    first = Run(position, f"{LINEAR} 8", 4)
    first.train(4, skip=(2, 3))
    resumed = Run(position, f"{LINEAR} 8", 4, first.checkpoint())
    assert resumed.train(4) == {step: whole[step] for step in range(5, 9)}
    assert not position.lines
    larger = Run(position, f"{LINEAR} 8", 8, first.checkpoint()).train(4)
    assert larger == pytest.approx({step: whole[step] for step in range(5, 9)})


@pytest.mark.parametrize("flags", [f"{LINEAR} 8", "--lr 1e-3 --train-samples 32"])
def test_checkpoint_of_upstream(position, flags):
    """A scheduler state without the fields that this project adds."""
    first = Run(position, flags, 4)
    first.train(4)
    checkpoint = first.checkpoint()
    for name in ("init_lr", "wsd_decay_steps", "lr_wsd_decay_style", "steps_per_iteration"):
        del checkpoint["opt_param_scheduler"][name]
    found = Run(position, flags, 4, checkpoint).train(4)
    unit = 1 if "iters" in flags else 4
    assert found == pytest.approx({step: rate(flags, step * unit) for step in range(5, 9)})
    assert not position.lines


def test_counter_that_lost_steps(position):
    """An earlier --no-load-optim left the counter behind the steps: the step decides, with a line."""
    first = Run(position, f"{LINEAR} 8", 4)
    first.train(4)
    checkpoint = first.checkpoint()
    del checkpoint["opt_param_scheduler"]["steps_per_iteration"]
    checkpoint["opt_param_scheduler"]["num_steps"] = 4
    found = Run(position, f"{LINEAR} 8", 4, checkpoint).train(1)
    assert found[5] == pytest.approx(rate(f"{LINEAR} 8", 5))
    assert position.lines == [
        "learning rate at step 5: 4.38e-4 by this command, 7.75e-4 by the checkpoint's schedule "
        "(the checkpoint's counter is not at its step)"
    ]
    kept = Run(position, f"{LINEAR} 8", 4, checkpoint, keep=True).train(1)
    assert kept[5] == pytest.approx(rate(f"{LINEAR} 8", 2))


def test_longer(position):
    """The line, where nothing but the number of steps changes."""
    first = Run(position, f"{LINEAR} 20", 4)
    first.train(20)
    Run(position, f"{LINEAR} 36", 4, first.checkpoint())
    assert position.lines == [
        "learning rate at step 21: 4.75e-4 by this command, 1.00e-4 by the checkpoint's schedule "
        "(decay 36 steps, 20 steps in the checkpoint)"
    ]


def test_kept_twice(position):
    """The checkpoint's schedule, kept at another batch size and saved again, stays what it is."""
    first = Run(position, f"{LINEAR} 8", 2)
    first.train(4)
    command = "--lr 5e-4 --train-iters 12"
    second = Run(position, command, 4, first.checkpoint(), keep=True)
    found = second.train(2)
    found.update(Run(position, command, 8, second.checkpoint(), keep=True).train(3))
    assert found == pytest.approx({step: rate(f"{LINEAR} 8", step) for step in range(5, 10)})


def test_samples_of_another_batch_size(position):
    """The dataset is long enough, and no step is missing."""
    first = Run(position, f"{LINEAR} 8", 4)
    first.train(4)
    for batch, wanted in ((2, 24), (4, 32), (8, 64)):
        run = Run(position, f"{LINEAR} 8", batch, first.checkpoint())
        run.args.iteration = run.iteration
        assert position.num_train_samples(run.args) == wanted
    run = Run(position, "--lr 1e-3 --train-samples 40", 8, first.checkpoint())
    assert run.args.train_iters == 4 + (40 - 16) // 8
    run = Run(position, f"{LINEAR} 4", 4, first.checkpoint())
    run.args.iteration = run.iteration
    assert position.num_train_samples(run.args) == 17


def test_validation_samples_of_another_interval(position):
    args = Namespace(
        full_validation=False, skip_train=False, eval_interval=4, eval_iters=2, iteration=4
    )
    args = Namespace(**vars(args), train_iters=8, global_batch_size=4, consumed_valid_samples=32)
    assert position.num_valid_samples(args, wanted=24) == 32 + 2 * 8
    args.eval_interval = 1
    assert position.num_valid_samples(args, wanted=72) == 32 + 5 * 8


def test_longer_run(ranks, tmp_path):
    """Upstream's own loop: another --train-iters, --lr and batch size at the middle of a run."""
    data = tiny_pretrain.write_random_dataset(str(tmp_path / "data"))
    folder = tmp_path / "run"

    def train(flags):
        flags = f"--save {folder} --load {folder} --save-interval 2 --lr-warmup-iters 1 {flags}"
        return ranks.run(
            watched_pretrain.run, flags.split(), data, world_size=1, init_process_group=False
        )[0]["steps"]

    base = "--lr 1e-2 --min-lr 1e-3 --lr-decay-style cosine --lr-warmup-iters 1"
    train("--train-iters 2")
    for last, flags in (
        (4, "--train-iters 4 --lr 5e-3"),
        (6, "--train-iters 6 --global-batch-size 8"),
    ):
        steps = train(flags)
        assert [step["iteration"] for step in steps] == [last - 1, last]
        for step in steps:
            expected = rate(f"{base} {flags}", step["iteration"])
            assert step["learning_rate"] == pytest.approx(expected, rel=1e-6)
