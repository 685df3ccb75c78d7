# Copyright (c) 2026, the megatron-core gptoss authors.

"""Tokenize records, in the worker processes of `gptoss tokenize`.

Does not import torch or Megatron, so that a process starts in a fraction of a second.
"""

import hashlib
import os
from dataclasses import dataclass, field
from typing import Callable

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
    chat: "ChatJob | None" = None


@dataclass(frozen=True)
class ChatJob:
    """Parameters of conversations.

    Attributes:
        loss_on: which messages have loss, one of `harmony.LOSS_ON`.
        context: most tokens of a conversation.
        date: of conversations that state none; may be None.
        template: chat template to compare with, or None.
        vocabulary: directory with harmony's vocabulary file.
    """

    loss_on: str
    context: int
    date: str | None = None
    template: str | None = None
    vocabulary: str = ""


@dataclass
class Encoded:
    """The documents of a batch of records, in order.

    Attributes:
        ids: [tokens], concatenated documents.
        lengths: [documents] int32, including the end-of-document token.
        held_out: [documents] bool.
        empty: indices in the batch of the records without text.
        bad: (index in the batch, reason) of each record that could not be read.
        loss: [tokens] float32, the loss weight of each token; None without conversations.
        counts: {name: number} of the summary of conversations.
        differences: (index in the batch, difference) of each conversation that the model's chat
            template renders differently.
    """

    ids: numpy.ndarray
    lengths: numpy.ndarray
    held_out: numpy.ndarray
    empty: list[int] = field(default_factory=list)
    bad: list[tuple[int, str]] = field(default_factory=list)
    loss: numpy.ndarray | None = None
    counts: dict[str, int] = field(default_factory=dict)
    differences: list[tuple[int, str]] = field(default_factory=list)


def is_held_out(text: str, share: float) -> bool:
    """Select by a hash of the text: independent of file order and equal for duplicates."""
    if not share:
        return False
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < int(share * 2**64)


class Encoder:
    """Tokenizes batches of records."""

    def __init__(self, job: EncodeJob):
        self._job = job
        self._tokenizer = Tokenizer.from_str(job.tokenizer)
        self._tokenizer.encode_special_tokens = True  # '<|endoftext|>' in a text is plain text

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
        share = self._job.validation_share
        held_out = numpy.array([is_held_out(text, share) for text in texts], dtype=bool)
        return Encoded(ids, lengths, held_out, empty, bad)


def encoder_of(job: EncodeJob) -> Callable[[list[Record]], Encoded]:
    """The encoder of a job: of texts, or of conversations."""
    if job.chat is None:
        return Encoder(job)
    from megatron.gpt_oss.data.chat.encode import ChatEncoder  # needs openai-harmony

    return ChatEncoder(job)


_encoder: Callable[[list[Record]], Encoded] | None = None


def start_process(job: EncodeJob) -> None:
    """Initialize a worker process, without tokenizer threads: there is one process per core."""
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _encoder = encoder_of(job)


def encode_in_process(records: list[Record]) -> Encoded:
    """Tokenize in a process that `start_process` initialized."""
    return _encoder(records)
