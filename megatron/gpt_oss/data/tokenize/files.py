# Copyright (c) 2026, the megatron-core gptoss authors.

"""Text files to Megatron's indexed dataset (.bin and .idx)."""

import hashlib
import json
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Iterator, Sequence

import numpy

from megatron.gpt_oss.data.corpus_record import (
    SUMMARY,
    TOKENIZE,
    VERSION,
    check_outputs,
    check_prefix,
    dataset_prefix,
    former_outputs,
    loss_name,
    output_of,
)
from megatron.gpt_oss.data.lengths import LONG, VALIDATION, Histogram, bucket_names, short_length
from megatron.gpt_oss.data.tokenize.documents import (
    TEXT_PATTERNS,
    Record,
    is_whole_text,
    place_of,
    printable,
    read_records,
)
from megatron.gpt_oss.data.tokenize.encode import (
    ChatJob,
    Encoded,
    EncodeJob,
    encode_in_process,
    encoder_of,
    start_process,
)
from megatron.gpt_oss.data.tokenize.find_files import find_files
from megatron.gpt_oss.data.tokenize.output import ResumableDatasets
from megatron.gpt_oss.data.tokenize.workers import process_map
from megatron.gpt_oss.data.tokenizer_files import TextTokenizer
from megatron.gpt_oss.errors import UsageError, as_os_sentence
from megatron.gpt_oss.outputs import MADE_BY, write_file
from megatron.gpt_oss.progress import advance, progress_bar

BATCH_BYTES = 2_000_000  # of text per batch
BATCH_RECORDS = 2_000
SAVE_SECONDS = 20.0  # at most this much work is lost by a kill
SKIP, STOP = "skip", "stop"
SKIP_EMPTY = "empty"
_MAX_SHOWN = 100  # skipped documents in the summary; PREFIX.skipped.txt lists all


@dataclass
class Summary:
    """Result of `tokenize_files`.

    Attributes:
        datasets: {path without extension: (documents, tokens)}.
        skipped: (place, reason) of the first hundred skipped documents.
        num_skipped: number of skipped documents.
        counts, differences: of conversations, see `Encoded`; the first hundred differences.
        tokens_per_second: of this process; 0 if an earlier process tokenized everything.
    """

    files: int = 0
    documents: int = 0
    tokens: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)
    num_skipped: int = 0
    datasets: dict[str, tuple[int, int]] = field(default_factory=dict)
    histogram: Histogram | None = None
    counts: dict[str, int] = field(default_factory=dict)
    differences: list[tuple[str, str]] = field(default_factory=list)
    tokens_per_second: float = 0.0

    def __str__(self) -> str:
        text = f"{self.documents:,} documents, {self.tokens:,} tokens from {self.files:,} files"
        if self.histogram is not None:
            share = 100 * self.histogram.long_share
            text += f", {share:.1f} % of the tokens in documents over {short_length(LONG)}"
        if self.tokens_per_second:
            text += f", {self.tokens_per_second:,.0f} tokens/s"
        return text + (f"; {self.num_skipped:,} skipped" if self.num_skipped else "")


@dataclass
class _Part:
    """Records of one file within a batch."""

    file: int
    first: int  # number of records of the file before this part
    count: int
    position: int  # bytes of the file read so far
    ends_file: bool


@dataclass
class _Batch:
    """Input of a process: a part of a large file, or several small files."""

    records: list[Record] = field(default_factory=list)
    parts: list[_Part] = field(default_factory=list)
    size: int = 0

    def is_full(self) -> bool:
        most = max(len(self.records), len(self.parts))  # files may be empty
        return self.size >= BATCH_BYTES or most >= BATCH_RECORDS


