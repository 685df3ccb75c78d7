# Copyright (c) 2026, the megatron-core gptoss authors.

"""The math backend against the definition, in float64 to its last digits, on the CPU."""

import pytest
import torch

from megatron.core.transformer.sink_attention import sink_attention
from megatron.core.transformer.sink_attention.attend import attend
from megatron.core.transformer.sink_attention.attention_params import AttentionParams
from megatron.core.transformer.sink_attention.backends.math import MathBackend, _Tiles
from tests.harness.attention_reference import (
    SMALL,
    Example,
    attention_ref,
    gradients,
    window_size,
)
from tests.harness.compare import relative_error

NAMES = ("out", "dq", "dk", "dv", "dsink")


@pytest.mark.parametrize("with_sink", [True, False], ids=["sink", "no-sink"])
@pytest.mark.parametrize("name", SMALL)
def test_float64(name, with_sink):
    example = SMALL[name]
    q, k, v, sink, dout = example.tensors(torch.float64)
    sink = sink if with_sink else None
    expected = example.reference(q, k, v, sink, dout)
    out = sink_attention(q, k, v, sink, **example.options())
    inputs = (q, k, v, sink) if with_sink else (q, k, v)
    values = [out, *gradients(out, inputs, dout)]
    assert out.dtype == torch.float64 and out.is_contiguous()
    for label, value, target in zip(NAMES, values, expected):
        # Without a sink, one_hot gradients are zero: then the rounding of dout is the measure.
        scale = target if target.norm() > 1e-6 else dout
        error = relative_error(value, target, scale)
        assert error < 1e-10, f"{label}: {error:.2e}"


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 2e-6), (torch.bfloat16, 6e-3)])
@pytest.mark.parametrize("name", ["T65-B2-W64-crossing", "packed-W8", "T40-bf16-sinks"])
def test_lower_precision(name, dtype, limit):
    """Computed in fp32 whatever comes in: the error is that of rounding inputs and outputs."""
    example = SMALL[name]
    q, k, v, sink, dout = example.tensors(dtype)
    out = sink_attention(q, k, v, sink, **example.options())
    values = [out, *gradients(out, (q, k, v, sink), dout)]
    assert [x.dtype for x in values] == [dtype] * 4 + [sink.dtype]
    for label, value, target in zip(NAMES, values, example.reference(q, k, v, sink, dout)):
        bound = 6e-3 if value.dtype == torch.bfloat16 else limit
        assert relative_error(value, target) < bound, label


def test_gradcheck():
    """Every input, two documents and a window: central differences of the output itself."""
    example = Example(cu=(0, 3, 7), heads=4, groups=2, dim=3, window=3, sinks=(-1.0, 2.0))
    q, k, v, sink, _ = example.tensors(torch.float64)
    options = example.options()
    assert torch.autograd.gradcheck(lambda *x: sink_attention(*x, **options), (q, k, v, sink))
    example = Example(tokens=4, batch=2, heads=2, groups=1, dim=3, scale=0.7)
    q, k, v, sink, _ = example.tensors(torch.float64)
    assert torch.autograd.gradcheck(
        lambda *x: sink_attention(*x, softmax_scale=0.7), (q, k, v, sink)
    )


def test_sink_is_no_constant():
    """A dropped sink hides behind sinks of 0 when there are many keys; here it moves the output."""
    example = SMALL["T33-large-sinks"]
    q, k, v, sink, _ = example.tensors(torch.float64)
    with_sink, without = sink_attention(q, k, v, sink), sink_attention(q, k, v)
    assert relative_error(with_sink, without) > 0.99
    zero = sink_attention(q, k, v, torch.zeros_like(sink))
    assert relative_error(zero[:1], without[:1]) > 0.1


def test_heads_of_tensor_parallel_ranks():
    """Two ranks with half of the heads and sinks each give what one rank gives with all."""
    example = Example(tokens=20, batch=2, heads=8, groups=4, dim=8)
    q, k, v, sink, dout = example.tensors(torch.float64)
    out = sink_attention(q, k, v, sink)
    whole = [out, *gradients(out, (q, k, v, sink), dout)]
    halves = []
    for rank in range(2):
        heads, groups = slice(4 * rank, 4 * rank + 4), slice(2 * rank, 2 * rank + 2)
        part = [q[:, :, heads], k[:, :, groups], v[:, :, groups], sink[heads]]
        part = [x.detach().requires_grad_() for x in part]
        out = sink_attention(*part)
        halves.append([out, *gradients(out, part, dout[:, :, heads])])
    for label, value, first, second in zip(NAMES, whole, *halves):
        joined = torch.cat([first, second], dim=0 if label == "dsink" else 2)
        assert torch.allclose(value, joined, atol=1e-13), label


def test_documents_are_separate_calls():
    """A pack is its documents one by one; the sink's gradient is the sum over them."""
    example = Example(cu=(0, 5, 6, 20), heads=4, groups=2, dim=8, window=4)
    q, k, v, sink, dout = example.tensors(torch.float64)
    out = sink_attention(q, k, v, sink, **example.options())
    packed = [out, *gradients(out, (q, k, v, sink), dout)]
    parts = []
    for first, last in zip(example.cu, example.cu[1:]):
        part = [x[first:last, None].detach().requires_grad_() for x in (q, k, v)]
        part.append(sink.detach().requires_grad_())
        out = sink_attention(*part, window_size=(3, 0))
        grads = gradients(out, part, dout[first:last, None])
        parts.append([out[:, 0], *(g[:, 0] for g in grads[:3]), grads[3]])
    for label, value, pieces in zip(NAMES, packed, zip(*parts)):
        joined = sum(pieces) if label == "dsink" else torch.cat(pieces)
        assert torch.allclose(value, joined, atol=1e-13), label


