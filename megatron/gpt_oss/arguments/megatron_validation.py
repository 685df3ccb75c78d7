# Copyright (c) 2026, the megatron-core gptoss authors.

"""Megatron's validation of a run's arguments, with its refusals as UsageError."""

import math
from argparse import Namespace
from typing import Callable

from megatron.gpt_oss.arguments.run_spec import RunSpec
from megatron.gpt_oss.arguments.te_requirements import check_installed
from megatron.gpt_oss.arguments.validate_run import check_run_arguments
from megatron.gpt_oss.errors import UsageError, as_refusal


def validate(spec: RunSpec) -> Namespace:
    """Run Megatron's validation and set its global variables.

    Returns:
        `spec.args`, with the values that the validation derives.
    Raises:
        UsageError: Megatron refuses the arguments. No process group exists yet.
    """
    from megatron.training.global_vars import get_tokenizer, set_global_variables

    def finish(args: Namespace):
        check_installed(args.transformer_impl)
        set_global_variables(args)
        return get_tokenizer()

    return _validate(spec.args, finish)


def validate_for_plan(spec: RunSpec) -> Namespace:
    """`validate` for a dry run: sets no global variable and opens no writer."""
    from megatron.core.num_microbatches_calculator import _build_num_microbatches_calculator
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    def finish(args: Namespace):
        _build_num_microbatches_calculator(  # checks that the batch sizes divide
            rank=args.rank,
            global_batch_size=args.global_batch_size,
            micro_batch_size=args.micro_batch_size,
            data_parallel_size=args.data_parallel_size * args.gtp_weight_remat_size,
            decrease_batch_size_if_needed=args.decrease_batch_size_if_needed,
            step_batch_size_schedule=args.step_batch_size_schedule,
            seq_length=args.seq_length,
        )
        return build_tokenizer(args)

    return _validate(spec.args, finish)


def _validate(args: Namespace, finish: Callable[[Namespace], object]) -> Namespace:
    from megatron.training.arguments import validate_args

    try:
        validate_args(args)
        tokens = finish(args).vocab_size
    except (AssertionError, ValueError) as error:
        if (refusal := as_refusal(error)) is None:
            raise
        raise refusal from error
    _check_expert_ranks(args)
    args.tokenizer_vocab_size = tokens  # saved in checkpoints: further rows may be padding
    if args.padded_vocab_size is not None and tokens > args.padded_vocab_size:
        raise UsageError(
            f"The tokenizer has {tokens} tokens, the model {args.padded_vocab_size} rows of "
            "vocabulary. Give the model's own tokenizer with --tokenizer-model."
        )
    check_run_arguments(args)
    return args


def _check_expert_ranks(args: Namespace) -> None:
    """Refuse parallel sizes that Megatron would refuse when it creates the process groups."""
    sizes = {
        "expert_model_parallel_size": args.expert_model_parallel_size,
        "expert_tensor_parallel_size": args.expert_tensor_parallel_size,
        "pipeline_model_parallel_size": args.pipeline_model_parallel_size,
    }
    ranks = math.prod(sizes.values())
    if args.world_size % ranks:
        named = " * ".join(f"{name} {size}" for name, size in sizes.items())
        raise UsageError(
            f"{args.world_size} ranks cannot be divided into groups of {named} = {ranks}. Give a "
            "smaller --expert-model-parallel-size or --expert-tensor-parallel-size (its default is "
            f"--tensor-model-parallel-size), or use a multiple of {ranks} ranks."
        )
