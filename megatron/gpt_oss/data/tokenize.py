# Copyright (c) 2026, the megatron-core gptoss authors.

"""Text files to Megatron's indexed dataset (.bin and .idx)."""

import fnmatch
import glob
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Iterator, Sequence

import numpy
from tokenizers import Tokenizer

from megatron.core.datasets.indexed_dataset import (
    DType,
    IndexedDatasetBuilder,
    get_bin_path,
    get_idx_path,
)
from megatron.gpt_oss.data.tokenizer_files import TextTokenizer
from megatron.gpt_oss.errors import UsageError
from megatron.gpt_oss.progress import Progress

TEXT_PATTERNS = ("*.txt", "*.md", "*.rst", "*.py", "*.jsonl")  # taken from a folder by default
BATCH_CHARS = 4_000_000  # texts encoded at a time, on all cores
SKIP_NOT_UTF8 = "not UTF-8"
SKIP_EMPTY = "empty"


@dataclass
class Summary:
    """What a run of `tokenize_files` did."""

    files: int = 0
    documents: int = 0
    tokens: int = 0
    skipped: list[tuple[Path, str]] = field(default_factory=list)

    def __str__(self) -> str:
        text = f"{self.documents:,} documents, {self.tokens:,} tokens from {self.files:,} files"
        return text + (f"; {len(self.skipped):,} files skipped" if self.skipped else "")


def tokenize_files(
    inputs: Sequence[str | Path],
    output_prefix: str | Path,
    tokenizer: TextTokenizer,
    patterns: Sequence[str] = TEXT_PATTERNS,
    exclude: Sequence[str] = (),
    json_key: str = "text",
    overwrite: bool = False,
    show_progress: bool = False,
) -> Summary:
    """Tokenise text into output_prefix.bin and .idx, which appear when they are whole.

    A file is one document; a line of a .jsonl file is one. Each ends with the end-of-document
    token. What looks like a special token in a text stays text. Files that are not UTF-8, or
    empty, are skipped and reported.

    Args:
        inputs: files, folders, or glob patterns; taken in sorted order.
        output_prefix: path without ending.
        tokenizer: see `load_text_tokenizer`.
        patterns: names of files to take from a folder.
        exclude: patterns on the whole path, of files to leave out.
        json_key: field of a .jsonl line that holds the text.
        overwrite: replace an existing dataset.
        show_progress: a live line on stderr.
    Returns:
        The counts, and the files skipped with the reason.
    Raises:
        UsageError: nothing to read, a bad .jsonl line, or the dataset exists.
    """
    prefix = str(output_prefix)
    targets = get_bin_path(prefix), get_idx_path(prefix)
    existing = [target for target in targets if os.path.exists(target)]
    if existing and not overwrite:
        raise UsageError(f"{existing[0]} exists. Give another name, or --overwrite.")
    files = find_files(inputs, patterns, exclude)
    os.makedirs(os.path.dirname(prefix) or ".", exist_ok=True)
    temporary = f"{prefix}.part-{os.getpid()}"
    try:
        builder = IndexedDatasetBuilder(
            get_bin_path(temporary), dtype=DType.optimal_dtype(tokenizer.vocab_size)
        )
        summary = _write_documents(builder, files, tokenizer, json_key, show_progress)
        if summary.documents == 0:
            raise UsageError(
                f"None of the {len(files)} files found holds UTF-8 text, e.g. {files[0]}."
            )
        builder.finalize(get_idx_path(temporary))
        os.replace(get_bin_path(temporary), targets[0])
        os.replace(get_idx_path(temporary), targets[1])  # last: without it there is no dataset
    finally:
        for path in (get_bin_path(temporary), get_idx_path(temporary)):
            if os.path.exists(path):
                os.unlink(path)
    return summary


def find_files(
    inputs: Sequence[str | Path], patterns: Sequence[str], exclude: Sequence[str] = ()
) -> list[Path]:
    """The files that the inputs mean, sorted, each once.

    Raises:
        UsageError: an input matches nothing.
    """
    found: set[Path] = set()
    for item in map(str, inputs):
        if os.path.isdir(item):
            tree = (p for p in Path(item).rglob("*") if p.is_file())
            matches = [p for p in tree if any(fnmatch.fnmatch(p.name, n) for n in patterns)]
            hint = f" with a name like {', '.join(patterns)} (change it with --pattern)"
        else:
            matches = [Path(p) for p in glob.glob(item, recursive=True) if os.path.isfile(p)]
            matches = [Path(item)] if os.path.isfile(item) else matches
            hint = ""
        matches = [p for p in matches if not any(fnmatch.fnmatch(str(p), n) for n in exclude)]
        if not matches:
            raise UsageError(f"{item}: no file{hint}. Give files, folders or glob patterns.")
        found.update(matches)
    return sorted(found)


def _write_documents(
    builder: IndexedDatasetBuilder,
    files: Sequence[Path],
    tokenizer: TextTokenizer,
    json_key: str,
    show_progress: bool,
) -> Summary:
    summary = Summary()
    encoder = Tokenizer.from_str(tokenizer.tokenizer.to_str())
    encoder.encode_special_tokens = True  # '<|endoftext|>' in a source file is no document end
    batch: list[str] = []
    batch_chars = 0

    def flush() -> None:
        for encoding in encoder.encode_batch(batch, add_special_tokens=False):
            ids = numpy.array([*encoding.ids, tokenizer.end_id])
            builder.add_document(ids, [len(ids)])
            summary.documents += 1
            summary.tokens += len(ids)
        batch.clear()

    with Progress(sum(p.stat().st_size for p in files), "MB", 1e-6, show_progress) as progress:
        for path in files:
            for text, size in _texts_of(path, json_key, summary):
                if text:
                    batch.append(text)
                    batch_chars += len(text)
                if batch_chars >= BATCH_CHARS:
                    flush()
                    batch_chars = 0
                progress.advance(size, f"{summary.tokens:,} tokens")
        flush()
    return summary


def _texts_of(path: Path, json_key: str, summary: Summary) -> Iterator[tuple[str, int]]:
    """The documents of one file and the bytes they took; '' where there is none.

    Counts the file, or notes why it is skipped.
    """
    if path.suffix == ".jsonl":
        yield from _lines_of(path, json_key, summary)
        return
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        summary.skipped.append((path, SKIP_NOT_UTF8))
        text = ""
    else:
        if text.strip():
            summary.files += 1
        else:
            summary.skipped.append((path, SKIP_EMPTY))
            text = ""
    yield text, len(data)


def _lines_of(path: Path, json_key: str, summary: Summary) -> Iterator[tuple[str, int]]:
    """The documents of a .jsonl file, which may be larger than the memory."""
    documents = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            text = _text_of_line(line, json_key, f"{path}, line {number}") if line.strip() else ""
            documents += bool(text)
            yield text, len(line)
    if documents:
        summary.files += 1
    else:
        summary.skipped.append((path, SKIP_EMPTY))


def _text_of_line(line: bytes, json_key: str, place: str) -> str:
    try:
        text = json.loads(line)[json_key]
    except (ValueError, KeyError, TypeError) as error:  # UnicodeDecodeError is a ValueError
        raise UsageError(
            f"{place}: not a JSON object with a '{json_key}' ({error!r}). Name the field with "
            "--json-key."
        ) from error
    if not isinstance(text, str):
        raise UsageError(f"{place}: '{json_key}' is not a string.")
    return text
