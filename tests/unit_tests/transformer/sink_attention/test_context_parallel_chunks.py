# Copyright (c) 2026, the megatron-core gptoss authors.

"""Layout, chunk pairs and their kernels in one process."""

import dataclasses

import pytest
import torch

from megatron.core.transformer.sink_attention import measured_order, registry
from megatron.core.transformer.sink_attention.attention_params import (
    CAUSAL,
    NO_MASK,
    AttentionParams,
)
from megatron.core.transformer.sink_attention.backends import flex
from megatron.core.transformer.sink_attention.context_parallel import (
    choose,
    chunk_length,
    chunk_ranges,
    from_zigzag,
    global_positions,
    to_zigzag,
)
from megatron.core.transformer.sink_attention.context_parallel.choose import SCHEMES, halo_size
from megatron.core.transformer.sink_attention.context_parallel.chunk_attention import (
    ChunkAttention,
    ChunkPair,
    apply_sinks_,
    bounds_within,
    merge_,
)
from megatron.core.transformer.sink_attention.context_parallel.halo import (
    halo_segments,
    halo_tokens,
)
from megatron.core.transformer.sink_attention.context_parallel.ulysses import kv_copies
from megatron.core.transformer.sink_attention.registry import BACKENDS
from megatron.core.transformer.sink_attention.rescale import sink_gradient
from tests.harness.attention_reference import Example
from tests.harness.compare import relative_error
from tests.harness.stub_kernels import stub

NAMES = ("out", "dq", "dk", "dv", "dsink")


def test_zigzag():
    """Rank r holds chunks r and 2*cp-1-r; as Megatron's get_batch_on_this_cp_rank cuts a batch."""
    x = torch.arange(24).view(1, 24)
    assert chunk_ranges(1, 4, 24) == ((3, 6), (18, 21))
    for cp in (1, 2, 4, 12):
        chunks = x.view(1, 2 * cp, -1)
        megatron = [chunks[:, [r, 2 * cp - 1 - r]].flatten(1) for r in range(cp)]
        if cp == 1:
            megatron = [x]
        assert torch.equal(to_zigzag(x, cp, dim=1), torch.cat(megatron, dim=1))
        assert torch.equal(from_zigzag(torch.cat(megatron, dim=1), cp, dim=1), x)
        for rank, expected in enumerate(megatron):
            assert torch.equal(global_positions(rank, cp, 24), expected[0])


def test_length_that_cannot_be_cut():
    with pytest.raises(ValueError, match=r"8190 is not a multiple of 2 \* .* = 8. Pad it to 8192"):
        chunk_length(8190, 4)
    assert chunk_length(7, 1) == 7


def test_bounds_within():
    """Against counting the tokens of each document one by one; empty ones and cut ones too."""
    cu = (0, 3, 3, 10, 11, 24)
    for ranges in (((0, 24),), ((2, 5), (10, 12)), ((3, 3),), ((11, 14), (20, 24))):
        document = torch.bucketize(torch.arange(24), torch.tensor(cu[1:]), right=True)
        held = torch.cat([document[a:b] for a, b in ranges])
        counts = torch.bincount(held, minlength=5)
        bounds = bounds_within(torch.tensor(cu, dtype=torch.int32), ranges)
        assert bounds.dtype == torch.int32
        assert bounds.tolist() == [0, *counts.cumsum(0).tolist()]


@pytest.mark.parametrize("cp, tokens, window", [(2, 16, 3), (4, 16, 1), (4, 16, 9), (3, 24, 24)])
def test_halo_segments(cp, tokens, window):
    """The tokens that they name are the window-1 before each chunk, and no others."""
    for rank in range(cp):
        received = 0
        for (start, _), halo in zip(
            chunk_ranges(rank, cp, tokens), halo_segments(rank, cp, tokens, window - 1)
        ):
            named = [
                position
                for s in halo
                for position in global_positions(s.owner, cp, tokens)[s.rows].tolist()
            ]
            assert named == list(range(max(0, start - window + 1), start))
            received += sum(s.end - s.start for s in halo if s.owner != rank)
        assert received == halo_tokens(rank, cp, tokens, window - 1)


