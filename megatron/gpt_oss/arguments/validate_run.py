# Copyright (c) 2026, the megatron-core gptoss authors.
"""Checks of training length, batch sizes and saving that Megatron makes late or not at all."""

from argparse import Namespace

from megatron.core.num_microbatches_calculator import StepBatchsizeNumMicroBatchesCalculator
from megatron.gpt_oss.errors import UsageError
from megatron.gpt_oss.training.parameter_patterns import check_patterns


def check_async_save(args: Namespace, is_cuda: bool) -> None:
    """Refuse writers of --async-save that would hang, save old tensors or block training.

    Raises:
        UsageError: says what to give instead.
    """
    if not args.async_save:
        return
    if args.use_persistent_ckpt_worker and not is_cuda:
        raise UsageError(
            "--use-persistent-ckpt-worker: this Megatron process does not run on a CPU. Drop "
            "the flag: --async-save alone writes checkpoints in a thread."
        )
    if args.async_strategy == "nvrx" and not args.use_persistent_ckpt_worker:
        raise UsageError(
            "--async-strategy nvrx without --use-persistent-ckpt-worker: Megatron ignores "
            "--async-save then. Drop --async-strategy: --async-save alone writes checkpoints in a "
            "thread, without nvidia-resiliency-ext."
        )
    # The worker process keeps the tensors of the first save and writes them again (NeMo-RL 3312).
    # Tensors that each save gathers, as all optimizer state in fully_reshardable, would be old.
    if args.async_strategy == "nvrx" and args.ckpt_assume_constant_structure:
        raise UsageError(
            "--ckpt-assume-constant-structure with --async-strategy nvrx: every checkpoint would "
            "hold the optimizer state of the first one. Drop --ckpt-assume-constant-structure, or "
            "--async-strategy: the thread of --async-save alone collects the tensors at every save."
        )
    if args.async_strategy == "nvrx" and args.dry_run is None:
        _check_nvrx()


def _check_nvrx() -> None:
    from megatron.core.dist_checkpointing.strategies.nvrx import (
        NVRX_MIN_VERSION,
        has_nvrx_async_support,
    )

    if not has_nvrx_async_support():
        raise UsageError(
            "--async-strategy nvrx: no nvidia-resiliency-ext that Megatron can use is installed "
            f"({NVRX_MIN_VERSION} or newer). Install it, or drop --async-strategy: --async-save "
            "alone writes checkpoints in a thread."
        )


def check_batch_size_schedule(args: Namespace) -> None:
    """Refuse --rampup-batch-size and an invalid --step-batch-size-schedule.

    Raises:
        UsageError: says what to give instead.
    """
    if args.rampup_batch_size is not None:
        first, by, samples = args.rampup_batch_size
        raise UsageError(
            f"--rampup-batch-size {first} {by} {samples}: Megatron ignores it. Give "
            f'--step-batch-size-schedule "{_as_steps(args, first, by, samples)}" instead of it and '
            "--global-batch-size. Each pair gives a number of trained tokens and the batch size "
            "from there on."
        )
    schedule = args.step_batch_size_schedule
    if schedule is None:
        return
    try:
        steps = StepBatchsizeNumMicroBatchesCalculator._parse_schedule(schedule, None)
    except (ValueError, OverflowError) as error:
        raise UsageError(
            f'--step-batch-size-schedule "{schedule}" cannot be parsed. Give pairs TOKENS:BATCH, '
            'for example "0:64 10M:128": a number of trained tokens, and the batch size from there '
            "on."
        ) from error
    if not steps or steps[0][0] != 0:
        raise UsageError(
            f'--step-batch-size-schedule "{schedule}" does not give the initial batch size. '
            "Start it with 0:BATCH."
        )


