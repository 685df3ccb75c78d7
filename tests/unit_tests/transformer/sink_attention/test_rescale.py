# Copyright (c) 2026, the megatron-core gptoss authors.

"""The pure functions of the sink, and their Triton kernels."""

import os

import pytest
import torch

from megatron.core.kernel_selection import import_problem
from megatron.core.transformer.sink_attention import rescale
from tests.harness.compare import relative_error

HAVE_TRITON = import_problem("triton") is None
if HAVE_TRITON:
    from megatron.core.transformer.sink_attention import rescale_triton

# The kernels run on the CPU too in Triton's interpreter: TRITON_INTERPRET=1 pytest ...
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
needs_triton = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not HAVE_TRITON or (DEVICE == "cpu" and not INTERPRETED),
        reason="needs triton and a CUDA device (or TRITON_INTERPRET=1)",
    ),
]


def softmax_parts(*lead, keys=9, seed=0):
    """out, lse of some scores and values, with everything that they came from, in float64."""
    generator = torch.Generator().manual_seed(seed)
    scores = 3 * torch.randn(*lead, keys, generator=generator, dtype=torch.float64)
    values = torch.randn(keys, 6, generator=generator, dtype=torch.float64)
    return scores, values, scores.softmax(-1) @ values, torch.logsumexp(scores, -1)


SINK = torch.tensor([-8.0, 0.0, 8.0], dtype=torch.float64)


@pytest.mark.parametrize("batch", [(), (2,)], ids=["packed", "dense"])
def test_apply_sink(batch):
    """[b, s, np, hn] with [b, np, s], and [t, np, hn] with [np, t]."""
    scores, values, out, lse = softmax_parts(*batch, 5, 3)
    column = SINK[:, None].expand(*batch, 5, 3, 1)
    whole = torch.cat([scores, column], -1)
    expected = whole.softmax(-1)[..., :-1] @ values
    new_out, new_lse = rescale.apply_sink(out, lse.transpose(-1, -2), SINK)
    assert torch.allclose(new_out, expected, atol=1e-14)
    assert torch.allclose(new_lse, torch.logsumexp(whole, -1).transpose(-1, -2), atol=1e-14)
    in_place = out.clone()
    again, lse_again = rescale.apply_sink_(in_place, lse.transpose(-1, -2), SINK)
    assert again is in_place and torch.equal(again, new_out) and torch.equal(lse_again, new_lse)


def test_sink_gradient(monkeypatch):
    """Against autograd through the softmax, over more tokens than one step takes."""
    monkeypatch.setattr(rescale, "_CHUNK", 4)
    scores, values, _, _ = softmax_parts(2, 11, 3)
    sink = SINK.clone().requires_grad_()
    whole = torch.cat([scores, sink[:, None].expand(2, 11, 3, 1)], -1)
    out, lse = whole.softmax(-1)[..., :-1] @ values, torch.logsumexp(whole, -1)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    (expected,) = torch.autograd.grad(out, sink, dout)
    value = rescale.sink_gradient(out.detach(), lse.detach().transpose(-1, -2), dout, SINK)
    assert torch.allclose(value, expected, atol=1e-13)


def test_rows_without_a_key():
    """lse of -inf: nothing but the sink, and no nan, not even with a sink of -inf."""
    out, lse = torch.zeros(4, 3, 6), torch.full((3, 4), -torch.inf)
    sink = torch.tensor([-torch.inf, 0.0, 8.0])
    new_out, new_lse = rescale.apply_sink(out, lse, sink)
    assert torch.equal(new_lse, sink[:, None].expand(3, 4))
    assert torch.equal(torch.nan_to_num(new_out, nan=1.0)[:, 1:], out[:, 1:])
    gradient = rescale.sink_gradient(out, new_lse, torch.ones_like(out), sink)
    assert gradient.eq(0).all()
    merged, merged_lse = rescale.merge_partial(out, lse, out, lse)
    assert torch.equal(merged, out) and torch.equal(merged_lse, lse)
    for column, expected in ((None, lse), (sink, sink[:, None].expand(3, 4))):
        out_a, lse_a = out.clone(), lse.clone()
        rescale.merge_partial_(out_a, lse_a, out, lse, column)
        assert torch.equal(out_a, out) and torch.equal(lse_a, expected)


def test_extreme_scores():
    """lse of +-1e4 with sinks of +-1e4: shares of 0, 1 and 1/2, without overflow."""
    lse = torch.tensor([[-1e4, 1e4], [-1e4, 1e4], [-1e4, 1e4]])
    sink = torch.tensor([-1e4, 0.0, 1e4])
    weight = rescale.sink_weight(lse, sink)
    assert torch.equal(weight, torch.tensor([[0.5, 1.0], [0.0, 1.0], [0.0, 0.5]]))
    assert rescale.merge_sink(lse, sink).isfinite().all()


