# Copyright (c) 2026, the megatron-core gptoss authors.
"""Flags of a run that Megatron does not have, and the defaults of its own that suit one."""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Sequence

from megatron.core.num_microbatches_calculator import StepBatchsizeNumMicroBatchesCalculator
from megatron.gpt_oss.errors import UsageError
from megatron.gpt_oss.plan.dry_run import add_dry_run_argument
from megatron.gpt_oss.recipe import add_recipe_argument
from megatron.gpt_oss.training.parameter_patterns import check_patterns

# Megatron's own writer; its default, nvrx, is nvidia-resiliency-ext's.
ASYNC_STRATEGY = "mcore"


def add_run_arguments(parser: ArgumentParser, run_dir: Path | None = None) -> ArgumentParser:
    """--run-dir and what is logged, kept and trained."""
    group = parser.add_argument_group(title="run")
    group.add_argument(
        "--run-dir",
        metavar="DIR",
        default=None,
        help="Everything of the run in one folder: metrics.jsonl, arguments.json, Megatron's own "
        "output (megatron-rank*.log) and checkpoints/, from which a second start resumes.",
    )
    add_recipe_argument(group)
    add_dry_run_argument(group)
    group.add_argument(
        "--monitor-interval",
        type=int,
        metavar="STEPS",
        default=100,
        help="Every so many steps: load of the experts and entropy of the router in each layer, "
        "norms of weights and gradients by kind of module, range of the sinks. 0: never.",
    )
    group.add_argument(
        "--sample-interval",
        type=int,
        metavar="STEPS",
        default=0,
        help="Every so many steps the model writes a text. 0: never.",
    )
    group.add_argument("--sample-prompt", default="", help="The text that a sample goes on from.")
    group.add_argument(
        "--sample-tokens", type=int, default=64, metavar="N", help="Length of a sample, at most."
    )
    group.add_argument(
        "--sample-temperature", type=float, default=0.8, help="0 takes the likeliest token."
    )
    group.add_argument(
        "--keep-checkpoints",
        type=int,
        metavar="K",
        default=0,
        help="Delete checkpoints older than the K newest whole ones once a new one is complete. "
        "0: keep all.",
    )
    group.add_argument(
        "--freeze",
        nargs="+",
        metavar="PATTERN",
        default=[],
        help="Do not train the parameters whose names fit, for example '*.router.*' 'embedding.*': "
        "no gradient, no optimizer state.",
    )
    group.add_argument(
        "--lr-multiplier",
        nargs="+",
        metavar="PATTERN=FACTOR",
        default=[],
        help="Learning rates of the parameters whose names fit, as multiples of --lr and --min-lr, "
        "for example '*.softmax_offset=0.1'. The last pattern that fits counts. 0 holds them where "
        "they are.",
    )
    parser.set_defaults(
        micro_batch_size=1,
        log_interval=1,
        save_interval=500,
        eval_interval=500,
        eval_iters=10,
        # SIGTERM and SIGUSR1 save and end the run.
        exit_signal_handler=True,
        # Attention is causal in every layer, and its kernels know it.
        create_attention_mask_in_dataloader=False,
        # A checkpoint goes on at any layout; upstream's default is bound to its TP and PP.
        dist_ckpt_optim_fully_reshardable=True,
        # What --async-save writes with.
        async_strategy=ASYNC_STRATEGY,
    )
    if run_dir is not None:
        checkpoints = str(run_dir / "checkpoints")
        parser.set_defaults(save=checkpoints, load=checkpoints)
    return parser


def check_async_save(argv: Sequence[str], is_cuda: bool) -> None:
    """Refuse the writers of --async-save that would hang, write old tensors or in the foreground.

    Raises:
        UsageError: what to give instead.
    """
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--async-save", action="store_true")
    parser.add_argument("--async-strategy", nargs="?", default=ASYNC_STRATEGY)
    parser.add_argument("--use-persistent-ckpt-worker", action="store_true")
    parser.add_argument("--ckpt-assume-constant-structure", action="store_true")
    given, _ = parser.parse_known_args(list(argv))
    if not given.async_save:
        return
    if given.use_persistent_ckpt_worker and not is_cuda:
        raise UsageError(
            "--use-persistent-ckpt-worker: that process of Megatron's does not run on a CPU. Drop "
            "the flag: --async-save alone writes checkpoints in a thread."
        )
    if given.async_strategy == "nvrx" and not given.use_persistent_ckpt_worker:
        raise UsageError(
            "--async-strategy nvrx without --use-persistent-ckpt-worker: Megatron ignores "
            "--async-save then. Drop --async-strategy: --async-save alone writes checkpoints in a "
            "thread, without nvidia-resiliency-ext."
        )
    # The worker process keeps the tensors of the first save and writes those again (NeMo-RL 3312):
    # whatever a save gathers anew, as fully_reshardable does all optimizer state, would be old.
    if given.async_strategy == "nvrx" and given.ckpt_assume_constant_structure:
        raise UsageError(
            "--ckpt-assume-constant-structure with --async-strategy nvrx: every checkpoint would "
            "hold the optimizer state of the first one. Drop --ckpt-assume-constant-structure, or "
            "--async-strategy: the thread of --async-save alone looks up the tensors at every save."
        )
    if given.async_strategy == "nvrx":
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


