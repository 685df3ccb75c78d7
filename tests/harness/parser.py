# Copyright (c) 2026, the megatron-core gptoss authors.

"""Parse flags without the checks of this project."""

import functools
from argparse import ArgumentParser, Namespace

from megatron.gpt_oss.arguments.flags import add_our_arguments
from megatron.training.arguments import add_megatron_arguments


@functools.cache
def whole_parser() -> ArgumentParser:
    """Megatron's flags and ours."""
    return add_our_arguments(add_megatron_arguments(ArgumentParser(allow_abbrev=False)))


def flags(words: str) -> Namespace:
    """Parsed flags of a command line, over Megatron's defaults."""
    return whole_parser().parse_args(words.split())
