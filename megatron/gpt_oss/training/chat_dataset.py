# Copyright (c) 2026, the megatron-core gptoss authors.
"""Samples of --sft: packed conversations with loss weights, blended with pre-training corpora."""

from dataclasses import dataclass
from itertools import count, islice
from typing import Iterator

import numpy
import torch
from torch import Tensor

from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.gpt_oss.arguments.validate_data import REFUSE
from megatron.gpt_oss.data.chat.harmony import USER_TURN
from megatron.gpt_oss.data.indexed_dataset import LOSS, has_loss_weights
from megatron.gpt_oss.data.packing import best_fit

DROP, CUT = "drop", "cut-at-turn"


@dataclass
class ChatDatasetConfig(GPTDatasetConfig):
    """Megatron's configuration, and what to do with conversations longer than a sequence."""

    overlong: str = REFUSE


class ChatDataset(GPTDataset):
    """A corpus of a run with --sft.

    A corpus with loss weights (PREFIX.loss) holds conversations. A sample packs entire ones; each
    predicts the tokens after its first, so that n tokens take n - 1 positions. Each epoch has other
    packs, which depend only on the seed. A corpus without loss weights gives the samples of
    GPTDataset.

    Attributes:
        is_chat: the corpus holds conversations.
        num_overlong: conversations longer than a sequence, which are dropped or cut.
        fill: share of the positions that hold tokens of conversations.
    """

    def __init__(self, indexed_dataset: IndexedDataset, dataset_path: str, *args) -> None:
        self.is_chat = has_loss_weights(dataset_path)
        super().__init__(indexed_dataset, dataset_path, *args)
        self.masks_and_position_ids_are_cacheable &= not self.is_chat

    def _build_document_sample_shuffle_indices(self) -> tuple:
        """Called by GPTDataset; for conversations the packs take the place of its three indices."""
        if not self.is_chat:
            return super()._build_document_sample_shuffle_indices()
        self._weights = IndexedDataset(f"{self.dataset_path}.{LOSS}", mmap=True)
        lengths = self._kept_lengths()
        sizes = numpy.fromiter(lengths.values(), dtype=numpy.int64, count=len(lengths)) - 1
        self._documents, self._lengths = numpy.array(list(lengths), dtype=numpy.int64), lengths
        self._packs = self._pack(sizes)
        used = sum(int(sizes[pack].sum()) for pack in self._packs)
        self.fill = used / max(1, len(self._packs) * self.config.sequence_length)
        return None, None, None

    def _kept_lengths(self) -> dict[int, int]:
        """{conversation: number of its tokens that a sample has}.

        Raises:
            ValueError: a conversation is too long and --sft-overlong is refuse, or none is left.
        """
        longest = self.config.sequence_length + 1
        all_lengths = self.dataset.sequence_lengths[self.indices]
        too_long = self.indices[all_lengths > longest]
        self.num_overlong = len(too_long)
        if self.num_overlong and self.config.overlong == REFUSE:
            raise ValueError(
                f"{self.dataset_path} has {self.num_overlong:,} conversations of more than "
                f"{longest:,} tokens (the longest has {int(all_lengths.max()):,}). Give a longer "
                f"--seq-length, or --sft-overlong {DROP} or {CUT}."
            )
        fits = (all_lengths > 1) & (all_lengths <= longest)
        kept = dict(zip(self.indices[fits].tolist(), all_lengths[fits].tolist()))
        if self.config.overlong == CUT:
            cut = {int(number): self._cut_length(number, longest) for number in too_long}
            kept |= {number: length for number, length in cut.items() if length}
        if not kept:
            raise ValueError(
                f"{self.dataset_path} has no conversation of at most {longest:,} tokens. Give a "
                "longer --seq-length."
            )
        return kept

    def _cut_length(self, number: int, longest: int) -> int:
        """Tokens up to the last user message from which on the conversation is too long.

        0 if no token before it has loss.
        """
        size = min(longest + 2, int(self.dataset.sequence_lengths[number]))
        ids = self.dataset.get(number, length=size)  # with the two tokens of a turn at the end
        starts = numpy.flatnonzero((ids[:-1] == USER_TURN[0]) & (ids[1:] == USER_TURN[1]))
        if not len(starts):
            return 0
        has_loss = self._weights.get(number, length=int(starts[-1])).any()
        return int(starts[-1]) if has_loss else 0

    def _pack(self, sizes: numpy.ndarray) -> list[list[int]]:
        """The packs of as many epochs as `num_samples` needs; of one epoch if it is None."""
        packs = self._epochs(sizes)
        if self.num_samples is None:
            return next(packs)
        return list(islice((pack for epoch in packs for pack in epoch), self.num_samples))

    def _epochs(self, sizes: numpy.ndarray) -> Iterator[list[list[int]]]:
        for epoch in count():
            rng = numpy.random.default_rng([self.config.random_seed, epoch])
            yield best_fit(sizes, self.config.sequence_length, rng)

    def __len__(self) -> int:
        return len(self._packs) if self.is_chat else super().__len__()

    def __getitem__(self, index: int | None) -> dict[str, Tensor]:
        """A sample, with the keys of GPTDataset; None is a sample without loss."""
        if not self.is_chat:
            return super().__getitem__(index)
        length = self.config.sequence_length
        tokens, labels, positions = (torch.zeros(length, dtype=torch.long) for _ in range(3))
        weights, ends = torch.zeros(length), []
        end = 0
        for number in self._packs[index or 0]:
            document = int(self._documents[number])
            size = self._lengths[document]
            start, end = end, end + size - 1
            ids = torch.from_numpy(self.dataset.get(document, length=size).astype(numpy.int64))
            tokens[start:end], labels[start:end] = ids[:-1], ids[1:]
            found = self._weights.get(document, length=size)
            weights[start:end] = torch.from_numpy(found.astype(numpy.float32))[1:]
            positions[start:end] = torch.arange(end - start)
            ends.append(end)
        if end < length:  # the padding is one more document
            positions[end:] = torch.arange(length - end)
            ends.append(length)
        cu_seqlens = torch.full((length + 1,), length, dtype=torch.int32)
        cu_seqlens[: len(ends) + 1] = torch.tensor([0, *ends])
        return {
            "tokens": tokens,
            "labels": labels,
            "loss_mask": weights if index is not None else torch.zeros(length),
            "position_ids": positions,
            "cu_seqlens": cu_seqlens,
            "max_seqlen": cu_seqlens.diff().max(),
        }
