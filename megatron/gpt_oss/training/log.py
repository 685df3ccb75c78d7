# Copyright (c) 2026, the megatron-core gptoss authors.
"""What a person sees of a run: one aligned line a step, and metrics.jsonl."""

import math
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

from megatron.gpt_oss.metrics import append_metrics, drop_from

LOSS = "lm loss"
GIB = 2**30


def short_count(number: float) -> str:
    """1234567 -> '1.23M'."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.2f}{unit}"
    return f"{number:.0f}"


class TrainingLog:
    """Turns Megatron's step callbacks into lines; made on the rank that holds the loss.

    Args:
        console: where lines for people go.
        metrics: path of metrics.jsonl, or None. A line is one JSON object; a run that resumes
            before its last logged step replaces what came after.
        seq_length: tokens a sample.
    """

    def __init__(self, console: TextIO, metrics: Path | None, seq_length: int):
        self._console = console
        self._metrics = metrics
        self._seq_length = seq_length
        self._seconds_per_step: float | None = None
        self._trimmed = False

    def step(self, values: dict[str, Any]) -> None:
        """A log interval ended (see `step_callbacks.on_training_log`)."""
        step, last = values["iteration"], values["train_iters"]
        elapsed = values["elapsed_per_iteration"]
        # Exponential mean: a slow step (a checkpoint, the first one) should not swing the ETA.
        mean = elapsed if self._seconds_per_step is None else self._seconds_per_step
        self._seconds_per_step = 0.9 * mean + 0.1 * elapsed
        remaining = timedelta(seconds=round(self._seconds_per_step * max(0, last - step)))
        record = {
            "step": step,
            "loss": values["losses"].get(LOSS),
            "learning_rate": values["learning_rate"],
            "grad_norm": values["grad_norm"],
            "tokens_per_second": values["batch_size"] * self._seq_length / elapsed,
            "peak_memory_bytes": values["peak_memory"],
            "tokens": values["consumed_samples"] * self._seq_length,
            "seconds_per_step": elapsed,
            "skipped_steps": values["skipped_iterations"],
        }
        width = len(str(last))
        fields = [
            f"step {step:>{width}}/{last}",
            f"loss {_number(record['loss'], '7.4f')}",
            f"lr {_number(record['learning_rate'], '.2e')}",
            f"grad norm {_number(record['grad_norm'], '7.3f')}",
            f"{short_count(record['tokens_per_second']):>7} tokens/s",
            f"{record['peak_memory_bytes'] / GIB:6.2f} GiB",
            f"{short_count(record['tokens']):>7} tokens",
            f"ETA {remaining}",
        ]
        if record["skipped_steps"]:
            fields.append(f"{record['skipped_steps']} skipped")
        self._write(" | ".join(fields), record, remade_from=step)

    def evaluation(self, values: dict[str, Any]) -> None:
        """A validation or test set was evaluated (see `step_callbacks.on_evaluation`)."""
        loss = values["losses"].get(LOSS)
        key, name = ("valid_loss", "validation")
        if "test set" in values["prefix"]:
            key, name = ("test_loss", "test")
        name += f" {values['name']}" if values["name"] else ""
        perplexity = math.exp(min(loss, 20.0)) if loss is not None else None
        self._write(
            f"{name} at step {values['iteration']}: loss {_number(loss, '.4f')}, "
            f"perplexity {_number(perplexity, '.3f')}",
            {"step": values["iteration"], "set": name, key: loss},
            remade_from=values["iteration"] + 1,
        )

    def checkpoint(self, values: dict[str, Any]) -> None:
        """A checkpoint is complete (see `step_callbacks.on_checkpoint_saved`)."""
        print(f"saved {values['checkpoint']}", file=self._console, flush=True)

    def _write(self, line: str, record: dict[str, Any], remade_from: int) -> None:
        """Print and log; the first record says which steps of an earlier start are made anew."""
        print(line, file=self._console, flush=True)
        if self._metrics is None:
            return
        if not self._trimmed:
            drop_from(self._metrics, remade_from)
            self._trimmed = True
        append_metrics(self._metrics, record)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
