# Copyright (c) 2026, the megatron-core gptoss authors.
"""How many samples a run takes from each corpus, reported before the first step."""

from dataclasses import dataclass

import numpy

from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.gpt_dataset import GPTDataset, MockGPTDataset
from megatron.gpt_oss.training.chat_dataset import DROP, ChatDataset


@dataclass(frozen=True)
class CorpusUse:
    """Use of one corpus by a training set.

    Attributes:
        path: path of the corpus, without extension.
        share: fraction of the training set's samples.
        documents, tokens: size of the corpus' training split.
        long_documents, long_tokens: documents longer than a sequence, and their tokens. They are
            split into several samples.
        epochs: passes through the corpus.
        cut_samples: fraction of the samples that start inside a document.
    """

    path: str
    share: float
    documents: int
    tokens: int
    long_documents: int
    long_tokens: int
    epochs: float
    cut_samples: float

    def line(self, name: str, seq_length: int) -> str:
        """For the console."""
        text = (
            f"data {name}: {100 * self.share:.1f} % of the samples, {self.documents:,} documents, "
            f"{self.tokens:,} tokens, {self.epochs:.2f} epochs; {100 * self.cut_samples:.0f} % of "
            "the samples start inside a document"
        )
        if self.long_documents:
            text += (
                f"; {self.long_documents:,} documents ({100 * self.long_tokens / self.tokens:.1f} "
                f"% of the tokens) exceed the sequence length of {seq_length:,} and are split"
            )
        return text


def corpus_uses(dataset: object, seq_length: int) -> list["CorpusUse | ChatUse"]:
    """Use of each corpus by a training set.

    Args:
        dataset: the training set of Megatron's builder, or None on ranks that do not build it.
        seq_length: tokens per sample.
    Returns:
        [] if the set does not consist of indexed datasets.
    """
    if isinstance(dataset, BlendedDataset):
        drawn = numpy.bincount(dataset.dataset_index, minlength=len(dataset.datasets))
        parts = list(zip(dataset.datasets, map(int, drawn)))
    elif isinstance(dataset, GPTDataset) and not isinstance(dataset, MockGPTDataset):
        parts = [(dataset, min(len(dataset), dataset.num_samples or len(dataset)))]
    else:
        return []
    total = max(1, sum(samples for _, samples in parts))
    return [
        _chat_use(part, samples, total)
        if isinstance(part, ChatDataset) and part.is_chat
        else _use(part, samples, total, seq_length)
        for part, samples in parts
    ]


@dataclass(frozen=True)
class ChatUse:
    """Use of one corpus of conversations by a training set.

    Attributes:
        path: path of the corpus, without extension.
        share: fraction of the training set's samples.
        conversations: size of the corpus' training split.
        overlong: those longer than a sequence.
        overlong_are: 'dropped' or 'cut'.
        fill: fraction of the positions that hold conversations; the others are padding.
    """

    path: str
    share: float
    conversations: int
    overlong: int
    overlong_are: str
    fill: float

    def line(self, name: str, seq_length: int) -> str:
        """For the console."""
        text = (
            f"data {name}: {100 * self.share:.1f} % of the samples, {self.conversations:,} "
            f"conversations, {100 * (1 - self.fill):.1f} % padding"
        )
        if self.overlong:
            text += (
                f"; {self.overlong:,} exceed the sequence length of {seq_length:,} and are "
                f"{self.overlong_are}"
            )
        return text


def _chat_use(dataset: ChatDataset, samples: int, total: int) -> ChatUse:
    return ChatUse(
        path=dataset.dataset_path,
        share=samples / total,
        conversations=len(dataset.indices),
        overlong=dataset.num_overlong,
        overlong_are="dropped" if dataset.config.overlong == DROP else "cut",
        fill=dataset.fill,
    )


def _use(dataset: GPTDataset, samples: int, total: int, seq_length: int) -> CorpusUse:
    lengths = dataset.dataset.sequence_lengths[dataset.indices]
    long = lengths[lengths > seq_length]
    tokens = int(lengths.sum(dtype=numpy.int64))
    # (document, offset) of each sample's first token; the last row is the end of the last sample.
    offsets = dataset.sample_index[:-1, 1]
    return CorpusUse(
        path=dataset.dataset_path,
        share=samples / total,
        documents=len(lengths),
        tokens=tokens,
        long_documents=len(long),
        long_tokens=int(long.sum(dtype=numpy.int64)),
        epochs=samples * seq_length / max(1, tokens),
        cut_samples=float(numpy.mean(offsets > 0)) if len(offsets) else 0.0,
    )
