# Copyright (c) 2026, the megatron-core gptoss authors.

"""Refuses values that no run can have: numbers out of range, empty paths, a malformed --split.

Megatron asserts some of these, divides by others, and trains with the rest. Imports nothing heavy,
so that the commands of `gptoss` can use the same ranges.
"""

import argparse
import math
import re
from argparse import ArgumentParser, Namespace
from typing import Callable

from megatron.gpt_oss.errors import UsageError

Number = int | float
# What a message says that it expects, and the numbers that it allows.
RANGES: dict[str, Callable[[Number], bool]] = {
    "0 or more": lambda number: number >= 0,
    "1 or more": lambda number: number >= 1,
    "more than 0": lambda number: number > 0,
    "0 or more, and below 1": lambda number: 0 <= number < 1,
    "0 to 1": lambda number: 0 <= number <= 1,
    "0 to 1024": lambda number: 0 <= number <= 1024,
    "1 to 1024": lambda number: 1 <= number <= 1024,
    "1 to 1000000": lambda number: 1 <= number <= 10**6,
    "0 to 4294967295": lambda number: 0 <= number < 2**32,
    # The order of the samples is an array in memory.
    "0 to 10^8": lambda number: 0 <= number <= 10**8,
    "0 to 10^10": lambda number: 0 <= number <= 10**10,
}
# Arguments (argparse's dest) by the range of their values.
_EXPECTED = {
    "0 or more": """
        lr lr_warmup_iters lr_warmup_samples clip_grad
        weight_decay start_weight_decay end_weight_decay init_method_std
        moe_aux_loss_coeff moe_z_loss_coeff mid_level_dataset_surplus
        train_sync_interval exit_interval exit_duration_in_mins manual_gc_interval
        start_eval_at_iter eval_iters ckpt_step logging_level tensorboard_queue_size
        monitor_interval sample_interval keep_checkpoints sample_temperature
    """,
    "1 or more": """
        tensor_model_parallel_size pipeline_model_parallel_size context_parallel_size
        expert_model_parallel_size expert_tensor_parallel_size hierarchical_context_parallel_sizes
        num_layers_per_virtual_pipeline_stage num_virtual_stages_per_pipeline_rank
        hidden_size ffn_hidden_size moe_ffn_hidden_size num_attention_heads num_query_groups
        kv_channels num_experts moe_router_topk vocab_size padded_vocab_size
        make_vocab_size_divisible_by max_position_embeddings seq_length
        micro_batch_size global_batch_size eval_micro_batch_size eval_global_batch_size
        lr_decay_iters lr_decay_samples lr_wsd_decay_iters lr_wsd_decay_samples
        save_interval save_retain_interval eval_interval log_interval log_memory_interval
        tensorboard_log_interval sample_tokens iterations_to_skip
        recompute_num_layers mlp_chunks_for_training ddp_num_buckets ddp_bucket_size
    """,
    "more than 0": """
        adam_eps layernorm_epsilon rotary_base initial_loss_scale yarn_factor
        rotary_scaling_factor
    """,
    "0 or more, and below 1": """
        adam_beta1 adam_beta2 sgd_momentum hidden_dropout attention_dropout
    """,
    "0 to 1": "optimizer_offload_fraction",
    "0 to 1024": "num_workers",
    "1 to 1024": "num_dataset_builder_threads dist_ckpt_workers",
    "1 to 1000000": "distributed_timeout_minutes distributed_timeout_seconds_after_init",
    "0 to 4294967295": "seed",
    "0 to 10^8": "train_iters",
    "0 to 10^10": "train_samples",
}
_RANGE_OF = {dest: expected for expected, names in _EXPECTED.items() for dest in names.split()}
_LARGEST_INTEGER = 2**63 - 1  # of PyTorch and C++


def number(kind: type[int] | type[float], expected: str) -> Callable[[str], Number]:
    """A `type` of argparse: a number in a range.

    Args:
        kind: int or float.
        expected: a key of `RANGES`.
    """

    def parse(word: str) -> Number:
        try:
            value = kind(word)
        except ValueError:
            raise argparse.ArgumentTypeError(f"'{word}' is not a number; expected {expected}")
        if problem := _problem(value, expected):
            raise argparse.ArgumentTypeError(f"{word}: expected {problem}")
        return value

    return parse


def path(word: str) -> str:
    """A `type` of argparse: a path, which an unset variable of a shell is not."""
    if not word.strip() or "\0" in word:
        raise argparse.ArgumentTypeError(f"{word!r} is not a path")
    return word


def filled(word: str) -> str:
    """A `type` of argparse: any word but an empty one."""
    if not word:
        raise argparse.ArgumentTypeError("is empty")
    return word


def text(word: str) -> str:
    """A `type` of argparse: text for a tokenizer."""
    try:
        word.encode()
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError(f"{word!r} is not UTF-8 at character {error.start}")
    return word


def check_values(given: Namespace, parser: ArgumentParser) -> None:
    """Refuse values of a command line that no run can have.

    Args:
        given: what the command line says, by dest, without defaults.
        parser: knows the flags, and the defaults, which are never refused.
    Raises:
        UsageError: names the flag, the value and what is expected.
    """
    flags = {action.dest: action.option_strings for action in reversed(parser._actions)}
    for dest, value in vars(given).items():
        if value == parser.get_default(dest) or not flags.get(dest):
            continue
        for item in value if isinstance(value, list) else [value]:
            if problem := _problem(item, _RANGE_OF.get(dest)):
                raise UsageError(f"{flags[dest][0]} {item}: expected {problem}.")
            if item == "" and dest != "sample_prompt":
                raise UsageError(
                    f'{flags[dest][0]} "" is empty. Give a value, or drop the flag; a variable of '
                    "the shell may not be set."
                )
    if "split" in given and given.split is not None:
        _check_split(given.split)


def _problem(value: object, expected: str | None) -> str | None:
    """What is expected of a number instead of a value; None if it is right, or no number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return f"a finite number{f', {expected}' if expected else ''}"
    if isinstance(value, int) and abs(value) > _LARGEST_INTEGER:
        return expected if expected and " to " in expected else "a smaller number"
    return None if expected is None or RANGES[expected](value) else expected


def _check_split(split: str) -> None:
    """Megatron takes the digits of any text for the parts."""
    parts = split.split(",")
    are_numbers = all(re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*", part) for part in parts)
    if not are_numbers or len(parts) > 3 or not sum(map(float, parts)) > 0:
        raise UsageError(
            f'--split "{split}": expected the parts of training, validation and test, such as '
            "98,1,1, of which one is above 0."
        )