def check_batch_size_schedule(argv: Sequence[str]) -> None:
    """Refuse a --step-batch-size-schedule that Megatron's parser would end at.

    Raises:
        UsageError: what to give instead.
    """
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--step-batch-size-schedule", nargs="?")
    schedule = parser.parse_known_args(list(argv))[0].step_batch_size_schedule
    if schedule is None:
        return
    try:
        steps = StepBatchsizeNumMicroBatchesCalculator._parse_schedule(schedule, None)
    except (ValueError, OverflowError) as error:
        raise UsageError(
            f'--step-batch-size-schedule "{schedule}" cannot be read. Wanted pairs TOKENS:BATCH, '
            'for example "0:64 10M:128": the tokens from which on a batch size holds, and the '
            "batch size."
        ) from error
    if not steps or steps[0][0] != 0:
        raise UsageError(
            f'--step-batch-size-schedule "{schedule}" does not say the batch size of the start. '
            "Begin it with 0:BATCH."
        )


def check_run_arguments(args: Namespace) -> None:
    """Refuse what Megatron asserts only once the model is built, and what of ours does not fit.

    Raises:
        UsageError: names the flag, the value and what to do.
    """
    _check_schedule(args)
    _check_batch_schedule(args)
    check_patterns(args)
    for name in ("monitor_interval", "sample_interval", "keep_checkpoints", "sample_tokens"):
        lowest = 1 if name == "sample_tokens" else 0
        if getattr(args, name) < lowest:
            flag = "--" + name.replace("_", "-")
            raise UsageError(f"{flag} {getattr(args, name)}: wanted {lowest} or more.")
    if args.keep_checkpoints and args.save_retain_interval is not None:
        raise UsageError(
            f"--keep-checkpoints {args.keep_checkpoints} and --save-retain-interval "
            f"{args.save_retain_interval} both delete old checkpoints. Drop one of them."
        )
    if args.sample_interval and args.tokenizer_type != "HuggingFaceTokenizer":
        raise UsageError(
            f"--sample-interval {args.sample_interval} needs a tokenizer that writes text, and "
            f"--tokenizer-type is {args.tokenizer_type}. Give --tokenizer-model FOLDER."
        )
    for flag in ("use_megatron_fsdp", "use_torch_fsdp2"):
        if args.monitor_interval and getattr(args, flag, False):
            raise UsageError(
                f"--{flag.replace('_', '-')} keeps gradients where norms by module are not looked "
                "for. Give --monitor-interval 0."
            )


def _check_schedule(args: Namespace) -> None:
    if not args.train_iters and not args.train_samples:
        raise UsageError("Nothing says how long to train. Give --train-iters or --train-samples.")
    if args.lr is None:
        raise UsageError("No learning rate. Give --lr, for example --lr 2e-5.")
    for unit in ("iters", "samples"):
        warmup = getattr(args, f"lr_warmup_{unit}")
        decay = getattr(args, f"lr_decay_{unit}") or getattr(args, f"train_{unit}")
        if decay and warmup >= decay:
            raise UsageError(
                f"--lr-warmup-{unit} {warmup} leaves nothing of the {decay} {unit} that the "
                "learning rate decays over. Give fewer, or --lr-warmup-fraction."
            )
    if args.lr_decay_style == "WSD" and not (args.lr_wsd_decay_iters or args.lr_wsd_decay_samples):
        raise UsageError(
            "--lr-decay-style WSD does not say how long the decay at the end is. Give "
            "--lr-wsd-decay-iters (or -samples), and --lr-wsd-decay-style."
        )
    for flag in ("min_lr", "lr_warmup_init"):
        rate = getattr(args, flag) or 0.0
        if not 0 <= rate <= args.lr:
            raise UsageError(
                f"--{flag.replace('_', '-')} {rate:g}: wanted 0 or more, and at most --lr "
                f"{args.lr:g}."
            )
    if args.lr_warmup_fraction is not None and not 0 <= args.lr_warmup_fraction < 1:
        raise UsageError(
            f"--lr-warmup-fraction {args.lr_warmup_fraction:g}: wanted a share of the decay, 0 or "
            "more and below 1."
        )
    if args.override_opt_param_scheduler and args.use_checkpoint_opt_param_scheduler:
        raise UsageError(
            "--override-opt-param-scheduler takes this command's schedule and "
            "--use-checkpoint-opt-param-scheduler the checkpoint's. Drop one of them; without "
            "either it is this command's."
        )


def _check_batch_schedule(args: Namespace) -> None:
    """Batch sizes that change within a run."""
    if args.rampup_batch_size is not None:
        first, by, samples = map(int, args.rampup_batch_size)
        raise UsageError(
            f"--rampup-batch-size {first} {by} {samples}: Megatron ignores it. Give "
            f'--step-batch-size-schedule "{_as_steps(args, first, by, samples)}" in place of it and '
            "of --global-batch-size: pairs of the tokens from which on a batch size holds, and the "
            "batch size."
        )
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
                f"{flag}: batch size {batch} is no multiple of {multiple}, the micro-batch size "
                f"{args.micro_batch_size} times {args.data_parallel_size} data-parallel ranks."
            )
        if threshold <= earlier or batch < smaller:
            raise UsageError(
                f"{flag}: {batch} follows {smaller}, and both tokens (in sequences of "
                f"{args.seq_length}) and batch sizes must grow from pair to pair."
            )


def _as_steps(args: Namespace, first: int, by: int, samples: int) -> str:
    """A ramp as Megatron defined it: even stretches of samples, `by` more in each."""
    last = args.global_batch_size
    stretches = max(1, (last - first) // by) if by > 0 else 1
    return " ".join(
        f"{index * samples // stretches * args.seq_length}:{min(first + index * by, last)}"
        for index in range(stretches + 1)
    )
