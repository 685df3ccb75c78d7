# Copyright (c) 2026, the megatron-core gptoss authors.
"""The log line of a step, and metrics.jsonl of a resumed run."""

import io

from megatron.gpt_oss.training.metrics.jsonl import read_metrics
from megatron.gpt_oss.training.metrics.log import TrainingLog, short_count
from megatron.training.step_callbacks import SetEvaluated, TrainingLogged


def logged(step, **changes):
    values = {
        "iteration": step,
        "train_iters": 120,
        "losses": {"lm loss": 5.0 - step / 10},
        "learning_rate": 3e-3,
        "grad_norm": 0.5,
        "elapsed_per_iteration": 2.0,
        "consumed_samples": 8 * step,
        "batch_size": 8,
        "tokens_in_batch": 8 * 512,
        "squared_lengths_in_batch": None,
        "skipped_iterations": 0,
        "nan_iterations": 0,
        "loss_scale": 1.0,
        "peak_memory": 3 * 2**29,
    }
    return TrainingLogged(**{**values, **changes})


def evaluated(step, loss=2.0):
    return SetEvaluated(
        step, f"iteration {step} on validation set", "", {"lm loss": loss}, 8 * step
    )


def test_one_line_a_step(tmp_path):
    console = io.StringIO()
    log = TrainingLog(
        console,
        tmp_path / "metrics.jsonl",
        seq_length=512,
        num_ranks=4,
        flops_of=lambda tokens, squares: 5e11 * tokens if squares is None else squares * tokens,
        peak_tflops=989.5,
    )
    log.step(logged(20))
    log.step(logged(21, grad_norm=None, skipped_iterations=1))
    log.step(logged(22, losses={"lm loss": 2.0, "load_balancing_loss": 1.5}))
    log.step(logged(23, tokens_in_batch=4000, squared_lengths_in_batch=2e9))
    first, second, _, packed = console.getvalue().splitlines()
    assert first == (
        "step  20/120 | loss  3.0000 | lr 3.00e-03 | grad norm   0.500 |     512 tokens/s/GPU |  "
        "256.0 TFLOP/s | MFU 25.9% |   1.50 GiB |  81.92k tokens | ETA 0:03:20"
    )
    assert "grad norm -" in second and second.endswith("1 skipped")
    assert "|    1.0 TFLOP/s |" in packed
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert records[0]["tokens_per_second"] == 2048 and records[0]["tokens"] == 81920
    assert records[0]["mfu"] == 256 / 989.5
    assert records[2]["load_balancing_loss"] == 1.5


def test_lines_have_one_width():
    console = io.StringIO()
    log = TrainingLog(console, None, 512, flops_of=lambda tokens, squares: 1e12)
    for step, loss in ((1, 12.3456), (9, 0.5), (120, 3.0)):
        log.step(logged(step, losses={"lm loss": loss}, consumed_samples=8 * step))
    columns = {tuple(i for i, c in enumerate(line) if c == "|") for line in lines_of(console)}
    assert len(columns) == 1 and "MFU     - |" in lines_of(console)[0]


def lines_of(console):
    return console.getvalue().splitlines()


def test_a_resumed_run_replaces_the_steps_that_it_makes_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = TrainingLog(io.StringIO(), path, 512)
    for step in (1, 2, 3, 4):
        log.step(logged(step))
    with open(path, "a") as stream:
        stream.write('{"step": 5, "lo')  # killed while it wrote
    log = TrainingLog(io.StringIO(), path, 512)
    log.step(logged(3, learning_rate=1.0))
    assert [(r["step"], r["learning_rate"]) for r in read_metrics(path)] == [
        (1, 3e-3),
        (2, 3e-3),
        (3, 1.0),
    ]


def test_a_run_with_nothing_left_to_train_keeps_every_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    TrainingLog(io.StringIO(), path, 512).step(logged(4))
    TrainingLog(io.StringIO(), path, 512).evaluation(evaluated(4))
    assert ["valid_loss" in record for record in read_metrics(path)] == [False, True]


def test_evaluation_of_which_no_token_counts(tmp_path):
    """NaN is no number of JSON's, and of a run's not one to pass over."""
    console, path = io.StringIO(), tmp_path / "metrics.jsonl"
    TrainingLog(console, path, 512).evaluation(evaluated(4, float("nan")))
    assert "loss nan, no unmasked tokens" in console.getvalue()
    assert read_metrics(path)[0]["valid_loss"] is None and "NaN" not in path.read_text()


def test_step_of_which_no_token_counts(tmp_path):
    """As with documents of one token and --eod-mask-loss: said on its line, null in the file."""
    console, path = io.StringIO(), tmp_path / "metrics.jsonl"
    nothing = logged(1, losses={"lm loss": float("nan"), "load": float("inf")}, grad_norm=0.0)
    TrainingLog(console, path, 512).step(nothing)
    assert "loss     nan" in console.getvalue() and "no unmasked tokens" in console.getvalue()
    (record,) = read_metrics(path)
    assert record["loss"] is None and record["load"] is None and record["grad_norm"] == 0.0
    TrainingLog(console, None, 512).step(logged(2))
    assert "no unmasked tokens" not in console.getvalue().splitlines()[1]


def test_keys_of_the_previous_version(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1, "checkpoint": {"seconds_held_up": 1.0, "seconds_in_background": 2.0}}\n'
        '{"step": 1, "experts": {"busiest_share": [0.5], "busiest_rank": [2.0]}}\n'
        '{"step": 1, "norms": {"sinks": {"lowest": -1.0, "highest": 3.0}}}\n'
    )
    checkpoint, experts, norms = read_metrics(path)
    assert checkpoint["checkpoint"] == {"blocking_seconds": 1.0, "background_seconds": 2.0}
    assert experts["experts"] == {"max_expert_share": [0.5], "ep_load_imbalance": [2.0]}
    assert norms["norms"] == {"sinks": {"min": -1.0, "max": 3.0}}


def test_short_count():
    assert [short_count(n) for n in (7, 1234, 2.5e6, 3e9, 4e12)] == [
        "7",
        "1.23k",
        "2.50M",
        "3.00B",
        "4.00T",
    ]
