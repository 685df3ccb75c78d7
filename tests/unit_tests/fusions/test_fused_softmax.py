# Copyright (c) 2026, the megatron-core gptoss authors.

"""FusedScaleMaskSoftmax against the formula in float64: windows, masks, sinks, and the kernels.

[b, np, sq, sk] = micro batch, heads, queries, keys.
"""

import importlib.machinery
import sys
import types

import pytest
import torch

from megatron.core.fusions.fused_softmax import FusedScaleMaskSoftmax
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.utils import attention_mask_func

EXTENSIONS = (
    "scaled_softmax_cuda",
    "scaled_masked_softmax_cuda",
    "scaled_upper_triang_masked_softmax_cuda",
)


def softmax(window_size=None, causal=True, fusion=False, bf16=False):
    return FusedScaleMaskSoftmax(
        input_in_fp16=False,
        input_in_bf16=bf16,
        attn_mask_type=AttnMaskType.causal if causal else AttnMaskType.padding,
        scaled_masked_softmax_fusion=fusion,
        mask_func=attention_mask_func,
        softmax_in_fp32=True,
        scale=None,
        window_size=window_size,
    )


def visible(sq, sk, left, right):
    """Query i stands at key i + sk - sq; None is unbounded."""
    distance = torch.arange(sk) - (torch.arange(sq)[:, None] + sk - sq)
    seen = torch.ones(sq, sk, dtype=torch.bool)
    if left is not None:
        seen &= distance >= -left
    if right is not None:
        seen &= distance <= right
    return seen


def softmax_ref(scores, seen, sinks=None):
    """exp(score) over the visible keys, divided by their sum and exp(sink)."""
    scores = scores.double().masked_fill(~seen, float("-inf"))
    top = scores.amax(dim=-1, keepdim=True).clamp(min=-1e300)
    if sinks is not None:
        sinks = sinks.double().reshape(1, -1, 1, 1)
        top = torch.maximum(top, sinks)
    weights = (scores - top).exp()
    total = weights.sum(dim=-1, keepdim=True)
    if sinks is not None:
        total = total + (sinks - top).exp()
    return weights / total


