# Copyright (c) 2026, the megatron-core gptoss authors.

"""`gptoss tokenize`: calls `tokenize_files` and prints the result."""

import argparse
import importlib.util
import re
import sys
from contextlib import contextmanager
from typing import Iterator

from megatron.gpt_oss.data.byte_tokenizer import END_OF_TEXT, build_byte_tokenizer
from megatron.gpt_oss.data.chat.harmony import ASSISTANT, import_harmony, vocabulary
from megatron.gpt_oss.data.chat.report import chat_summary, shown_conversations
from megatron.gpt_oss.data.chat.template import read_template
from megatron.gpt_oss.data.lengths import parse_lengths, plot_histogram
from megatron.gpt_oss.data.tokenize.arguments import CONTEXT
from megatron.gpt_oss.data.tokenize.documents import CHAT_KEY, CHAT_PATTERNS, TEXT_PATTERNS
from megatron.gpt_oss.data.tokenize.encode import ChatJob
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
    with _chat_job(args, tokenizer) as chat:
        summary = tokenize_files(
            args.inputs,
            args.output,
            tokenizer,
            patterns=args.pattern or (CHAT_PATTERNS if args.chat else TEXT_PATTERNS),
            exclude=args.exclude,
            json_key=CHAT_KEY if args.chat else args.json_key,
            overwrite=args.overwrite,
            show_progress=True,
            workers=args.workers,
            bad=args.bad_lines,
            split_at=parse_lengths(args.split_at) if args.split_at else (),
            validation_share=args.validation_share,
            chat=chat,
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
    if args.chat:
        print(chat_summary(summary.counts, summary.differences))
        for text in shown_conversations(next(iter(summary.datasets)), tokenizer, args.show or 0):
            print(f"\n{text}")


@contextmanager
def _chat_job(args: argparse.Namespace, tokenizer: TextTokenizer) -> Iterator[ChatJob | None]:
    """The parameters of --chat; None without it.

    Raises:
        UsageError: the flags do not fit together, or the tokenizer is not that of gpt-oss.
    """
    if not args.chat:
        for name in ("loss_on", "context", "date", "show"):
            if getattr(args, name) is not None:
                raise UsageError(f"--{name.replace('_', '-')} is for conversations. Give --chat.")
        yield None
        return
    if not args.tokenizer:
        raise UsageError("--chat without --tokenizer: give the directory of a gpt-oss model.")
    if args.date is not None and not re.fullmatch(r"\d{4}-\d{2}-\d{2}", args.date):
        raise UsageError(f"--date {args.date}: give YYYY-MM-DD, such as 2026-01-31.")
    import_harmony()  # before the work starts
    with vocabulary(tokenizer.tokenizer) as directory:
        yield ChatJob(
            args.loss_on or ASSISTANT,
            args.context or CONTEXT,
            args.date,
            read_template(args.tokenizer),
            directory,
        )