def tokenize_files(
    inputs: Sequence[str | Path],
    output_prefix: str | Path,
    tokenizer: TextTokenizer,
    patterns: Sequence[str] = TEXT_PATTERNS,
    exclude: Sequence[str] = (),
    json_key: str = "text",
    overwrite: bool = False,
    show_progress: bool = False,
    workers: int = 1,
    bad: str = STOP,
    split_at: Sequence[int] = (),
    validation_share: float = 0.0,
    chat: ChatJob | None = None,
) -> Summary:
    """Tokenize text into output_prefix.bin and .idx, which appear when they are complete.

    `documents.read_records` defines the documents of a file. Each gets an end-of-document token.
    Special tokens in a text are plain text. The output depends on inputs and arguments only, not on
    the number of processes. A killed run resumes if it is started again. output_prefix.json has a
    summary.

    Args:
        inputs, patterns, exclude: see `find_files`.
        output_prefix: path without extension.
        tokenizer: see `load_text_tokenizer`.
        json_key: field or column that holds the text.
        overwrite: replace an existing dataset, and an unfinished one.
        show_progress: show a bar on stderr.
        workers: number of processes.
        bad: 'stop' at a line or row that cannot be read, or 'skip' it. Text files that are not
            UTF-8, and documents without text, are always skipped. All skipped documents are listed.
        split_at: increasing lengths in tokens that separate the datasets, see `bucket_names`.
        validation_share: fraction of the documents that goes to output_prefix.valid. A hash of the
            text selects them, so that duplicates stay together.
        chat: the records are conversations; their loss weights go to output_prefix.loss.
    Raises:
        UsageError: there are no documents, a line is invalid, or the dataset exists.
    """
    prefix = check_prefix(output_prefix)
    if workers < 1:
        raise UsageError(f"--workers {workers}: give 1 or more.")
    if not 0 <= validation_share < 1:
        raise UsageError(
            f"--validation-share {validation_share} is invalid: give 0 or more and below 1, such "
            "as 0.005."
        )
    buckets = bucket_names(split_at) or [""]
    names = buckets + ([VALIDATION] if validation_share else [])
    files = find_files(inputs, patterns, exclude)
    # As DType.optimal_dtype, without importing torch.
    dtype = "uint16" if tokenizer.vocab_size < 65500 else "int32"
    job = EncodeJob(
        tokenizer.tokenizer.to_str(), tokenizer.end_id, dtype, json_key, validation_share, chat
    )
    dtypes = dict.fromkeys(names, dtype)
    if chat is not None:
        dtypes |= {loss_name(name): "float32" for name in names}
    try:
        output = ResumableDatasets(prefix, dtypes, _task(job, files, split_at), overwrite)
    except OSError as error:
        sentence = as_os_sentence(error, prefix.parent)
        raise UsageError(sentence) if sentence else error
    rate = 0.0
    try:
        check_outputs(prefix, list(dtypes), overwrite, files, output.named_already())
        if not output.complete:
            run = _Run(files, output, buckets, split_at, bad)
            rate = run.encode(job, workers, show_progress)
        # Check again: another process may have written there in the meantime.
        check_outputs(prefix, list(dtypes), overwrite, files, output.named_already())
        summary = _publish(output, prefix, names, tokenizer)
    except BaseException as error:
        output.close()
        if not output.saved or isinstance(error, _NothingFound):
            output.remove()
        raise _with_remedy(error, output) from error
    output.remove()
    summary.tokens_per_second = rate
    return summary


class _NothingFound(UsageError):
    """The input has no document."""