def random_scores(b=2, heads=4, sq=13, sk=13, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(b, heads, sq, sk, generator=generator, dtype=torch.float64)


SINKS = torch.tensor([8.0, -8.0, 0.0, 2.0], dtype=torch.float64)


def two_documents(b, s, cuts):
    """Causal inside documents, True = hidden, [b, 1, s, s]; one cut a batch row."""
    document = torch.stack([(torch.arange(s) >= cut).long() for cut in cuts])
    same = document[:, :, None] == document[:, None, :]
    return ~(same & visible(s, s, None, 0))[:, None]


@pytest.mark.parametrize("sinks", [None, SINKS], ids=["vanilla", "sinks"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "padding"])
def test_window_and_mask(causal, sinks):
    """A layer with a window overwrote the mask of the caller."""
    scores = random_scores()
    mask = two_documents(2, 13, cuts=(6, 9))
    seen = visible(13, 13, 4, 0) & ~mask
    probs = softmax((4, 0), causal)(scores.clone(), mask.clone(), sinks)
    torch.testing.assert_close(probs, softmax_ref(scores, seen, sinks), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "window_size, causal, left, right",
    [
        ((-1, 0), True, None, 0),
        ((3, -1), True, 3, 0),
        ((-1, -1), True, None, 0),
        ((-1, -1), False, None, None),
        ((2, -1), False, 2, None),
        ((-1, 1), False, None, 1),
        ((3, 0), True, 3, 0),
        ((2, 1), False, 2, 1),
    ],
)
@pytest.mark.parametrize("sq, sk", [(13, 13), (3, 13)], ids=["13x13", "3x13"])
def test_unbounded_window(window_size, causal, left, right, sq, sk):
    """-1 hid every key in place of none."""
    scores = random_scores(sq=sq, sk=sk)
    probs = softmax(window_size, causal)(scores.clone(), None)
    seen = visible(sq, sk, left, right)
    torch.testing.assert_close(probs, softmax_ref(scores, seen), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("sinks", [None, SINKS - 30000], ids=["vanilla", "sinks"])
def test_low_scores(sinks):
    """Masked keys, filled with -10000, won over visible ones below that."""
    scores = random_scores() - 30000
    probs = softmax()(scores.clone(), None, sinks)
    seen = visible(13, 13, None, 0)
    # The scores keep 12 digits.
    torch.testing.assert_close(probs, softmax_ref(scores, seen, sinks), rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("sinks", [None, SINKS], ids=["vanilla", "sinks"])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp64", "bf16"])
def test_row_without_keys(sinks, bf16):
    """A row that sees nothing stays finite, forward and backward; a sink takes all of it."""
    scores = random_scores().to(torch.bfloat16 if bf16 else torch.float64).requires_grad_()
    mask = ~visible(13, 13, None, 0).expand(2, 1, 13, 13).clone()
    mask[1, :, 5] = True
    if sinks is not None:
        sinks = sinks.clone().requires_grad_()
    probs = softmax(bf16=bf16)(scores * 1, mask, sinks)
    probs.square().sum().backward()
    assert probs.isfinite().all() and scores.grad.isfinite().all()
    if sinks is not None:
        assert sinks.grad.isfinite().all() and not probs[1, :, 5].any()
    elsewhere = torch.ones(2, 1, 13, 13, dtype=torch.bool)
    elsewhere[1, :, 5] = False
    ref = softmax_ref(scores.detach(), ~mask, None if sinks is None else sinks.detach())
    tolerance = 2**-8 if bf16 else 1e-12
    difference = (probs.double() - ref).masked_fill(~elsewhere, 0)
    assert difference.abs().max() < tolerance


@pytest.mark.parametrize("sinks", [None, SINKS], ids=["vanilla", "sinks"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "padding"])
def test_fusion_without_kernels(causal, sinks):
    """masked_softmax_fusion needed the extension: even with sinks, which it cannot do."""
    assert not any(name in sys.modules for name in EXTENSIONS)
    scores = random_scores(sq=32, sk=32).bfloat16()
    seen = visible(32, 32, None, 0)
    probs = softmax(causal=causal, fusion=True, bf16=True)(scores.clone(), ~seen, sinks)
    assert probs.dtype == torch.bfloat16
    # The probabilities are rounded once, to 8 bits.
    torch.testing.assert_close(probs.double(), softmax_ref(scores, seen, sinks), rtol=2**-8, atol=0)


@pytest.fixture
def kernels(monkeypatch):
    """PyTorch functions of the extensions' meaning; the calls are counted."""
    from megatron.core.fusions import fused_softmax

    calls = []

    def forward(scores, scale):
        calls.append(scores.shape)
        seen = visible(*scores.shape[-2:], None, 0)
        return softmax_ref(scores * scale, seen).to(scores.dtype)

    for name in EXTENSIONS:
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.forward = forward
        module.get_batch_per_block = lambda sq, sk, b, heads: 1
        monkeypatch.setitem(sys.modules, name, module)
    looked_up = getattr(fused_softmax, "have_masked_softmax_kernels", None)
    if looked_up is not None:
        looked_up.cache_clear()
    yield calls
    if looked_up is not None:
        looked_up.cache_clear()


@pytest.mark.parametrize("window_size", [None, (7, 0)], ids=["full", "window"])
def test_window_with_kernels(window_size, kernels):
    """The kernels know no window: a layer that has one ignored it. Others still use them."""
    scores = random_scores(sq=32, sk=32).bfloat16()
    probs = softmax(window_size, fusion=True, bf16=True)(scores.clone(), None)
    seen = visible(32, 32, None if window_size is None else 7, 0)
    torch.testing.assert_close(probs.double(), softmax_ref(scores, seen), rtol=2**-8, atol=0)
    assert len(kernels) == (1 if window_size is None else 0)
