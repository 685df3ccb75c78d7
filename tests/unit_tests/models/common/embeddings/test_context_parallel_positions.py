# Copyright (c) 2026, the megatron-core gptoss authors.

"""Rotary positions of a context-parallel rank, against transformers' rotation of the sequence.

Every rank of cp 1 to 8 in one process: RoPE asks its group for size and rank only.
"""

from dataclasses import dataclass

import pytest
import torch
from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding, apply_rotary_pos_emb

from megatron.core.models.common.embeddings import rope_utils
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding
from megatron.core.transformer.sink_attention.packed import PackedSequence
from megatron.core.transformer.transformer_config import TransformerConfig

LENGTH, HEADS, HEAD_DIM, ORIGINAL = 96, 3, 64, 32
# Chunks are 6 long at cp 8. Documents of one token, of none, over several chunks, and past
# ORIGINAL.
DOCUMENTS = (0, 1, 12, 13, 13, 31, 77, 95, 96, 96)


@dataclass
class Group:
    """The attributes of a process group that RoPE uses."""

    cp_size: int
    cp_rank: int

    def size(self):
        return self.cp_size

    def rank(self):
        return self.cp_rank


def own_tokens(size, rank):
    """Megatron's zigzag: the first and the last chunk on rank 0, and so on inwards."""
    chunks = torch.arange(LENGTH).view(2 * size, -1)
    return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]])


def rotated_by_transformers(x, positions):
    """x [t, heads, head_dim] turned to `positions` [t]."""
    rope = dict(
        rope_type="yarn",
        rope_theta=150000.0,
        factor=32.0,
        original_max_position_embeddings=ORIGINAL,
        truncate=False,
    )
    config = GptOssConfig(
        head_dim=HEAD_DIM, max_position_embeddings=32 * ORIGINAL, rope_parameters=rope
    )
    cos, sin = GptOssRotaryEmbedding(config)(x, positions[None])
    return apply_rotary_pos_emb(x[None], x[None], cos, sin, unsqueeze_dim=2)[0][0]


def yarn(group):
    return YarnRotaryEmbedding(
        HEAD_DIM,
        rotary_base=150000.0,
        use_cpu_initialization=True,
        scaling_factor=32.0,
        original_max_position_embeddings=ORIGINAL,
        correction_range_round_to_int=False,
        cp_group=group,
    )


def config():
    return TransformerConfig(
        num_layers=1,
        hidden_size=HEADS * HEAD_DIM,
        num_attention_heads=HEADS,
        apply_rope_fusion=False,
    )


RANKS = [(size, rank) for size in (1, 2, 4, 8) for rank in sorted({0, size // 2, size - 1})]
ranks = pytest.mark.parametrize("size, rank", RANKS, ids=[f"cp{s}-rank{r}" for s, r in RANKS])


@ranks
def test_dense(size, rank):
    """Regression: the table of a rank was created with torch.cuda on every device."""
    group, mine = Group(size, rank), own_tokens(size, rank)
    x = torch.randn(LENGTH, HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(1))
    table, mscale = yarn(group)(LENGTH)
    got = rope_utils.apply_rotary_pos_emb(
        x[mine].unsqueeze(1), table, config(), mscale=mscale, cp_group=group
    )
    expected = rotated_by_transformers(x, torch.arange(LENGTH))[mine]
    torch.testing.assert_close(got.squeeze(1), expected, rtol=0, atol=2e-5)


@ranks
@pytest.mark.parametrize("run_on", [False, True], ids=["restart", "run-on"])
def test_packed(size, rank, run_on):
    """Upstream splits each document over the ranks and needs lengths that 2 * cp divides."""
    group, mine = Group(size, rank), own_tokens(size, rank)
    x = torch.randn(LENGTH, HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(2))
    cu_seqlens = torch.tensor(DOCUMENTS, dtype=torch.int32)
    params = PackedSequence.of(cu_seqlens, LENGTH, max_seqlen=46, run_on=run_on)
    table, mscale = yarn(group)(params.max_seqlen_q, packed_seq=True)
    got = rope_utils.apply_rotary_pos_emb(
        x[mine],
        params.rotary_rows(table, group),
        config(),
        cu_seqlens=cu_seqlens,
        mscale=mscale,
        cp_group=group,
    )
    places = torch.cat([torch.arange(b - a) for a, b in zip(DOCUMENTS, DOCUMENTS[1:])])
    if run_on:
        places = torch.arange(LENGTH)
    torch.testing.assert_close(got, rotated_by_transformers(x, places)[mine], rtol=0, atol=2e-5)


def test_few_table_sizes():
    """The longest document differs from batch to batch; the tables that RoPE keeps do not."""
    cu_seqlens = torch.tensor([0, 96], dtype=torch.int32)
    bounds = {n: PackedSequence.of(cu_seqlens, 96, n).max_seqlen_q for n in range(1, 97)}
    assert all(bound >= n for n, bound in bounds.items())
    assert sorted(set(bounds.values())) == [1, 2, 4, 8, 16, 32, 64, 96]
    assert PackedSequence.of(cu_seqlens, 96).max_seqlen_q == 96


def test_length_refused():
    params = PackedSequence.of(torch.tensor([0, 90], dtype=torch.int32), 90)
    with pytest.raises(ValueError, match="length 90 is not a multiple of .* = 4"):
        params.positions(Group(2, 0))
