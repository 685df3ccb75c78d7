# Copyright (c) 2026, the megatron-core gptoss authors.
"""Subscribes the log of a run to the events of the training loop."""

import dataclasses
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import TextIO

import torch

from megatron.core import device_utils
from megatron.gpt_oss.arguments.flags import NO_PRESET
from megatron.gpt_oss.training.metrics.flops import model_flops, peak_tflops
from megatron.gpt_oss.training.metrics.log import TrainingLog
from megatron.gpt_oss.training.metrics.writers import Writers
from megatron.training import run_position
from megatron.training.step_callbacks import (
    CheckpointSaved,
    CheckpointWaits,
    ScheduleChanged,
    SetEvaluated,
    TrainingLogged,
    subscribe,
)


def subscribe_log(args: Namespace, console: TextIO, run_dir: Path | None) -> TrainingLog | None:
    """Log on the last rank, which has the loss; call it on every rank.

    Returns:
        The log on the last rank, None on the others.
    """
    log = None
    if args.rank == args.world_size - 1:
        log = _log(args, console, run_dir)
        subscribe(SetEvaluated, log.evaluation)
        subscribe(CheckpointWaits, log.checkpoint_waits)

    def saved(event: CheckpointSaved) -> None:
        event = _max_over_ranks(event, "blocking_seconds", "background_seconds")
        if log is not None:
            log.checkpoint(event)

    def logged(event: TrainingLogged) -> None:
        event = _max_over_ranks(event, "peak_memory")
        if log is not None:
            log.step(event)

    subscribe(CheckpointSaved, saved)
    subscribe(TrainingLogged, logged)
    if args.rank == 0:  # which also prints the summary, right after the checkpoint is loaded
        subscribe(ScheduleChanged, lambda event: print(event.line, file=console, flush=True))
    return log


def _log(args: Namespace, console: TextIO, run_dir: Path | None) -> TrainingLog:
    return TrainingLog(
        console,
        run_dir / "metrics.jsonl" if run_dir is not None else None,
        args.seq_length,
        args.world_size,
        partial(model_flops, args) if args.preset != NO_PRESET else None,
        peak_tflops(args),
        Writers(),
        partial(run_position.consumed_tokens, args),
    )


def _max_over_ranks(event, *names: str):
    """The event with the maximum of these fields over all ranks. Collective."""
    return dataclasses.replace(event, **{name: _max(getattr(event, name)) for name in names})


def _max(number: int | float) -> int | float:
    dtype = torch.int64 if isinstance(number, int) else torch.float64
    value = torch.tensor(number, dtype=dtype, device=device_utils.current_device())
    torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MAX)
    return value.item()
