# Copyright (c) 2026, the megatron-core gptoss authors.

"""The arguments of `gptoss tokenize`."""

import argparse
import os

from megatron.gpt_oss.arguments.check_values import filled, number, path

CONTEXT = 131_072  # of the published models


def add_tokenize_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments. Imports only the standard library, so that --help is fast."""
    parser.add_argument(
        "inputs",
        nargs="+",
        help="files, directories or glob patterns: .jsonl, .json, .parquet, and text files (one "
        "document each); also compressed as .gz or .zst",
    )
    parser.add_argument(
        "--output", required=True, type=path, help="path of the .bin and .idx, without extension"
    )
    parser.add_argument(
        "--tokenizer", type=path, help="directory with tokenizer.json; byte-level by default"
    )
    parser.add_argument(
        "--end-token", type=filled, help="end-of-document token; <|endoftext|>, else eos_token"
    )
    parser.add_argument(
        "--pattern", action="append", help="file names to read in a directory, *.txt ..."
    )
    parser.add_argument("--exclude", action="append", default=[], help="paths to skip, glob")
    parser.add_argument(
        "--json-key", default="text", help="field or column that holds the text; 'text' by default"
    )
    parser.add_argument(
        "--bad-lines",
        choices=("stop", "skip"),
        default="stop",
        help="what to do at an unreadable line or row; both report file and line",
    )
    parser.add_argument(
        "--split-at",
        type=filled,
        metavar="LENGTHS",
        help="8k,32k: write one dataset per length range (OUTPUT.0-8k, OUTPUT.8k-32k, "
        "OUTPUT.32k-up), which a blend can weight separately",
    )
    parser.add_argument(
        "--validation-share",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="fraction of the documents, for example 0.005, that goes to OUTPUT.valid instead",
    )
    _add_chat_arguments(parser)
    parser.add_argument(
        "--workers",
        type=number(int, "1 to 1024"),
        default=len(os.sched_getaffinity(0)),
        help="number of processes; by default one per core",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace an earlier output of gptoss tokenize, but nothing else",
    )


def _add_chat_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of conversations; None where not given, so that they can be refused without --chat."""
    parser.add_argument(
        "--chat",
        action="store_true",
        help="the records are conversations (messages, tools): render them in the harmony format, "
        "and write the loss weight of each token to OUTPUT.loss (docs/sft.md)",
    )
    parser.add_argument(
        "--loss-on",
        choices=("assistant", "final", "last-turn"),
        help="messages with loss: all of the assistant (the default), its final answers, or its "
        "messages after the last user message",
    )
    parser.add_argument(
        "--context",
        type=number(int, "1 or more"),
        metavar="TOKENS",
        help=f"most tokens of a conversation; {CONTEXT:,} by default. A longer one is a bad line",
    )
    parser.add_argument(
        "--date",
        type=filled,
        metavar="YYYY-MM-DD",
        help="current date in the system message of conversations without a 'date'; none by default",
    )
    parser.add_argument(
        "--show",
        type=number(int, "1 to 1024"),
        metavar="N",
        help="print the first N conversations, the tokens without loss in grey",
    )