@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("with_sink", [True, False], ids=["sink", "no-sink"])
def test_fewer_queries_than_keys(window, with_sink):
    """Bottom-right: the last query at the last key; documents that have no key at all."""
    cu_q, cu_k = (0, 4, 6, 40, 45), (0, 9, 9, 43, 45)
    generator = torch.Generator().manual_seed(1)
    shapes = [(45, 4, 8), (45, 2, 8), (45, 2, 8), (4,)]
    q, k, v, sink = (
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in shapes
    )
    inputs = (q, k, v, sink) if with_sink else (q, k, v)
    lengths = [torch.tensor(cu, dtype=torch.int32) for cu in (cu_q, cu_k)]
    params = AttentionParams.of(
        q,
        k,
        window_size=window_size(window),
        cu_seqlens_q=lengths[0],
        cu_seqlens_k=lengths[1],
        max_seqlen_q=34,
        max_seqlen_k=34,
        same_lengths=False,
    )
    out = attend(q, k, v, sink if with_sink else None, params)
    expected = attention_ref(
        q, k, v, sink if with_sink else None, window=window, cu_q=cu_q, cu_k=cu_k
    )
    assert out[4:6].eq(0).all() and out[40:43].eq(0).all()  # no key: nothing but the sink
    dout = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    finite = [torch.nan_to_num(g) for g in gradients(expected, inputs, dout)]
    assert torch.allclose(out, torch.nan_to_num(expected), atol=1e-13)
    for label, value, target in zip(NAMES[1:], gradients(out, inputs, dout), finite):
        assert torch.allclose(value, target, atol=1e-12), label


def test_dense_with_a_cache():
    """Three new queries against ten keys."""
    example = Example(tokens=10, batch=2, heads=4, groups=2, dim=8)
    q, k, v, sink, _ = example.tensors(torch.float64)
    whole = sink_attention(q, k, v, sink, window_size=(5, 0))
    assert torch.allclose(
        sink_attention(q[-3:], k, v, sink, window_size=(5, 0)), whole[-3:], atol=1e-14
    )


def test_backward_needs_the_merged_lse():
    """The kernel's own lse in the backward, out corrected or not, is what must be noticed."""
    example = SMALL["packed-W8"]
    q, k, v, sink, dout = (x.detach() for x in example.tensors(torch.float64))
    cu = example.options()["cu_seqlens"]
    lengths = dict(cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=41, max_seqlen_k=41)
    params = AttentionParams.of(q, k, softmax_scale=0.25, window_size=(7, 0), **lengths)
    backend = MathBackend()
    plain_out, plain_lse = backend.forward(q, k, v, params)
    out, lse = backend.forward_with_sinks(q, k, v, sink, params)
    right = backend.backward(q, k, v, out, lse, dout, params)
    for wrong_out, wrong_lse in ((out, plain_lse), (plain_out, lse)):
        wrong = backend.backward(q, k, v, wrong_out, wrong_lse, dout, params)
        assert all(relative_error(a, b) > 0.1 for a, b in zip(wrong[:2], right[:2]))


def test_memory_is_linear():
    """No tile grows with the sequence."""
    q, k = torch.empty(100_000, 64, 8), torch.empty(100_000, 8, 8)
    cu = torch.tensor([0, 100_000])
    tiles = _Tiles(q, k, AttentionParams.of(q, k, cu_seqlens_q=cu, cu_seqlens_k=cu))
    assert tiles.side**2 * 64 <= 1 << 24


@pytest.mark.parametrize("window", [None, 5])
def test_nan_stays_in_its_document(window):
    """In query, key, value and the output's gradient of a token; also under tiles of many rows."""
    generator = torch.Generator().manual_seed(1)
    cu = torch.tensor([0, 4, 11, 11, 12, 30, 36], dtype=torch.int32)
    shapes = [(36, 4, 8), (36, 2, 8), (36, 2, 8), (36, 4, 8)]
    clean = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    sink = torch.randn(4, generator=generator, dtype=torch.float64)

    def run(q, k, v, dout):
        q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
        options = dict(cu_seqlens=cu, max_seqlen=18, window_size=window_size(window))
        out = sink_attention(q, k, v, sink, **options)
        return [out, *gradients(out, (q, k, v), dout)]

    expected = run(*clean)
    others = torch.ones(36, dtype=torch.bool)
    others[4:11] = False
    for which in range(4):
        spoilt = [x.clone() for x in clean]
        spoilt[which][6] = float("nan")
        for value, target in zip(run(*spoilt), expected):
            torch.testing.assert_close(value[others], target[others], rtol=0, atol=1e-13)


def test_tokens_after_the_last_document_see_nothing():
    """On a GPU the end of cu_seqlens is not checked; padding behind it must not spoil others."""
    example = Example(cu=(0, 5, 12), heads=4, groups=2, dim=8)
    q, k, v, sink, dout = example.tensors(torch.float64)
    cu = torch.tensor([0, 5, 9], dtype=torch.int32)
    params = AttentionParams.of(q, k, cu_seqlens_q=cu, cu_seqlens_k=cu)
    out = attend(q, k, v, sink, params)
    short = attend(q[:9], k[:9], v[:9], sink, params.with_tensors(q[:9], k[:9]))
    assert torch.equal(out[:9], short) and out[9:].eq(0).all()