def test_when_a_halo_is_enough():
    """A window always; of packs, documents that are not longer than a chunk."""
    q, cu = torch.empty(1024, 1, 1, 8), torch.tensor([0, 4096], dtype=torch.int32)

    def size(window, max_seqlen, packed=False, by_documents=True):
        lengths = dict(max_seqlen_q=max_seqlen, max_seqlen_k=max_seqlen)
        documents = dict(cu_seqlens_q=cu, cu_seqlens_k=cu) if packed else {}
        options = dict(window_size=window, **lengths, **documents)
        return halo_size(AttentionParams.of(q, q, **options), by_documents, length=512)

    assert size((127, 0), 4096) == 127
    assert size((4095, 0), 4096) is None
    assert size(None, 512, packed=True) == 511
    assert size(None, 512, packed=True, by_documents=False) is None
    assert size(None, 513, packed=True) is None
    assert size(None, 512) is None
    assert size((899, 0), 300, packed=True) == 299


def test_auto_goes_by_the_table(monkeypatch, tmp_path):
    """By card and length on one machine, by the ranks over several, by heads for a2a."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(measured_order, "PATH", tmp_path / "table.json")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    measured_order.load.cache_clear()
    cuda = torch.device("cuda")
    try:
        assert choose.order(cuda, 8192, range(8, 16)) == [*choose.DEFAULT]
        rows = [
            {"min_seqlen": 0, "order": ["a2a", "all_gather", "p2p"]},
            {"min_seqlen": 50000, "order": ["p2p", "a2a", "all_gather"]},
        ]
        measured_order.write("sm90", {"context_parallel": rows}, {"torch": "x"})
        assert choose.order(cuda, 8192, range(8, 16))[0] == "a2a"
        assert choose.order(cuda, 131072, range(8))[0] == "p2p"
        assert choose.order(cuda, 131072, range(0, 16, 8)) == ["p2p"]
        assert choose.order(cuda, 131072, range(32))[0] == "a2a"
        assert choose.order(torch.device("cpu"), 131072, range(8)) == [*choose.DEFAULT]
    finally:
        measured_order.load.cache_clear()
    monkeypatch.setattr(choose, "order", lambda *arguments: ("a2a", "p2p"))
    for heads, groups, ranks, taken in (
        (64, 8, 8, "a2a"),
        (64, 8, 16, "p2p"),  # copies of key heads
        (64, 8, 32, "a2a"),
        (20, 4, 8, "p2p"),  # not divisible
    ):
        q, k = torch.empty(4, 1, heads, 8), torch.empty(4, 1, groups, 8)
        assert SCHEMES.select(q, k, range(ranks)).name == taken


def test_the_shipped_table():
    for card in measured_order.load()["cards"].values():
        rows = card["context_parallel"]
        assert rows[0]["min_seqlen"] == 0
        assert all(sorted(row["order"]) == sorted(choose.DEFAULT) for row in rows)


def test_kv_copies():
    """Copies for every rank to have its queries' keys, with equal groups on each."""
    for heads, groups, ranks in ((64, 8, 8), (64, 8, 4), (64, 8, 16), (64, 8, 64), (24, 3, 4)):
        copies = kv_copies(heads, groups, ranks)
        share = heads // ranks
        held = torch.arange(groups).repeat_interleave(copies).view(ranks, -1)
        group = share // held.shape[1]
        for rank in range(ranks):
            wanted = torch.arange(rank * share, (rank + 1) * share) // (heads // groups)
            assert torch.equal(held[rank].repeat_interleave(group), wanted)
    with pytest.raises(ValueError, match="6 query heads over 4 ranks.*'all_gather' or 'p2p'"):
        kv_copies(6, 3, 4)


