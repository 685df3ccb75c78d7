# Copyright (c) 2026, the megatron-core gptoss authors.

"""Packed documents that context parallelism splits as one sequence.

TransformerEngine splits each document, whose length must be a multiple of 2 * cp. Here the 2 * cp
chunks are those of the complete sequence, and documents have any length: a rank may hold the end of
one document, several complete ones and the beginning of another.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.sink_attention.context_parallel import global_positions


@dataclass
class PackedSequence(PackedSeqParams):
    """Document boundaries of a packed sequence; make it with `PackedSequence.of`.

    A model with Megatron-Core's own attention takes it as `packed_seq_params`, at any context
    parallel size, with the same values on every rank and pipeline stage.
    """

    num_tokens: int | None = None  # of the complete sequence
    longest: int | None = None  # tokens of the longest document; max_seqlen_q is a bound of it
    run_on: bool = False  # positions continue from one document to the next

    @classmethod
    def of(
        cls,
        cu_seqlens: Tensor,
        num_tokens: int,
        max_seqlen: int | None = None,
        run_on: bool = False,
    ):
        """Describe documents in a sequence of `num_tokens`.

        Args:
            cu_seqlens: [documents + 1] int32, of the complete sequence; may end with copies of
                num_tokens, which are documents without tokens.
            num_tokens: tokens of the complete sequence, before it is split over ranks.
            max_seqlen: of the longest document, a Python int; num_tokens by default.
            run_on: count positions from the beginning of the sequence, not of each document.
                Rotary attention within documents is the same function, except for rounding.
        """
        longest = num_tokens if max_seqlen is None else max_seqlen
        # RotaryEmbedding caches a table for each bound: powers of 2 keep them few.
        bound = num_tokens if run_on else min(num_tokens, 1 << (longest - 1).bit_length())
        return cls(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=bound,
            max_seqlen_kv=bound,
            num_tokens=num_tokens,
            longest=longest,
            run_on=run_on,
        )

    def positions(self, cp_group: ProcessGroup | None = None) -> Tensor:
        """Position of each token of this rank in its document, or in the sequence with `run_on`.

        Returns:
            [num_tokens / cp] int64, on the device of cu_seqlens.
        """
        starts = self.cu_seqlens_q.long()
        rank, size = (0, 1) if cp_group is None else (cp_group.rank(), cp_group.size())
        tokens = global_positions(rank, size, self.num_tokens, starts.device)
        if self.run_on:
            return tokens
        return tokens - starts[torch.searchsorted(starts, tokens, right=True) - 1]

    def rotary_rows(self, table: Tensor | None, cp_group: ProcessGroup | None = None):
        """The rows of a rotary table for the tokens of this rank.

        Args:
            table: [max_seqlen_q, 1, 1, d]: the angles of each position.
        Returns:
            [num_tokens / cp, 1, d], for queries and keys [t, heads, d]; None for None.
        """
        return None if table is None else table[self.positions(cp_group), 0]
