# Copyright (c) 2026, the megatron-core gptoss authors.

"""Document lengths: the buckets of --split-at, and the histogram of a corpus."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Sequence

import numpy

from megatron.gpt_oss.errors import UsageError

LONG = 32 * 1024  # tokens from which a document counts as long in the summary
VALIDATION = "valid"


def parse_lengths(words: str) -> tuple[int, ...]:
    """'8k,32k' -> (8192, 32768).

    Raises:
        UsageError: the lengths are not positive and increasing.
    """
    lengths = []
    for word in words.split(","):
        match = re.fullmatch(r"\s*(\d{1,12})(k?)\s*", word, re.IGNORECASE)
        if match is None:
            raise UsageError(
                f"--split-at {words}: invalid length '{word}'. Give for example 8k,32k."
            )
        lengths.append(int(match[1]) * (1024 if match[2] else 1))
    if lengths[0] < 1 or any(b <= a for a, b in zip(lengths, lengths[1:])):
        raise UsageError(f"--split-at {words}: the lengths must increase, as in --split-at 8k,32k.")
    return tuple(lengths)


def short_length(length: int) -> str:
    """8192 -> '8k'."""
    return f"{length // 1024}k" if length and length % 1024 == 0 else str(length)


def bucket_names(split_at: Sequence[int]) -> list[str]:
    """(8192, 32768) -> ['0-8k', '8k-32k', '32k-up']; [] without a split."""
    if not split_at:
        return []
    edges = [short_length(length) for length in (0, *split_at)]
    return [f"{a}-{b}" for a, b in zip(edges, edges[1:])] + [f"{edges[-1]}-up"]


@dataclass(frozen=True)
class Histogram:
    """Documents and their tokens by length.

    Attributes:
        edges: powers of two; bar i counts lengths from edges[i] up to below edges[i + 1].
        documents, tokens: number in each bar.
        long_tokens: tokens in documents of more than `LONG` tokens.
    """

    edges: tuple[int, ...]
    documents: tuple[int, ...]
    tokens: tuple[int, ...]
    long_tokens: int

    @classmethod
    def of(cls, lengths: numpy.ndarray) -> "Histogram":
        """The histogram of lengths, [documents] int."""
        longest = int(lengths.max()) if len(lengths) else 1
        edges = [1 << power for power in range(longest.bit_length() + 1)]
        bars = numpy.searchsorted(edges, lengths, side="right") - 1
        size = len(edges) - 1
        documents = numpy.bincount(bars, minlength=size)
        # bincount would sum in floats.
        tokens = [int(lengths[bars == bar].sum(dtype=numpy.int64)) for bar in range(size)]
        long_tokens = int(lengths[lengths > LONG].sum(dtype=numpy.int64))
        return cls(tuple(edges), tuple(map(int, documents)), tuple(tokens), long_tokens)

    @property
    def long_share(self) -> float:
        """Share of the tokens in documents of more than `LONG` tokens."""
        return self.long_tokens / max(1, sum(self.tokens))


def plot_histogram(histogram: Histogram, out: str | Path, title: str) -> Path:
    """Draw documents and tokens by length as a PNG.

    Raises:
        UsageError: matplotlib is not installed.
    """
    from megatron.gpt_oss.data.corpus_record import TOKENIZE
    from megatron.gpt_oss.training.metrics.plot import as_title, import_pyplot, save_plot

    pyplot = import_pyplot()
    figure, (above, below) = pyplot.subplots(
        2, 1, sharex=True, figsize=(8, 5), layout="constrained"
    )
    bars = range(len(histogram.documents))
    above.bar(bars, histogram.documents, width=0.9)
    above.set_ylabel("documents")
    total = max(1, sum(histogram.tokens))
    below.bar(bars, [100 * tokens / total for tokens in histogram.tokens], width=0.9, color="C1")
    below.set_ylabel("share of tokens (%)")
    below.set_xlabel("tokens per document, from")
    below.set_xticks(bars, [short_length(edge) for edge in histogram.edges[:-1]])
    above.set_title(
        f"{as_title(title)}: {sum(histogram.documents):,} documents, {sum(histogram.tokens):,} "
        f"tokens, {100 * histogram.long_share:.1f} % in documents over {short_length(LONG)}"
    )
    for axis in (above, below):
        axis.grid(axis="y", alpha=0.3)
    save_plot(figure, out, TOKENIZE)
    pyplot.close(figure)
    return Path(out)