class _Run:
    """Reads, tokenizes and writes; the journal stores `_state`."""

    def __init__(
        self,
        files: Sequence[Path],
        output: ResumableDatasets,
        buckets: Sequence[str],
        split_at: Sequence[int],
        bad: str,
    ):
        self._files, self._output, self._buckets, self._bad = files, output, buckets, bad
        self._split_at = numpy.array(split_at, dtype=numpy.int64)
        state = output.state
        self._file, self._record = state.get("file", 0), state.get("record", 0)
        self.files = state.get("files", 0)
        self.tokens = state.get("tokens", 0)
        self._found = state.get("found", 0)  # documents of the current file
        self.num_skipped = state.get("num_skipped", 0)
        self.skipped = state.get("skipped", [])
        self.counts = Counter(state.get("counts", {}))  # of conversations
        self.differences = state.get("differences", [])

    def _state(self) -> dict:
        return {
            "file": self._file,
            "record": self._record,
            "found": self._found,
            "files": self.files,
            "tokens": self.tokens,
            "num_skipped": self.num_skipped,
            "skipped": self.skipped,
            "counts": dict(self.counts),
            "differences": self.differences,
        }

    def encode(self, job: EncodeJob, workers: int, show_progress: bool) -> float:
        """Tokenize the remaining files; return tokens/s."""
        sizes = [path.stat().st_size for path in self._files]
        started = saved = time.monotonic()
        rate, tokens_before, position = 0.0, self.tokens, sum(sizes[: self._file])
        with progress_bar(sum(sizes), enabled=show_progress, initial=position) as bar:
            for batch, encoded in self._encoded(job, workers):
                self._take(batch, encoded)
                now = time.monotonic()
                rate = (self.tokens - tokens_before) / max(now - started, 1e-9)
                last = batch.parts[-1]
                here = sum(sizes[: last.file]) + last.position
                advance(bar, here - position, f"{self.tokens:,} tokens, {rate:,.0f} tokens/s")
                position = here
                if now - saved >= SAVE_SECONDS:
                    self._output.save(self._state())
                    saved = now
        self._output.save(self._state(), complete=True)
        return rate

    def _encoded(self, job: EncodeJob, workers: int) -> Iterator[tuple[_Batch, Encoded]]:
        batches = self._batches(job)
        if workers == 1:
            encoder = encoder_of(job)
            yield from ((batch, encoder(batch.records)) for batch in batches)
            return
        # Processes get only the records; the batch keeps their places.
        waiting: list[_Batch] = []

        def records():
            for batch in batches:
                waiting.append(batch)
                yield batch.records

        for _, encoded in process_map(encode_in_process, records(), workers, start_process, (job,)):
            yield waiting.pop(0), encoded

    def _batches(self, job: EncodeJob) -> Iterator[_Batch]:
        batch = _Batch()
        for number in range(self._file, len(self._files)):
            done = self._record if number == self._file else 0
            part = _Part(number, done, 0, 0, False)
            batch.parts.append(part)
            records = read_records(self._files[number], job.key, complete=job.chat is not None)
            for record in islice(records, done, None):
                if batch.is_full():
                    yield batch
                    part = _Part(number, part.first + part.count, 0, part.position, False)
                    batch = _Batch(parts=[part])
                batch.records.append(record)
                batch.size += len(record.raw) if isinstance(record.raw, (bytes, str)) else 0
                part.count, part.position = part.count + 1, record.position
            part.position, part.ends_file = self._files[number].stat().st_size, True
            if batch.is_full():
                yield batch
                batch = _Batch()
        if batch.parts:
            yield batch

    def _take(self, batch: _Batch, encoded: Encoded) -> None:
        """Write the documents of a batch and update the state."""
        bad, empty = dict(encoded.bad), set(encoded.empty)
        differences = dict(encoded.differences)
        start = 0
        for part in batch.parts:
            path = self._files[part.file]
            places = range(start, start + part.count)
            start += part.count
            reasons = [(batch.records[i].number, bad[i]) for i in places if i in bad]
            for number, reason in reasons:
                self._reject(path, number, reason)
            for i in places:
                if i in differences and len(self.differences) < _MAX_SHOWN:
                    place = place_of(path, batch.records[i].number)
                    self.differences.append((place, differences[i]))
            self._found += part.count - len(reasons) - sum(i in empty for i in places)
            self._file, self._record = part.file, part.first + part.count
            if part.ends_file:
                self.files += bool(self._found)
                if not self._found and not reasons:
                    self._skip(printable(path), SKIP_EMPTY)
                self._file, self._record, self._found = part.file + 1, 0, 0
        self._write(encoded)
        self.tokens += len(encoded.ids)
        self.counts.update(encoded.counts)

    def _reject(self, path: Path, number: int, reason: str) -> None:
        """Stop at a record that could not be read, or skip it."""
        place = place_of(path, number)
        if self._bad == STOP and not (number == 0 and is_whole_text(path)):
            raise UsageError(f"{place}: {reason}. To skip such lines give --bad-lines {SKIP}.")
        self._skip(place, reason)

    def _write(self, encoded: Encoded) -> None:
        """Append each document to its dataset, in order."""
        which = numpy.searchsorted(self._split_at, encoded.lengths, side="right")
        which[encoded.held_out] = len(self._buckets)
        owner = numpy.repeat(which, encoded.lengths)
        for number in numpy.unique(which):
            name = VALIDATION if number == len(self._buckets) else self._buckets[number]
            ids = encoded.ids[owner == number]
            lengths = encoded.lengths[which == number]
            self._output.append(name, ids, lengths)
            if encoded.loss is not None:
                self._output.append(loss_name(name), encoded.loss[owner == number], lengths)

    def _skip(self, place: str, reason: str) -> None:
        self.num_skipped += 1
        if len(self.skipped) < _MAX_SHOWN:
            self.skipped.append((place, reason))
        self._output.note_skipped(f"{place}: {reason}")


