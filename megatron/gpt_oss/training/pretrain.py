# Copyright (c) 2026, the megatron-core gptoss authors.
"""The main function of a training run: arguments, checks, model, and Megatron's training loop."""

import os
import threading
from argparse import Namespace
from pathlib import Path
from typing import Callable, Sequence, TextIO

import torch
from torch.distributed.checkpoint.api import CheckpointException

from megatron.core import device_utils
from megatron.core.enums import ModelType
from megatron.core.num_microbatches_calculator import get_current_global_batch_size
from megatron.gpt_oss.arguments.megatron_validation import validate
from megatron.gpt_oss.arguments.parse import read
from megatron.gpt_oss.arguments.run_spec import RunSpec
from megatron.gpt_oss.arguments.validate_run import check_schedule
from megatron.gpt_oss.checkpoint.load_hf import load_hf_hook
from megatron.gpt_oss.data.byte_tokenizer import TOKENIZER_NAME
from megatron.gpt_oss.data.tokenizer_files import eos_token_of, read_tokenizer
from megatron.gpt_oss.errors import UsageError, as_refusal
from megatron.gpt_oss.layer_specs import model_config_from_args
from megatron.gpt_oss.planner.dry_run import dry_run
from megatron.gpt_oss.training import run_dir, signals
from megatron.gpt_oss.training.checkpoint_retention import CheckpointKeeper
from megatron.gpt_oss.training.corpus_usage import corpus_uses
from megatron.gpt_oss.training.datasets import provide_datasets
from megatron.gpt_oss.training.failure_messages import as_run_error, print_traceback
from megatron.gpt_oss.training.forward_step import forward_step
from megatron.gpt_oss.training.launcher_variables import (
    check_rank_variables,
    set_launcher_variables,
)
from megatron.gpt_oss.training.metrics.monitor import Monitor
from megatron.gpt_oss.training.metrics.subscribe import subscribe_log
from megatron.gpt_oss.training.parameter_patterns import parse_multipliers, pattern_hook
from megatron.gpt_oss.training.run_record import RunRecord
from megatron.gpt_oss.training.run_start import (
    check_load,
    check_save,
    describe_start,
    has_checkpoint,
    resumes,
)
from megatron.training import async_checkpoint, pretrain, step_callbacks
from megatron.training.argument_utils import (
    PretrainConfigContainer,
    pretrain_cfg_container_from_args,
)
from megatron.training.models.gpt import GPTModelConfig


def main(argv: Sequence[str] | None = None) -> None:
    """Train with the flags of a command line.

    Raises:
        UsageError: the command line is invalid.
        RunError: an error with a known cause ended the run.
    """
    check_rank_variables()
    spec = read(argv)
    if spec.dry_run is not None:
        return dry_run(spec)
    set_launcher_variables()
    with run_dir.locked(spec.args), run_dir.megatron_output(spec.run_dir) as console:
        check_load(spec.args)  # before the validation, which takes seconds
        check_save(spec.args)
        args = validate(spec)
        check_schedule(args)
        args.lr_multiplier_factors = parse_multipliers(args.lr_multiplier)
        record = RunRecord(spec)
        _print_notices(spec, record, console)
        signals.forward_usr1(args)
        monitor = _subscribe(args, console, spec.run_dir)
        _train(args, monitor, _announced(provide_datasets, args, console, record))
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _print_notices(spec: RunSpec, record: RunRecord, console: TextIO) -> None:
    """Print untested flags and changed arguments on rank 0; every rank compares the arguments."""
    args = spec.args
    changes = record.compare(args) if resumes(args) else None
    for line in (spec.untested_line(), changes):
        if args.rank == 0 and line is not None:
            print(line, file=console, flush=True)