def check_run_arguments(args: Namespace) -> None:
    """Refuse what Megatron asserts only after the model is built, and invalid values of our flags.

    Raises:
        UsageError: names the flag, the value and what to do.
    """
    _check_batch_schedule(args)
    check_patterns(args)
    if args.keep_checkpoints and args.save_retain_interval is not None:
        raise UsageError(
            f"--keep-checkpoints {args.keep_checkpoints} and --save-retain-interval "
            f"{args.save_retain_interval} both delete old checkpoints. Drop one of them."
        )
    if args.multiple_validation_sets and args.test_data_path:
        raise UsageError(
            "--test-data-path cannot be used with --multiple-validation-sets: Megatron fails at "
            "the evaluation after the last step. Drop one of them, or add the test set as a "
            "validation set."
        )
    if args.sample_interval and args.tokenizer_type != "HuggingFaceTokenizer":
        raise UsageError(
            f"--sample-interval {args.sample_interval} needs a tokenizer that decodes to text, but "
            f"--tokenizer-type is {args.tokenizer_type}. Give --tokenizer-model DIR."
        )
    for flag in ("use_megatron_fsdp", "use_torch_fsdp2"):
        if args.monitor_interval and getattr(args, flag, False):
            raise UsageError(
                f"--{flag.replace('_', '-')} keeps gradients where the per-module norms do not "
                "read them. Give --monitor-interval 0."
            )


def check_schedule(args: Namespace) -> None:
    """Refuse a run without training length or learning rate, or with an invalid schedule.

    A dry run needs neither.

    Raises:
        UsageError: names the flag, the value and what to do.
    """
    if not args.train_iters and not args.train_samples:
        raise UsageError("No training length. Give --train-iters or --train-samples.")
    if args.lr is None:
        raise UsageError("No learning rate. Give --lr, for example --lr 2e-5.")
    for unit in ("iters", "samples"):
        warmup = getattr(args, f"lr_warmup_{unit}")
        decay = getattr(args, f"lr_decay_{unit}") or getattr(args, f"train_{unit}")
        if decay and warmup >= decay:
            raise UsageError(
                f"--lr-warmup-{unit} {warmup} leaves none of the {decay} {unit} over which the "
                "learning rate decays. Give a smaller value, or --lr-warmup-fraction."
            )
    if args.lr_decay_style == "WSD" and not (args.lr_wsd_decay_iters or args.lr_wsd_decay_samples):
        raise UsageError(
            "--lr-decay-style WSD needs the length of the final decay. Give "
            "--lr-wsd-decay-iters (or -samples), and --lr-wsd-decay-style."
        )
    for flag in ("min_lr", "lr_warmup_init"):
        rate = getattr(args, flag) or 0.0
        if not 0 <= rate <= args.lr:
            raise UsageError(
                f"--{flag.replace('_', '-')} {rate:g}: expected 0 or more, and at most --lr "
                f"{args.lr:g}."
            )
    if args.lr_warmup_fraction is not None and not 0 <= args.lr_warmup_fraction < 1:
        raise UsageError(
            f"--lr-warmup-fraction {args.lr_warmup_fraction:g}: expected a fraction of the decay, "
            "0 or more and below 1."
        )
    if args.override_opt_param_scheduler and args.use_checkpoint_opt_param_scheduler:
        raise UsageError(
            "--override-opt-param-scheduler uses this command's schedule and "
            "--use-checkpoint-opt-param-scheduler the checkpoint's. Drop one of them; without "
            "both, this command's schedule is used."
        )


def _check_batch_schedule(args: Namespace) -> None:
    """Check the steps of --step-batch-size-schedule."""
    if args.step_batch_size_schedule is None:
        return
    flag = f'--step-batch-size-schedule "{args.step_batch_size_schedule}"'
    steps = StepBatchsizeNumMicroBatchesCalculator._parse_schedule(
        args.step_batch_size_schedule, args.seq_length
    )
    multiple = args.micro_batch_size * args.data_parallel_size
    for (threshold, batch), (earlier, smaller) in zip(steps, [(-1, 1), *steps]):
        if batch % multiple or batch < 1:
            raise UsageError(
                f"{flag}: batch size {batch} is not a multiple of {multiple}, the micro-batch size "
                f"{args.micro_batch_size} times {args.data_parallel_size} data-parallel ranks."
            )
        if threshold <= earlier or batch < smaller:
            raise UsageError(
                f"{flag}: {batch} follows {smaller}, and both tokens (in sequences of "
                f"{args.seq_length}) and batch sizes must grow from pair to pair."
            )


def _as_steps(args: Namespace, first: int, by: int, samples: int) -> str:
    """A --rampup-batch-size as steps: intervals of equal length, each with `by` more samples."""
    last = args.global_batch_size or first
    intervals = max(1, (last - first) // by) if by > 0 else 1
    return " ".join(
        f"{index * samples // intervals * (args.seq_length or 1)}:{min(first + index * by, last)}"
        for index in range(intervals + 1)
    )