def _task(job: EncodeJob, files: Sequence[Path], split_at: Sequence[int]) -> dict:
    """Everything that determines the output; a run with another value cannot resume this one."""
    stats = [(str(path.absolute()), path.stat()) for path in files]
    listing = json.dumps([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])
    return {
        "files": _digest(listing),
        "tokenizer": _digest(job.tokenizer),
        "end token": job.end_id,
        "--json-key": job.key,
        "--split-at": list(split_at),
        "--validation-share": job.validation_share,
        **({} if job.chat is None else _chat_task(job.chat)),
    }


def _chat_task(chat: ChatJob) -> dict:
    return {
        "--chat": True,
        "--loss-on": chat.loss_on,
        "--context": chat.context,
        "--date": chat.date,
        "chat template": _digest(chat.template or ""),
    }


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _publish(
    output: ResumableDatasets, prefix: Path, names: Sequence[str], tokenizer: TextTokenizer
) -> Summary:
    """Rename the finished datasets, and write PREFIX.json."""
    state = output.state
    lengths = {name: output.lengths(name) for name in names}
    everything = numpy.concatenate(list(lengths.values()))
    if not len(everything):
        first = state["skipped"][0]
        raise _NothingFound(f"The input files contain no document, e.g. {first[0]}: {first[1]}.")
    published, outputs = output.publish()
    published = [name for name in published if name in lengths]  # without the loss weights
    summary = Summary(
        files=state["files"],
        documents=len(everything),
        tokens=state["tokens"],
        skipped=[tuple(item) for item in state["skipped"]],
        num_skipped=state["num_skipped"],
        datasets={
            str(dataset_prefix(prefix, name)): (len(lengths[name]), int(lengths[name].sum()))
            for name in published
        },
        histogram=Histogram.of(everything),
        counts=state.get("counts", {}),
        differences=[tuple(item) for item in state.get("differences", [])],
    )
    for path in former_outputs(prefix, outputs):
        path.resolve().unlink()
    record = _record(summary, prefix, published, outputs, tokenizer)
    write_file(output_of(prefix, SUMMARY), json.dumps(record, indent=1) + "\n")
    return summary


def _record(
    summary: Summary,
    prefix: Path,
    published: Sequence[str],
    outputs: dict[str, dict],
    tokenizer: TextTokenizer,
) -> dict:
    """The content of PREFIX.json."""
    histogram = summary.histogram
    counts = [summary.datasets[str(dataset_prefix(prefix, name))] for name in published]
    return {
        MADE_BY: TOKENIZE,
        "version": VERSION,
        "files": summary.files,
        "documents": summary.documents,
        "tokens": summary.tokens,
        # By dataset name; '' without a split.
        "datasets": {
            name: {"documents": documents, "tokens": tokens}
            for name, (documents, tokens) in zip(published, counts)
        },
        # By file name without PREFIX.
        "outputs": outputs,
        "share_of_tokens_in_documents_over_32k": histogram.long_share,
        "lengths": {
            "from": list(histogram.edges[:-1]),
            "documents": list(histogram.documents),
            "tokens": list(histogram.tokens),
        },
        "vocab_size": tokenizer.vocab_size,
        "end_token": tokenizer.end_token,
        "end_id": tokenizer.end_id,
        **({"chat": summary.counts} if summary.counts else {}),
        "num_skipped": summary.num_skipped,
        "skipped": [f"{place}: {reason}" for place, reason in summary.skipped],
    }


def _with_remedy(error: BaseException, output: ResumableDatasets) -> BaseException:
    """The error with a hint that finished work is kept."""
    kept = f" Finished work is kept in {output.directory}: the same command resumes from there."
    sentence = as_os_sentence(error, output.directory.parent)
    if sentence is not None:
        return UsageError(sentence + (kept if output.saved else ""))
    if isinstance(error, UsageError) and output.saved and output.directory.exists():
        return UsageError(f"{error}{kept}")
    return error