# Chunk pairs of rank 1 of 4 among 32 tokens: its own, and keys of other ranks for each chunk.
CHUNKS = ((4, 8), (24, 28))
PAIRS = [
    (slice(0, 8), ChunkPair(CHUNKS, CHUNKS, causal=True)),
    (slice(0, 4), ChunkPair(CHUNKS[:1], ((0, 4),))),
    (slice(4, 8), ChunkPair(CHUNKS[1:], ((0, 4), (8, 24)))),
]
EXAMPLES = {
    "dense-B2": Example(tokens=32, batch=2, dim=16),
    "dense": Example(tokens=32, dim=16, scale=0.4),
    "packed": Example(cu=(0, 2, 3, 7, 25, 26, 32), dim=16),
    "packed-one": Example(cu=(0, 32), dim=16),
}


def positions(ranges):
    return torch.cat([torch.arange(*bounds) for bounds in ranges])


@pytest.fixture
def fresh_choice():
    """select_backend() caches its result."""
    yield
    registry._select.cache_clear()


@pytest.mark.parametrize("example", EXAMPLES)
@pytest.mark.parametrize("name", [n for n in BACKENDS if n != "flex"])
def test_kernels_on_chunk_pairs(name, example, monkeypatch, fresh_choice):
    """Rank 1's queries over its chunk pairs, with stubs of each backend's kernels.

    The stubs leave nan where a document has keys and no query, as a kernel may.
    """
    example = EXAMPLES[example]
    if name == "cudnn" and example.cu:
        pytest.skip("cudnn does not support packed sequences")
    q, k, v, sink, dout = example.tensors(torch.float32)
    rows = positions(CHUNKS)
    dout[[i for i in range(32) if i not in rows]] = 0
    expected = example.reference(q, k, v, sink, dout)
    expected[0], expected[1] = expected[0][rows], expected[1][rows]
    q, k, v, sink, dout = (x.detach() for x in (q[rows], k, v, sink, dout[rows]))
    backend = BACKENDS[name]
    monkeypatch.setattr(backend, "unsupported_reason", lambda params: None)
    registry._select.cache_clear()
    options = example.options()
    cu, length = options.get("cu_seqlens"), options.get("max_seqlen", 32)
    kernels = ChunkAttention(
        AttentionParams.of(
            q,
            k,
            softmax_scale=example.scale,
            cu_seqlens_q=cu,
            cu_seqlens_k=cu,
            max_seqlen_q=length,
            max_seqlen_k=length,
            backend=name,
        )
    )
    with stub(name, monkeypatch):
        for index, (part, pair) in enumerate(PAIRS):
            keys = positions(pair.keys)
            found = kernels.forward(q[part], k[keys], v[keys], pair)
            if index == 0:
                out, lse = (x.clone(memory_format=torch.contiguous_format) for x in found)
            else:
                merge_(out[part], lse[..., part], *found)
        apply_sinks_(out, lse, sink)
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for part, pair in PAIRS:
            keys = positions(pair.keys)
            tensors = (q[part], k[keys], v[keys], out[part], lse[..., part], dout[part])
            dq_i, dk_i, dv_i = kernels.backward(*tensors, pair)
            dq[part] += dq_i
            dk.index_add_(0, keys, dk_i)
            dv.index_add_(0, keys, dv_i)
    first = [x.transpose(0, 1) if x.dim() == 4 else x for x in (out, dout)]
    dsink = sink_gradient(first[0], lse, first[1], sink)
    for label, value, target in zip(NAMES, (out, dq, dk, dv, dsink), expected):
        limit = 6e-3 if value.dtype == torch.bfloat16 else 1e-5
        assert relative_error(value, target) < limit, label


