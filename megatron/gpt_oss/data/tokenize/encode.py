# Copyright (c) 2026, the megatron-core gptoss authors.

"""Tokenize records, in the worker processes of `gptoss tokenize`.

Does not import torch or Megatron, so that a process starts in a fraction of a second.
"""

import hashlib
import os
from dataclasses import dataclass, field

import numpy
from tokenizers import Tokenizer

from megatron.gpt_oss.data.tokenize.documents import BadDocument, Record, text_of


@dataclass(frozen=True)
class EncodeJob:
    """Parameters of tokenization; sent once to each process.

    Attributes:
        tokenizer: JSON of a `tokenizers.Tokenizer`.
        end_id: appended to each document.
        dtype: numpy dtype name of the ids.
        key: field that holds the text.
        validation_share: fraction of held-out documents, 0 to 1; a hash of the text selects them.
    """

    tokenizer: str
    end_id: int
    dtype: str
    key: str
    validation_share: float = 0.0


@dataclass
class Encoded:
    """The documents of a batch of records, in order.

    Attributes:
        ids: [tokens], concatenated documents.
        lengths: [documents] int32, including the end-of-document token.
        held_out: [documents] bool.
        empty: indices in the batch of the records without text.
        bad: (index in the batch, reason) of each record that could not be read.
    """

    ids: numpy.ndarray
    lengths: numpy.ndarray
    held_out: numpy.ndarray
    empty: list[int] = field(default_factory=list)
    bad: list[tuple[int, str]] = field(default_factory=list)


class Encoder:
    """Tokenizes batches of records."""

    def __init__(self, job: EncodeJob):
        self._job = job
        self._tokenizer = Tokenizer.from_str(job.tokenizer)
        self._tokenizer.encode_special_tokens = True  # '<|endoftext|>' in a text is plain text
        self._threshold = int(job.validation_share * 2**64)

    def __call__(self, records: list[Record]) -> Encoded:
        texts, empty, bad = [], [], []
        for place, record in enumerate(records):
            try:
                text = text_of(record, self._job.key)
            except BadDocument as error:
                bad.append((place, str(error)))
                continue
            if text.strip():
                texts.append(text)
            else:
                empty.append(place)
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        lengths = numpy.array([len(e.ids) + 1 for e in encodings], dtype=numpy.int32)
        ids = numpy.empty(int(lengths.sum()), dtype=self._job.dtype)
        end = 0
        for encoding in encodings:
            start, end = end, end + len(encoding.ids) + 1
            ids[start : end - 1] = encoding.ids
            ids[end - 1] = self._job.end_id
        held_out = numpy.array([self._is_held_out(text) for text in texts], dtype=bool)
        return Encoded(ids, lengths, held_out, empty, bad)

    def _is_held_out(self, text: str) -> bool:
        """Select by a hash of the text: independent of file order and equal for duplicates."""
        if not self._threshold:
            return False
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") < self._threshold


_encoder: Encoder | None = None


def start_process(job: EncodeJob) -> None:
    """Initialize a worker process, without tokenizer threads: there is one process per core."""
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _encoder = Encoder(job)


def encode_in_process(records: list[Record]) -> Encoded:
    """Tokenize in a process that `start_process` initialized."""
    return _encoder(records)
