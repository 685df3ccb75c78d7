# Copyright (c) 2026, the megatron-core gptoss authors.

"""--data-blend and --sft as values of Megatron's own arguments."""

import os
from argparse import Namespace
from typing import Sequence

from megatron.gpt_oss.data.blend import read_blend
from megatron.gpt_oss.data.indexed_dataset import check_loss_weights, has_loss_weights
from megatron.gpt_oss.errors import UsageError

REFUSE = "refuse"  # of --sft-overlong
_TRAINING = ("data_path", "train_data_path")
_OTHER_WAYS = (
    "data_path",
    "split",
    "train_data_path",
    "valid_data_path",
    "test_data_path",
    "data_args_path",
    "per_split_data_args_path",
    "mock_data",
    "multiple_validation_sets",
    "validation_set_names",
    "full_validation",
)


def blend_defaults(given: Namespace) -> dict:
    """Values of Megatron's arguments for the file of --data-blend; {} without the flag.

    Raises:
        UsageError: a mistake in the file, or another flag that names data.
    """
    file = getattr(given, "data_blend", None)
    if file is None:
        return {}
    for dest in _OTHER_WAYS:
        if getattr(given, dest, None):
            flag = f"--{dest.replace('_', '-')}"
            raise UsageError(f"{flag} and --data-blend {file} both specify data. Drop one of them.")
    blend = read_blend(file)
    words = [word for source in blend.sources for word in (repr(source.weight), source.prefix)]
    defaults = {"train_data_path": words}
    if blend.validation:
        defaults["valid_data_path"] = list(blend.validation.values())
        defaults["multiple_validation_sets"] = True
        defaults["validation_set_names"] = list(blend.validation)
    else:
        defaults["eval_iters"] = 0
    return defaults


def sft_defaults(given: Namespace) -> dict:
    """Values of Megatron's arguments for --sft; {} without the flag."""
    if not getattr(given, "sft", False):
        return {}
    return {"dataloader_inter_document_masking": True, "calculate_per_token_loss": True}


def check_conversations(args: Namespace) -> None:
    """Refuse conversations without --sft, and --sft without conversations.

    Args:
        args: before Megatron's validation.
    Raises:
        UsageError: names the dataset or flag and what to do.
    """
    datasets = {
        dest: read_prefixes(getattr(args, dest), f"--{dest.replace('_', '-')}")
        for dest in (*_TRAINING, "valid_data_path", "test_data_path")
    }
    chats = [p for prefixes in datasets.values() for p in prefixes if has_loss_weights(p)]
    if not args.sft:
        if chats:
            raise UsageError(
                f"{chats[0]} holds conversations with loss weights, which only --sft uses. Give "
                "--sft."
            )
        if args.sft_overlong != REFUSE:
            raise UsageError(
                f"--sft-overlong {args.sft_overlong} is for conversations. Give --sft."
            )
        return
    if args.mock_data:
        raise UsageError("--sft and --mock-data both specify data. Drop one of them.")
    training = [prefix for dest in _TRAINING for prefix in datasets[dest]]
    if training and not set(training) & set(chats):
        raise UsageError(
            "--sft without conversations: no training dataset has loss weights. Create one with: "
            "gptoss tokenize --chat."
        )
    for prefix in chats:
        check_loss_weights(prefix)


def read_prefixes(words: Sequence[str] | None, flag: str = "--data-path") -> list[str]:
    """The prefixes of a blend's words that are read: those whose weight is not 0.

    Args:
        words: of --data-path and its like, prefixes with or without a weight before each.
        flag: names them in messages.
    Raises:
        UsageError: a weight is missing, negative or not finite.
    """
    words = list(words or ())
    weights, prefixes = [_as_number(word) for word in words[::2]], words[1::2]
    if weights == [None] * len(weights) and len(words) % 2 == 0:
        return words
    if len(words) % 2:
        stray = next((word for word in words if _as_number(word) is not None), None)
        if stray is None or os.path.isfile(f"{stray}.idx"):
            return words
        raise UsageError(
            f"{flag} {' '.join(words)}: {stray} is a weight, and {len(words)} words are not pairs "
            "of a weight and a path. Give a weight before each path, or none."
        )
    for weight, word in zip(weights, words[::2]):
        if weight is None or not 0 <= weight < float("inf"):
            raise UsageError(
                f"{flag}: {word} is not a weight. Give a number of 0 or more before each path, or "
                "none."
            )
    return [prefix for weight, prefix in zip(weights, prefixes) if weight]


def _as_number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None