def test_merge_partial():
    """Keys in three parts, one of them unseen by some rows; then the sink, once."""
    scores, values, out, lse = softmax_parts(5, 3)
    scores[2:4, :, 3:6] = -torch.inf
    expected_out, expected_lse = scores.softmax(-1) @ values, torch.logsumexp(scores, -1)
    merged = None
    for keys in (slice(0, 3), slice(3, 6), slice(6, 9)):
        part_lse = torch.logsumexp(scores[..., keys], -1)
        part_out = torch.nan_to_num(scores[..., keys].softmax(-1)) @ values[keys]
        part = part_out, part_lse.transpose(-1, -2)
        merged = part if merged is None else rescale.merge_partial(*merged, *part)
    assert torch.allclose(merged[0], expected_out, atol=1e-14)
    assert torch.allclose(merged[1], expected_lse.transpose(-1, -2), atol=1e-14)
    whole = torch.cat([scores, SINK[:, None].expand(5, 3, 1)], -1)
    with_sink, lse_with_sink = rescale.apply_sink(*merged, SINK)
    assert torch.allclose(with_sink, whole.softmax(-1)[..., :-1] @ values, atol=1e-14)
    parts = []
    for keys in (slice(0, 6), slice(6, 9)):
        part_lse = torch.logsumexp(scores[..., keys], -1)
        parts += [torch.nan_to_num(scores[..., keys].softmax(-1)) @ values[keys], part_lse.mT]
    for sink, target in ((None, merged), (SINK, (with_sink, lse_with_sink))):
        out, lse = parts[0].clone(), parts[1].contiguous()
        for rows in (slice(0, 2), slice(2, 5)):
            part = parts[2][rows], parts[3][..., rows]
            rescale.merge_partial_(out[rows], lse[..., rows], *part, sink)
        assert torch.allclose(out, target[0], atol=1e-14)
        assert torch.allclose(lse, target[1], atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(2, 67, 3, 16), (1, 129, 8, 96), (40, 4, 64)], ids=str)
@pytest.mark.parametrize("layout", ["sbhd", "bshd"])
class TestKernels:
    """The Triton kernels against the functions above, in float64."""

    pytestmark = needs_triton

    def tensors(self, shape, dtype, layout):
        generator = torch.Generator().manual_seed(2)
        out, dout = (torch.randn(shape, generator=generator).to(DEVICE, dtype) for _ in range(2))
        if layout == "sbhd" and len(shape) == 4:  # the memory of Megatron's layout
            out = out.transpose(0, 1).contiguous().transpose(0, 1)
        tokens, heads = shape[-3], shape[-2]
        lse = 5 * torch.randn(*shape[:-3], heads, tokens, generator=generator)
        lse[..., 0, 3:5] = -torch.inf
        lse[..., 1, 3:5] = 1e4
        sink = torch.linspace(-9, 9, heads)
        return out, dout, lse.to(DEVICE), sink.to(DEVICE)

    def test_apply(self, shape, dtype, layout):
        out, _, lse, sink = self.tensors(shape, dtype, layout)
        expected = rescale.apply_sink(out.double(), lse.double(), sink.double())
        merged = rescale_triton.apply_sink_(out, lse, sink)
        # The interpreter cuts bf16 off where the GPU rounds.
        limit = 1e-6 if dtype == torch.float32 else 2**-7 if INTERPRETED else 2**-8
        assert torch.allclose(out.double(), expected[0], rtol=limit, atol=limit * 1e-3)
        assert torch.allclose(merged.double(), expected[1], rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("sink_dtype", [torch.float32, torch.bfloat16])
    def test_gradient(self, shape, dtype, layout, sink_dtype):
        out, dout, lse, sink = self.tensors(shape, dtype, layout)
        sink = sink.to(sink_dtype)
        lse = rescale.merge_sink(lse, sink)
        exact = [x.double() for x in (out, lse, dout, sink)]
        expected = rescale.sink_gradient(*exact)
        value = rescale_triton.sink_gradient(out, lse, dout, sink)
        assert value.dtype == sink_dtype
        error = relative_error(value, expected)
        assert error < (1e-5 if sink_dtype == torch.float32 else 4e-3)

    @pytest.mark.parametrize("with_sink", [True, False])
    def test_merge(self, shape, dtype, layout, with_sink):
        """Into rows of a longer tensor."""
        out_a, out_b, lse, sink = self.tensors(shape, dtype, layout)
        lse_b = lse.flip(-2)
        lse_b[..., 0, 3] = -torch.inf
        longer = torch.zeros(*lse.shape[:-1], lse.shape[-1] + 5, device=DEVICE)
        lse_a = longer[..., 3:-2]
        lse_a.copy_(lse)
        exact = [x.double() for x in (out_a, lse, out_b, lse_b)]
        if with_sink:
            rescale.merge_partial_(*exact, sink.double())
        else:
            rescale.merge_partial_(*exact)
        rescale_triton.merge_partial_(out_a, lse_a, out_b, lse_b, sink if with_sink else None)
        # Weights are exp of differences of lse, which have fp32's error at their own size.
        limit = 1e-5 if dtype == torch.float32 else 2**-7 if INTERPRETED else 2**-8
        assert torch.allclose(out_a.double(), exact[0], rtol=limit, atol=limit * 1e-1)
        assert torch.allclose(lse_a.double(), exact[1], rtol=1e-6, atol=1e-6)
        assert longer[..., :3].eq(0).all() and longer[..., -2:].eq(0).all()


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu" or not HAVE_TRITON, reason="needs CUDA, triton")
def test_merge_has_no_race():
    """lse_a was once stored by warps that were done while others had yet to load it."""
    generator = torch.Generator(device="cuda").manual_seed(3)
    shape = (1, 8192, 64, 64)

    def normal(*size):
        return torch.randn(size, generator=generator, device="cuda")

    out_a, out_b = normal(*shape).bfloat16(), normal(*shape).bfloat16()
    lse_a, lse_b = normal(1, 64, 8192), normal(1, 64, 8192)
    exact = [x.double() for x in (out_a, lse_a, out_b, lse_b)]
    rescale.merge_partial_(*exact)
    for _ in range(5):
        out, lse = out_a.clone(), lse_a.clone()
        rescale_triton.merge_partial_(out, lse, out_b, lse_b, None)
        assert torch.allclose(out.double(), exact[0], rtol=2**-8, atol=1e-3)
        assert torch.allclose(lse.double(), exact[1], rtol=1e-5, atol=1e-5)
