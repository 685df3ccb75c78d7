# Copyright (c) 2026, the megatron-core gptoss authors.
"""The log of a run: one aligned line per step on the console, and metrics.jsonl."""

import math
from datetime import timedelta
from pathlib import Path
from typing import Any, Callable, TextIO

from megatron.gpt_oss.training.metrics.jsonl import append_metrics, drop_from
from megatron.gpt_oss.training.metrics.writers import Writers
from megatron.training.step_callbacks import (
    CheckpointSaved,
    CheckpointWaits,
    SetEvaluated,
    TrainingLogged,
)

LOSS = "lm loss"
NO_LOSS = "no unmasked tokens, or the weights are not finite"
GIB = 2**30


def short_count(number: float) -> str:
    """1234567 -> '1.23M'."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.2f}{unit}"
    return f"{number:.0f}"


class TrainingLog:
    """Logs the events of `step_callbacks`; created on the rank that has the loss.

    Args:
        console: stream of the lines.
        metrics: path of metrics.jsonl, or None. A run that resumes before its last logged step
            replaces the later records.
        seq_length: tokens per sample.
        num_ranks: GPUs of the run.
        flops_of: FLOPs of the model for a number of tokens and the sum of the squared document
            lengths (None if not packed).
        peak_tflops: of one GPU; None if unknown, then no MFU is logged.
        writers: TensorBoard and Weights & Biases.
        consumed_tokens: tokens of the run by its consumed samples; default: `seq_length` each.
    """

    def __init__(
        self,
        console: TextIO,
        metrics: Path | None,
        seq_length: int,
        num_ranks: int = 1,
        flops_of: Callable[[float, float | None], float] | None = None,
        peak_tflops: float | None = None,
        writers: Writers | None = None,
        consumed_tokens: Callable[[int], int] | None = None,
    ):
        self._console = console
        self._metrics = metrics
        self._seq_length = seq_length
        self._num_ranks = num_ranks
        self._flops_of = flops_of
        self._peak_tflops = peak_tflops
        self._writers = writers
        self._consumed_tokens = consumed_tokens or (lambda samples: samples * seq_length)
        self._seconds_per_step: float | None = None
        self._trimmed = False
        self._evaluations_trimmed = False

    def step(self, event: TrainingLogged) -> None:
        """Log an interval of steps."""
        record = self._step_record(event)
        self._write(self._step_line(event, record), record, "train", replaces_from=record["step"])

    def _step_record(self, event: TrainingLogged) -> dict[str, Any]:
        elapsed = event.elapsed_per_iteration
        tokens_per_second = event.batch_size * self._seq_length / elapsed
        tflops = self._tflops(event)
        return {
            "step": event.iteration,
            "loss": event.losses.get(LOSS),
            **{
                name.replace(" ", "_"): value
                for name, value in event.losses.items()
                if name != LOSS
            },
            "learning_rate": event.learning_rate,
            "grad_norm": event.grad_norm,
            "tokens_per_second": tokens_per_second,
            "tokens_per_second_per_gpu": tokens_per_second / self._num_ranks,
            "tflops_per_gpu": tflops,
            "mfu": tflops / self._peak_tflops if tflops and self._peak_tflops else None,
            "peak_memory_bytes": event.peak_memory,
            "tokens": self._consumed_tokens(event.consumed_samples),
            "seconds_per_step": elapsed,
            "skipped_steps": event.skipped_iterations,
        }

    def _step_line(self, event: TrainingLogged, record: dict[str, Any]) -> str:
        step, last = event.iteration, event.train_iters
        fields = [
            f"step {step:>{len(str(last))}}/{last}",
            f"loss {_number(record['loss'], '7.4f')}",
            f"lr {_number(record['learning_rate'], '.2e')}",
            f"grad norm {_number(record['grad_norm'], '7.3f')}",
            f"{short_count(record['tokens_per_second_per_gpu']):>7} tokens/s/GPU",
            f"{_number(record['tflops_per_gpu'], '6.1f'):>6} TFLOP/s",
            f"MFU {_number(record['mfu'], '5.1%'):>5}",
            f"{record['peak_memory_bytes'] / GIB:6.2f} GiB",
            f"{short_count(record['tokens']):>7} tokens",
            f"ETA {self._remaining(event)}",
        ]
        if record["skipped_steps"]:
            fields.append(f"{record['skipped_steps']} skipped")
        if _is_nan(record["loss"]):
            fields.append(NO_LOSS)
        return " | ".join(fields)

    def _remaining(self, event: TrainingLogged) -> timedelta:
        elapsed = event.elapsed_per_iteration
        # Exponential mean: one slow step (the first, a checkpoint) must not change the ETA much.
        mean = elapsed if self._seconds_per_step is None else self._seconds_per_step
        self._seconds_per_step = 0.9 * mean + 0.1 * elapsed
        steps = max(0, event.train_iters - event.iteration)
        return timedelta(seconds=round(self._seconds_per_step * steps))

    def _tflops(self, event: TrainingLogged) -> float | None:
        """Model TFLOP/s per GPU."""
        if self._flops_of is None:
            return None
        squares = event.squared_lengths_in_batch
        tokens = event.batch_size * self._seq_length if squares is None else event.tokens_in_batch
        flops = self._flops_of(tokens, squares)
        return flops / event.elapsed_per_iteration / self._num_ranks / 1e12

    def evaluation(self, event: SetEvaluated) -> None:
        """Log the loss of a validation or test set."""
        loss = event.losses.get(LOSS)
        key, name = ("valid_loss", "validation")
        if "test set" in event.prefix:
            key, name = ("test_loss", "test")
        name += f" {event.name}" if event.name else ""
        text = f"{name} at step {event.iteration}: "
        if _is_nan(loss):
            text += f"loss nan, {NO_LOSS}"
            loss = None
        else:
            perplexity = math.exp(min(loss, 20.0)) if loss is not None else None
            text += f"loss {_number(loss, '.4f')}, perplexity {_number(perplexity, '.3f')}"
        self._write(
            text,
            {"step": event.iteration, "set": name, key: loss},
            name,
            replaces_from=event.iteration + 1,
            evaluation=True,
        )

    def experts(self, step: int, load: dict[str, list[float]]) -> None:
        """Log expert load and router entropy (see `RouterLoad.take`)."""
        shares, entropies = load["max_expert_share"], load["router_entropy"]
        worst = max(range(len(shares)), key=shares.__getitem__)
        mean_cv = sum(load["load_cv"]) / len(shares)
        self._write(
            f"experts at step {step}: most loaded {shares[worst]:.1%} of its layer's tokens "
            f"(layer {worst}), load variation {mean_cv:.2f}, "
            f"router entropy {min(entropies):.2f} to {max(entropies):.2f}",
            {"step": step, "experts": load},
            "experts",
            replaces_from=step,
        )

    def norms(self, step: int, norms: dict[str, dict[str, float]]) -> None:
        """Log norms by kind of module (see `module_norms`)."""
        gradients = ", ".join(f"{kind} {value:.3g}" for kind, value in norms["grad_norm"].items())
        sinks = norms.get("sinks")
        tail = f"; sinks {sinks['min']:.2f} to {sinks['max']:.2f}" if sinks else ""
        self._write(
            f"grad norms at step {step}: {gradients}{tail}",
            {"step": step, "norms": norms},
            "norms",
            replaces_from=step,
        )

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Log a generated sample."""
        self._write(
            f"sample at step {step}: {text!r}",
            {"step": step, "sample": {"prompt": prompt, "text": text}},
            "sample",
            replaces_from=step + 1,
        )

    def checkpoint(self, event: CheckpointSaved) -> None:
        """Log a complete checkpoint."""
        blocking, background = event.blocking_seconds, event.background_seconds
        tail = f", background write {background:.1f} s" if background else ""
        seconds = {"blocking_seconds": blocking, "background_seconds": background}
        self._write(
            f"saved {event.checkpoint} (blocked for {blocking:.1f} s{tail})",
            {"step": event.iteration, "checkpoint": seconds},
            None,
            replaces_from=event.iteration + 1,
        )

    def checkpoint_waits(self, event: CheckpointWaits) -> None:
        """Print that a save waits for the previous one."""
        print(
            f"saving the checkpoint of step {event.iteration} waits: the checkpoint of step "
            f"{event.waits_for} is still being written. A larger --save-interval avoids that.",
            file=self._console,
            flush=True,
        )

    def _write(
        self,
        line: str,
        record: dict[str, Any],
        section: str | None,
        replaces_from: int,
        evaluation: bool = False,
    ) -> None:
        """Print a line and append its record.

        Args:
            section: of the writers; None keeps the record from them, as W&B refuses a step that is
                lower than an earlier one.
            replaces_from: the first record of a start removes older records from this step on.
        """
        print(line, file=self._console, flush=True)
        if self._writers is not None and section is not None:
            numbers = {name: value for name, value in record.items() if name != "step"}
            inner = numbers.get(section)
            self._writers.write(
                section, inner if isinstance(inner, dict) else numbers, record["step"]
            )
        if self._metrics is None:
            return
        if not self._trimmed:
            drop_from(self._metrics, replaces_from)
            self._trimmed = True
        if evaluation and not self._evaluations_trimmed:
            # A finished run that is restarted evaluates its last step again.
            drop_from(self._metrics, record["step"], evaluations_only=True)
            self._evaluations_trimmed = True
        append_metrics(self._metrics, record)


def _is_nan(loss: float | None) -> bool:
    return loss is not None and math.isnan(loss)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
