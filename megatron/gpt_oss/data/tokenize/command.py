# Copyright (c) 2026, the megatron-core gptoss authors.

"""`gptoss tokenize`: calls `tokenize_files` and prints the result."""

import argparse
import importlib.util
import sys

from megatron.gpt_oss.data.byte_tokenizer import END_OF_TEXT, build_byte_tokenizer
from megatron.gpt_oss.data.lengths import parse_lengths, plot_histogram
from megatron.gpt_oss.data.tokenize.documents import TEXT_PATTERNS
from megatron.gpt_oss.data.tokenize.files import SKIP_EMPTY, tokenize_files
from megatron.gpt_oss.data.tokenizer_files import TextTokenizer, load_text_tokenizer
from megatron.gpt_oss.errors import UsageError

_MAX_SHOWN = 10


def run_tokenize(args: argparse.Namespace) -> None:
    """Tokenize files and print a summary."""
    if args.tokenizer:
        tokenizer = load_text_tokenizer(args.tokenizer, args.end_token)
    elif args.end_token not in (None, END_OF_TEXT):
        raise UsageError(
            f"--end-token {args.end_token} without --tokenizer: the byte-level tokenizer ends "
            f"documents with {END_OF_TEXT}. Give --tokenizer, or drop --end-token."
        )
    else:
        tokenizer = build_byte_tokenizer()
        tokenizer = TextTokenizer(tokenizer, END_OF_TEXT, tokenizer.token_to_id(END_OF_TEXT))
    summary = tokenize_files(
        args.inputs,
        args.output,
        tokenizer,
        patterns=args.pattern or TEXT_PATTERNS,
        exclude=args.exclude,
        json_key=args.json_key,
        overwrite=args.overwrite,
        show_progress=True,
        workers=args.workers,
        bad=args.bad_lines,
        split_at=parse_lengths(args.split_at) if args.split_at else (),
        validation_share=args.validation_share,
    )
    shown = [(place, reason) for place, reason in summary.skipped if reason != SKIP_EMPTY]
    for place, reason in shown[:_MAX_SHOWN]:
        print(f"skipped {place}: {reason}", file=sys.stderr)
    if len(shown) > _MAX_SHOWN:
        print(f"... full list: {args.output}.skipped.txt", file=sys.stderr)
    for path, (documents, tokens) in summary.datasets.items():
        print(f"{path}.bin, .idx: {documents:,} documents, {tokens:,} tokens")
    written = f"{args.output}.json"
    if importlib.util.find_spec("matplotlib") is not None:
        written += f", {plot_histogram(summary.histogram, f'{args.output}.png', args.output)}"
    else:
        print("No plot of the lengths: pip install 'megatron-core[report]'.", file=sys.stderr)
    print(f"{written}: {summary}")