def _subscribe(args: Namespace, console: TextIO, run_directory: Path | None) -> Monitor:
    """Subscribe log, checkpoint retention and monitor to the training loop."""
    log = subscribe_log(args, console, run_directory)
    if args.keep_checkpoints and args.rank == 0:
        keeper = CheckpointKeeper(args.keep_checkpoints)
        step_callbacks.subscribe(step_callbacks.CheckpointSaved, keeper.after_save)
    return Monitor(args, log)


def _model_config(args: Namespace, monitor: Monitor) -> GPTModelConfig:
    """The model, with hooks that run before DDP wraps it.

    They are --freeze and --lr-multiplier, the monitor, and --load-hf if the run has no checkpoint.
    """
    config = model_config_from_args(args)
    config.pre_wrap_hooks += [pattern_hook(args), monitor.watch]
    if args.load_hf and not has_checkpoint(args.load):
        config.pre_wrap_hooks.append(load_hf_hook(args.load_hf, args.yarn_factor))
    return config


def _train(args: Namespace, monitor: Monitor, provider: Callable) -> None:
    """Run Megatron's pretrain(); raise errors with a known cause as RunError or UsageError."""
    first_step_ended = threading.Event()
    step_callbacks.subscribe(step_callbacks.StepEnded, lambda event: first_step_ended.set())
    try:
        config = pretrain_cfg_container_from_args(args, _model_config(args, monitor))
        pretrain(
            config,
            _without_another_save(provider, args, config),
            ModelType.encoder_or_decoder,
            forward_step,
        )
    except (Exception, CheckpointException, KeyboardInterrupt) as error:
        known = as_run_error(error, args)
        _end_checkpoint(every_rank_ends=known is not None and known.everywhere)
        if known is None and not first_step_ended.is_set():
            known = as_refusal(error) or _tokenizer_problem(args)
        if known is None:
            raise
        print_traceback(error)
        raise known from error


def _tokenizer_problem(args: Namespace) -> UsageError | None:
    """What is wrong with the files of --tokenizer-model, which transformers reports poorly."""
    directory = Path(args.tokenizer_model or "")
    if not (directory / TOKENIZER_NAME).is_file():
        return None
    try:
        read_tokenizer(directory / TOKENIZER_NAME)
        eos_token_of(directory)
    except UsageError as problem:
        return problem
    return None


def _end_checkpoint(every_rank_ends: bool) -> None:
    """Complete a checkpoint that is being written, or abort it if ranks may have exited."""
    if not every_rank_ends:
        return async_checkpoint.abandon()
    try:
        async_checkpoint.finish()
    except (Exception, CheckpointException) as error:  # the error that ended the run is reported
        print_traceback(error)


def _announced(provider, args: Namespace, console: TextIO, record: RunRecord):
    """The dataset provider; Megatron calls it after it has loaded model and checkpoint.

    Rank 0 also writes run.json and prints a summary of the run and its corpora.
    """

    def provide(num_samples, vp_stage=None):
        reports = args.rank == 0 and not vp_stage
        if reports:
            record.write(args.iteration)
            print(_summary(args), file=console, flush=True)
        try:
            datasets = provider(num_samples, vp_stage)
        except ValueError as error:  # Megatron's datasets refuse the data
            raise UsageError(str(error)) from error
        if reports:
            for use in corpus_uses(datasets[0], args.seq_length):
                print(use.line(os.path.basename(use.path), args.seq_length), file=console)
        return datasets

    provide.is_distributed = True
    return provide


def _without_another_save(provider, args: Namespace, config: PretrainConfigContainer):
    """The dataset provider, which disables saving if the loaded checkpoint is the end of the run.

    Megatron would write the same checkpoint again, and a kill meanwhile would lose it.
    """

    def provide(num_samples, vp_stage=None):
        if resumes(args) and args.iteration >= args.train_iters:
            if os.path.realpath(args.load) == os.path.realpath(args.save or ""):
                config.checkpoint.save = None
        return provider(num_samples, vp_stage)

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
        + f", {get_current_global_batch_size()} x {args.seq_length} tokens per step, "
        + describe_start(args)
    )