@pytest.mark.parametrize("causal", [True, False])
def test_flex_backward(causal, monkeypatch):
    """dq, dk, dv of one of two parts of the keys, from the out and lse over both and a sink.

    FlexAttention has no backward on the CPU: its place is taken by a softmax.
    """

    def out_and_lse(q, k, v, params, flex):
        scores = params.softmax_scale * torch.einsum(
            "bqhd,bkhd->bhqk", q, k.repeat_interleave(4, 2)
        )
        if params.causal:
            scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
        out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v.repeat_interleave(4, 2))
        return out, scores.logsumexp(-1)

    monkeypatch.setattr(flex, "_out_and_lse", out_and_lse)
    monkeypatch.setattr(flex, "_flex", lambda: None)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    tensors = [normal(2, 5, 8, 6), normal(2, 5, 2, 6), normal(2, 5, 2, 6)]
    others = [normal(2, 5, 8, 1), normal(2, 5, 8, 6), normal(2, 5, 8, 6)]
    window_size = CAUSAL if causal else NO_MASK
    q = tensors[0].transpose(0, 1)
    params = AttentionParams.of(q, q, softmax_scale=0.5, window_size=window_size)
    out_i, lse_i = out_and_lse(*tensors, params, None)
    # The other part and the sink: a column of any score with any value.
    column, values, dout = others
    lse = torch.logaddexp(lse_i, column.squeeze(-1).transpose(1, 2))
    weight = (lse_i - lse).exp().transpose(1, 2).unsqueeze(-1)
    out = out_i * weight + values * (1 - weight)
    expected = torch.autograd.grad(out, tensors, dout)
    grads = BACKENDS["flex"].backward(*tensors, out.detach(), lse.detach(), dout.detach(), params)
    for value, target in zip(grads, expected):
        assert relative_error(value, target) < 1e-12
    unseen = torch.full_like(lse, -torch.inf).detach()
    grads = BACKENDS["flex"].backward(*tensors, out.detach(), unseen, dout.detach(), params)
    assert all(grad.eq(0).all() for grad in grads)


@pytest.mark.parametrize("causal", [True, False])
def test_flex_on_documents_of_other_lengths(causal):
    """Documents with fewer queries than keys, with no query, with no key; blocks of 128."""
    from torch.nn.attention.flex_attention import flex_attention

    cu_q, cu_k = (0, 5, 150, 150, 152, 200), (0, 9, 160, 290, 290, 350)
    generator = torch.Generator().manual_seed(0)
    shapes = [(200, 8, 16), (350, 2, 16), (350, 2, 16)]
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    bounds = [torch.tensor(cu, dtype=torch.int32) for cu in (cu_q, cu_k)]
    params = AttentionParams.of(
        *tensors[:2],
        softmax_scale=0.3,
        window_size=CAUSAL if causal else NO_MASK,
        cu_seqlens_q=bounds[0],
        cu_seqlens_k=bounds[1],
        max_seqlen_q=145,
        max_seqlen_k=151,
        same_lengths=False,
    )
    out, lse = flex._out_and_lse(*tensors, params, flex_attention)
    assert out[150:152].eq(0).all() and lse[:, 150:152].eq(-torch.inf).all()
    for a, b, c, d in zip(cu_q, cu_q[1:], cu_k, cu_k[1:]):
        q, k, v = (x.double() for x in (tensors[0][a:b], tensors[1][c:d], tensors[2][c:d]))
        scores = 0.3 * torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(4, 1))
        if causal:
            hidden = torch.ones(scores.shape[1:]).triu(d - c - (b - a) + 1).bool()
            scores = scores.masked_fill(hidden, -torch.inf)
        if a == b or c == d:
            continue
        expected = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v.repeat_interleave(4, 1))
        assert relative_error(out[a:b], expected) < 1e-6
        assert torch.allclose(lse[:, a:b].double(), scores.logsumexp(-1), atol=1e-5)


def test_full_chunk_pairs_of_cudnn(monkeypatch):
    """Fewer queries than keys: only without the causal mask."""
    params = AttentionParams(torch.device("cuda"), torch.bfloat16, 64, 8, 24, same_lengths=False)
    monkeypatch.setattr(AttentionParams, "capability", (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    reason = BACKENDS["cudnn"].unsupported_reason
    assert "fewer" in reason(params)
    params = dataclasses.replace(params, window_size=NO_MASK)
    assert reason(params) is None
    assert "one token" in reason(dataclasses.replace(params, num_tokens_q=1))
