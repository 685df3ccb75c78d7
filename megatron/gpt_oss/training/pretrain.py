# Copyright (c) 2026, the megatron-core gptoss authors.
"""A run from the command line: arguments, model, weights to start from, log, Megatron's loop."""

import contextlib
import logging
import os
import sys
import threading
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Iterator, Sequence, TextIO

import torch
from torch.distributed.checkpoint.api import CheckpointException

from megatron.core import device_utils
from megatron.core.enums import ModelType
from megatron.core.num_microbatches_calculator import get_current_global_batch_size
from megatron.gpt_oss.arguments.flags import NO_PRESET
from megatron.gpt_oss.arguments.parse import read, validate
from megatron.gpt_oss.arguments.validate_run import check_schedule
from megatron.gpt_oss.checkpoint.load_hf import load_hf_hook
from megatron.gpt_oss.data.byte_tokenizer import TOKENIZER_NAME
from megatron.gpt_oss.data.tokenizer_files import eos_token_of, read_tokenizer
from megatron.gpt_oss.errors import UsageError, as_refusal
from megatron.gpt_oss.layer_specs import model_config_from_args
from megatron.gpt_oss.outputs import naming
from megatron.gpt_oss.planner.dry_run import dry_run
from megatron.gpt_oss.training import signals
from megatron.gpt_oss.training.checkpoint_retention import CheckpointKeeper
from megatron.gpt_oss.training.corpus_usage import corpus_uses
from megatron.gpt_oss.training.datasets import provide_datasets
from megatron.gpt_oss.training.failure_messages import as_run_error, print_traceback
from megatron.gpt_oss.training.forward_step import forward_step
from megatron.gpt_oss.training.metrics.flops import model_flops, peak_tflops
from megatron.gpt_oss.training.metrics.log import TrainingLog
from megatron.gpt_oss.training.metrics.monitor import Monitor
from megatron.gpt_oss.training.metrics.writers import Writers
from megatron.gpt_oss.training.parameter_patterns import parse_multipliers, pattern_hook
from megatron.gpt_oss.training.run_lock import RunLock
from megatron.gpt_oss.training.run_record import RunRecord, check_foreign, home
from megatron.training import (
    async_checkpoint,
    checkpoint_integrity,
    pretrain,
    run_position,
    step_callbacks,
)
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.models.gpt import GPTModelConfig


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the command line says.

    Raises:
        UsageError: the command line cannot be run.
        RunError: the run was ended by something that has a name.
    """
    spec = read(argv)
    if spec.dry_run is not None:
        return dry_run(spec)
    run_dir = spec.run_dir
    _single_process_environment()
    with _locked(spec.args), _upstream_output(run_dir) as console:
        args = validate(spec)
        check_schedule(args)
        args.lr_multiplier_factors = parse_multipliers(args.lr_multiplier)
        _check_save(args)
        record = RunRecord(spec)
        changes = record.compare(args) if _resumes(args) else None
        for line in (spec.untested_line(), changes):
            if args.rank == 0 and line is not None:
                print(line, file=console, flush=True)
        signals.forward_usr1(args)
        log = _register_log(args, console, run_dir)
        monitor = Monitor(args, log)
        trains = threading.Event()
        step_callbacks.on_step_ended(lambda values: trains.set())
        try:
            pretrain(
                pretrain_cfg_container_from_args(args, _model_config(args, monitor)),
                _announced(provide_datasets, args, console, record),
                ModelType.encoder_or_decoder,
                forward_step,
            )
        except (Exception, CheckpointException, KeyboardInterrupt) as error:
            known = as_run_error(error, args)
            _end_checkpoint(every_rank_ends=known is not None and known.everywhere)
            if known is None and not trains.is_set():
                known = as_refusal(error) or _tokenizer_problem(args)
            if known is None:
                raise
            print_traceback(error)
            raise known from error
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _tokenizer_problem(args: Namespace) -> UsageError | None:
    """What is wrong with the files of --tokenizer-model, of which transformers says too little."""
    folder = Path(args.tokenizer_model or "")
    if not (folder / TOKENIZER_NAME).is_file():
        return None
    try:
        read_tokenizer(folder / TOKENIZER_NAME)
        eos_token_of(folder)
    except UsageError as problem:
        return problem
    return None


def _end_checkpoint(every_rank_ends: bool) -> None:
    """Complete a checkpoint that is being written, or give it up where ranks may be gone."""
    if not every_rank_ends:
        return async_checkpoint.abandon()
    try:
        async_checkpoint.finish()
    except (Exception, CheckpointException) as error:  # what ended the run is told, not this
        print_traceback(error)


def _model_config(args: Namespace, monitor: Monitor) -> GPTModelConfig:
    """The model, and the weights to start from where the run has no checkpoint of its own yet."""
    config = model_config_from_args(args)
    config.pre_wrap_hooks += [pattern_hook(args), monitor.watch]
    if args.load_hf and not _goes_on(args.load):
        config.pre_wrap_hooks.append(load_hf_hook(args.load_hf, args.yarn_factor))
    return config


def _goes_on(load_dir: str | None) -> bool:
    if load_dir is None:
        return False
    tracker = Path(load_dir) / "latest_checkpointed_iteration.txt"
    return tracker.is_file() or checkpoint_integrity.holds_checkpoint(load_dir)


def _resumes(args: Namespace) -> bool:
    """Whether the run takes up step and optimizer of a checkpoint, not its weights alone."""
    return _goes_on(args.load) and not args.finetune


def _check_save(args: Namespace) -> None:
    """Refuse to write over the checkpoints of a run that this one does not resume.

    Raises:
        UsageError: names the folder and what to give.
    """
    if args.skip_train or not _goes_on(args.save):
        return
    if _resumes(args) and os.path.realpath(args.load) == os.path.realpath(args.save):
        return
    other = f"--load {args.load} --finetune" if args.finetune else f"--load {args.load}"
    remedy = f"Give --load {args.save} to resume from them"
    if args.load is not None and _goes_on(args.load):
        remedy = f"To resume from them, give --pretrained-checkpoint {args.load} for {other}"
    raise UsageError(
        f"--save {args.save} holds checkpoints that this run would not resume from and would "
        f"overwrite. {remedy}; or save to another directory."
    )


@contextlib.contextmanager
def _locked(args: Namespace) -> Iterator[None]:
    """Rank 0 holds the folder of the run, where there is one."""
    folder = home(args)
    if folder is None or os.environ["RANK"] != "0":
        yield
        return
    _make_folder(folder, "--run-dir" if args.run_dir else "--save")
    check_foreign(folder)
    with RunLock(folder, lambda line: print(line, flush=True)):
        yield


def _make_folder(folder: Path, flag: str) -> None:
    try:
        with naming(folder):
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{flag} {folder} cannot be created: {error.strerror}.") from error


def _single_process_environment() -> None:
    """`python pretrain_gpt_oss.py` without torchrun is a run of one rank."""
    if "RANK" in os.environ:
        return
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = "0"  # any free one: nobody else has to find it


@contextlib.contextmanager
def _upstream_output(run_dir: Path | None) -> Iterator[TextIO]:
    """Keep Megatron's hundreds of lines in the run's folder; yields the console for ours.

    What it prints, logs and warns of is moved; tracebacks stay on stderr.
    """
    rank = int(os.environ["RANK"])
    if run_dir is None:
        yield sys.stdout
        return
    _make_folder(run_dir, "--run-dir")
    console = sys.stdout
    path = run_dir / f"megatron-rank{rank}.log"
    with open(path, "a", encoding="utf-8", buffering=1) as log, contextlib.redirect_stdout(log):
        logging.basicConfig(stream=log, force=True)
        logging.captureWarnings(True)
        yield console


def _register_log(args: Namespace, console: TextIO, run_dir: Path | None) -> TrainingLog | None:
    """Our lines on the last rank, which holds the loss; old checkpoints are deleted by the first."""
    log = None
    if args.rank == args.world_size - 1:
        log = TrainingLog(
            console,
            run_dir / "metrics.jsonl" if run_dir is not None else None,
            args.seq_length,
            args.world_size,
            partial(model_flops, args) if args.preset != NO_PRESET else None,
            peak_tflops(args),
            Writers(),
            partial(run_position.consumed_tokens, args),
        )
        step_callbacks.on_evaluation(log.evaluation)
        step_callbacks.on_checkpoint_waits(log.checkpoint_waits)

    def saved(values: dict) -> None:
        for name in ("seconds_held_up", "seconds_in_background"):
            values[name] = _largest(values[name])
        if log is not None:
            log.checkpoint(values)

    step_callbacks.on_checkpoint_saved(saved)
    if args.rank == 0:  # before the summary of the run, which has the step that it resumes at
        step_callbacks.on_resumed(lambda values: print(values["line"], file=console, flush=True))

    def step(values: dict) -> None:
        values["peak_memory"] = _largest(values["peak_memory"])
        if log is not None:
            log.step(values)

    step_callbacks.on_training_log(step)
    if args.keep_checkpoints and args.rank == 0:
        step_callbacks.on_checkpoint_saved(CheckpointKeeper(args.keep_checkpoints).after_save)
    return log


def _largest(number: int | float) -> int | float:
    """Over all ranks."""
    dtype = torch.int64 if isinstance(number, int) else torch.float64
    value = torch.tensor(number, dtype=dtype, device=device_utils.current_device())
    torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MAX)
    return value.item()


def _announced(provider, args: Namespace, console: TextIO, record: RunRecord):
    """The dataset provider, which Megatron calls once model and checkpoint are loaded."""

    def provide(num_samples, vp_stage=None):
        if args.rank == 0 and not vp_stage:
            record.write(args.iteration)
            print(_summary(args), file=console, flush=True)
        try:
            datasets = provider(num_samples, vp_stage)
        except ValueError as error:  # what is wrong with the data, said by Megatron's datasets
            raise UsageError(str(error)) from error
        if args.rank == 0 and not vp_stage:
            for use in corpus_uses(datasets[0], args.seq_length):
                print(use.line(os.path.basename(use.path), args.seq_length), file=console)
        return datasets

    provide.is_distributed = True
    return provide


def _summary(args: Namespace) -> str:
    layout = {
        "TP": args.tensor_model_parallel_size,
        "PP": args.pipeline_model_parallel_size,
        "CP": args.context_parallel_size,
        "EP": args.expert_model_parallel_size,
        "DP": args.data_parallel_size,
    }
    return (
        f"gpt-oss {args.preset}: {args.num_layers} layers, "
        f"{args.world_size} x {device_utils.device_type()}, "
        + " ".join(f"{name} {size}" for name, size in layout.items())
        + f", {get_current_global_batch_size()} x {args.seq_length} tokens per step, {_start(args)}"
    )


def _start(args: Namespace) -> str:
    """What the weights of the first step are."""
    if args.iteration:
        return f"resumed at step {args.iteration}"
    for directory in (args.load, args.pretrained_checkpoint):
        if _goes_on(directory):
            return f"starts at step 0 from the weights of {directory}"
    return f"starts from {args.load_hf}" if args.load_hf else "starts from random weights"
