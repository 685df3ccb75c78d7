# Copyright (c) 2026, the megatron-core gptoss authors.

"""The arguments of `gptoss tokenize`."""

import argparse
import os


def add_tokenize_arguments(parser: argparse.ArgumentParser) -> None:
    """Add them; imports nothing heavy, so that --help is instant."""
    parser.add_argument(
        "inputs",
        nargs="+",
        help="files, folders or glob patterns: .jsonl, .json, .parquet, and text files, a document "
        "each; .gz and .zst of them",
    )
    parser.add_argument("--output", required=True, help="path of the .bin and .idx, without ending")
    parser.add_argument("--tokenizer", help="folder with tokenizer.json; byte-level by default")
    parser.add_argument("--end-token", help="ends a document; <|endoftext|>, else the eos_token")
    parser.add_argument("--pattern", action="append", help="names to take from a folder, *.txt ...")
    parser.add_argument("--exclude", action="append", default=[], help="paths to leave out, glob")
    parser.add_argument(
        "--json-key", default="text", help="field or column that holds the text; 'text' by default"
    )
    parser.add_argument(
        "--bad-lines",
        choices=("stop", "skip"),
        default="stop",
        help="at a line or row that cannot be read; either names file and line",
    )
    parser.add_argument(
        "--split-at",
        metavar="LENGTHS",
        help="8k,32k: a dataset for each range of lengths (OUTPUT.0-8k, OUTPUT.8k-32k, "
        "OUTPUT.32k-up), which a blend can give weights of their own",
    )
    parser.add_argument(
        "--validation-share",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="of the documents, for example 0.005, that goes to OUTPUT.valid instead",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="processes; as many as there are cores by default",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace an earlier output of gptoss tokenize, and nothing else",
    )
