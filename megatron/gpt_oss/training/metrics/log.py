# Copyright (c) 2026, the megatron-core gptoss authors.
"""What a person sees of a run: one aligned line a step, and metrics.jsonl."""

import math
from datetime import timedelta
from pathlib import Path
from typing import Any, Callable, TextIO

from megatron.gpt_oss.training.metrics.jsonl import append_metrics, drop_from
from megatron.gpt_oss.training.metrics.writers import Writers

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
    """Turns Megatron's step callbacks into lines; made on the rank that holds the loss.

    Args:
        console: where lines for people go.
        metrics: path of metrics.jsonl, or None. A line is one JSON object; a run that resumes
            before its last logged step replaces what came after.
        seq_length: tokens a sample.
        num_ranks: over which a step's work is divided.
        flops_of: FLOPs of the model over a number of tokens, whose documents' squared lengths have
            the sum that is given, or None.
        peak_tflops: of one rank's device, or None where it is not known: no MFU then.
        writers: where the numbers go besides.
        consumed_tokens: of the run, from its consumed samples; by default all had `seq_length`.
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

    def step(self, values: dict[str, Any]) -> None:
        """A log interval ended (see `step_callbacks.on_training_log`)."""
        step, last = values["iteration"], values["train_iters"]
        elapsed = values["elapsed_per_iteration"]
        # Exponential mean: a slow step (a checkpoint, the first one) should not swing the ETA.
        mean = elapsed if self._seconds_per_step is None else self._seconds_per_step
        self._seconds_per_step = 0.9 * mean + 0.1 * elapsed
        remaining = timedelta(seconds=round(self._seconds_per_step * max(0, last - step)))
        tokens_per_second = values["batch_size"] * self._seq_length / elapsed
        tflops = self._tflops(values, elapsed)
        mfu = tflops / self._peak_tflops if tflops and self._peak_tflops else None
        record = {
            "step": step,
            "loss": values["losses"].get(LOSS),
            **{
                name.replace(" ", "_"): value
                for name, value in values["losses"].items()
                if name != LOSS
            },
            "learning_rate": values["learning_rate"],
            "grad_norm": values["grad_norm"],
            "tokens_per_second": tokens_per_second,
            "tokens_per_second_per_gpu": tokens_per_second / self._num_ranks,
            "tflops_per_gpu": tflops,
            "mfu": mfu,
            "peak_memory_bytes": values["peak_memory"],
            "tokens": self._consumed_tokens(values["consumed_samples"]),
            "seconds_per_step": elapsed,
            "skipped_steps": values["skipped_iterations"],
        }
        width = len(str(last))
        fields = [
            f"step {step:>{width}}/{last}",
            f"loss {_number(record['loss'], '7.4f')}",
            f"lr {_number(record['learning_rate'], '.2e')}",
            f"grad norm {_number(record['grad_norm'], '7.3f')}",
            f"{short_count(record['tokens_per_second_per_gpu']):>7} tokens/s/GPU",
            f"{_number(tflops, '6.1f'):>6} TFLOP/s",
            f"MFU {_number(mfu, '5.1%'):>5}",
            f"{record['peak_memory_bytes'] / GIB:6.2f} GiB",
            f"{short_count(record['tokens']):>7} tokens",
            f"ETA {remaining}",
        ]
        if record["skipped_steps"]:
            fields.append(f"{record['skipped_steps']} skipped")
        if _is_nan(record["loss"]):
            fields.append(NO_LOSS)
        self._write(" | ".join(fields), record, "train", remade_from=step)

    def _tflops(self, values: dict[str, Any], elapsed: float) -> float | None:
        """Of the model, on one rank."""
        if self._flops_of is None:
            return None
        squares = values.get("squared_lengths_in_batch")
        tokens = values["batch_size"] * self._seq_length
        if squares is not None:
            tokens = values["tokens_in_batch"]
        return self._flops_of(tokens, squares) / elapsed / self._num_ranks / 1e12

    def evaluation(self, values: dict[str, Any]) -> None:
        """A validation or test set was evaluated (see `step_callbacks.on_evaluation`)."""
        loss = values["losses"].get(LOSS)
        key, name = ("valid_loss", "validation")
        if "test set" in values["prefix"]:
            key, name = ("test_loss", "test")
        name += f" {values['name']}" if values["name"] else ""
        text = f"{name} at step {values['iteration']}: "
        if _is_nan(loss):
            text += f"loss nan, {NO_LOSS}"
            loss = None  # no point of a curve
        else:
            perplexity = math.exp(min(loss, 20.0)) if loss is not None else None
            text += f"loss {_number(loss, '.4f')}, perplexity {_number(perplexity, '.3f')}"
        self._write(
            text,
            {"step": values["iteration"], "set": name, key: loss},
            name,
            remade_from=values["iteration"] + 1,
            evaluation=True,
        )

    def experts(self, step: int, load: dict[str, list[float]]) -> None:
        """Load of the experts and entropy of the routers (see `RouterLoad.take`)."""
        shares, entropies = load["busiest_share"], load["router_entropy"]
        worst = max(range(len(shares)), key=shares.__getitem__)
        mean_cv = sum(load["load_cv"]) / len(shares)
        self._write(
            f"experts at step {step}: most loaded {shares[worst]:.1%} of its layer's tokens "
            f"(layer {worst}), load variation {mean_cv:.2f}, "
            f"router entropy {min(entropies):.2f} to {max(entropies):.2f}",
            {"step": step, "experts": load},
            "experts",
            remade_from=step,
        )

    def norms(self, step: int, norms: dict[str, dict[str, float]]) -> None:
        """Norms by kind of module (see `module_norms`)."""
        gradients = ", ".join(f"{kind} {value:.3g}" for kind, value in norms["grad_norm"].items())
        sinks = norms.get("sinks")
        tail = f"; sinks {sinks['lowest']:.2f} to {sinks['highest']:.2f}" if sinks else ""
        self._write(
            f"grad norms at step {step}: {gradients}{tail}",
            {"step": step, "norms": norms},
            "norms",
            remade_from=step,
        )

    def sample(self, step: int, prompt: str, text: str) -> None:
        """A text that the model wrote."""
        self._write(
            f"sample at step {step}: {text!r}",
            {"step": step, "sample": {"prompt": prompt, "text": text}},
            "sample",
            remade_from=step + 1,
        )

    def checkpoint(self, values: dict[str, Any]) -> None:
        """A checkpoint is complete (see `step_callbacks.on_checkpoint_saved`)."""
        held_up, beside = values["seconds_held_up"], values["seconds_in_background"]
        tail = f", background write {beside:.1f} s" if beside else ""
        self._write(
            f"saved {values['checkpoint']} (blocked for {held_up:.1f} s{tail})",
            {
                "step": values["iteration"],
                "checkpoint": {"seconds_held_up": held_up, "seconds_in_background": beside},
            },
            None,
            remade_from=values["iteration"] + 1,
        )

    def checkpoint_waits(self, values: dict[str, Any]) -> None:
        """A save waits for the one before (see `step_callbacks.on_checkpoint_waits`)."""
        print(
            f"saving the checkpoint of step {values['iteration']} waits: the checkpoint of step "
            f"{values['waits_for']} is still being written. A larger --save-interval avoids that.",
            file=self._console,
            flush=True,
        )

    def _write(
        self,
        line: str,
        record: dict[str, Any],
        section: str | None,
        remade_from: int,
        evaluation: bool = False,
    ) -> None:
        """Print and log; the first record says which steps of an earlier start are made anew.

        Without a section, writers do not get it: W&B takes no step that is behind another.
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
            drop_from(self._metrics, remade_from)
            self._trimmed = True
        if evaluation and not self._evaluations_trimmed:
            # A finished run that is started again evaluates its last step again.
            drop_from(self._metrics, record["step"], evaluations_only=True)
            self._evaluations_trimmed = True
        append_metrics(self._metrics, record)


def _is_nan(loss: float | None) -> bool:
    return loss is not None and math.isnan(loss)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
