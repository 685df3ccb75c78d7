# Copyright (c) 2026, the megatron-core gptoss authors.

"""--data-blend, in terms of Megatron's own flags."""

import re
from argparse import Namespace
from typing import Iterator, Sequence

from megatron.gpt_oss.data.blend import read_blend
from megatron.gpt_oss.errors import UsageError

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
    """Megatron's arguments that say what the data file says; {} without one.

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


def read_prefixes(words: Sequence[str] | None) -> Iterator[str]:
    """The prefixes of a blend's words that are read: those whose weight is not 0.

    Args:
        words: of --data-path and its like, prefixes with or without a weight before each.
    """
    weight = None
    for word in words or ():
        if re.fullmatch(r"[0-9.]+(e-?[0-9]+)?", word) is not None:
            weight = float(word)
        elif weight != 0:
            yield word
