# Copyright (c) 2026, the megatron-core gptoss authors.

"""The kernels of the chunked loss against float64; on a GPU also the loss as a whole."""

import os

import pytest
import torch

pytest.importorskip("triton")

from megatron.core.fusions.chunked_lm_loss import chunked_lm_loss, lm_loss_ref
from tests.harness.compare import relative_error

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# Without a GPU the kernels run in Triton's interpreter, which must be asked for before the import.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
kernels_run = pytest.mark.skipif(
    not (GPU or INTERPRETED), reason="needs a CUDA device, or TRITON_INTERPRET=1"
)
ROWS = 5


def example(width, dtype, scale=4.0):
    generator = torch.Generator().manual_seed(width)
    logits = (scale * torch.randn(ROWS, width, generator=generator)).to(dtype)
    labels = torch.tensor([0, width - 1, width // 2, -3, width + 4])
    weights = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0])
    return logits.to(DEVICE), labels.to(DEVICE), weights.to(DEVICE)


@kernels_run
@pytest.mark.gpu
@pytest.mark.parametrize("width", [7, 4096, 4097, 9000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels(width, dtype):
    """Labels at both ends and of other ranks, a token that does not count, -inf logits, odd widths."""
    from megatron.core.fusions.chunked_lm_loss_triton import row_statistics, to_gradient_

    logits, labels, weights = example(width, dtype)
    logits[2, : width // 2] = float("-inf")
    exact = logits.double()
    maximum, total, target = row_statistics(logits, labels)
    torch.testing.assert_close(maximum.double(), exact.amax(1), rtol=0, atol=0)
    lse = total.double().log() + maximum
    torch.testing.assert_close(lse, exact.logsumexp(1), rtol=1e-6, atol=1e-6)
    here = (labels >= 0) & (labels < width)
    picked = exact.gather(1, labels.where(here, 0)[:, None])[:, 0].where(here, 0)
    torch.testing.assert_close(target.double(), picked, rtol=0, atol=0)
    scale = 1.5 * weights
    expected = scale[:, None] * (exact - exact.logsumexp(1, keepdim=True)).exp()
    expected[here, labels[here]] -= weights[here].double()
    to_gradient_(logits, labels, exact.logsumexp(1).float(), scale, weights)
    error = relative_error(logits, expected)
    # The interpreter cuts bf16 off instead of rounding it.
    assert error < (1e-6 if dtype == torch.float32 else 2**-7 if INTERPRETED else 2**-8), error


@kernels_run
@pytest.mark.gpu
def test_nan_stays_in_its_row():
    from megatron.core.fusions.chunked_lm_loss_triton import row_statistics

    logits, labels, _ = example(9000, torch.float32)
    logits[1, 5000] = float("nan")
    _, total, _ = row_statistics(logits, labels)
    assert total.isnan().tolist() == [False, True, False, False, False]


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.bfloat16, 6e-3)])
@pytest.mark.parametrize("into_main_grad", [False, True])
def test_loss(dtype, limit, into_main_grad):
    """A real vocabulary, a short last chunk, a mask; against float64."""
    torch.manual_seed(0)
    tokens, hidden_size, vocab = 301, 64, 201088
    hidden = torch.randn(tokens, 1, hidden_size, device="cuda").to(dtype).requires_grad_()
    weight = torch.nn.Parameter((torch.randn(vocab, hidden_size, device="cuda") / 8).to(dtype))
    labels = torch.randint(vocab, (1, tokens), device="cuda")
    mask = (torch.rand(1, tokens, device="cuda") > 0.2).float()
    options, factor = {}, torch.tensor(0.01, device="cuda")
    if into_main_grad:
        weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)
        weight.grad_added_to_main_grad = False
        options["gradient_factor"] = factor
    losses = chunked_lm_loss(hidden, weight, labels, mask, chunk_size=128, **options)
    ((losses * mask).sum() * factor).backward()
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected = lm_loss_ref(*exact, labels)
    ((expected * mask).sum() * factor.double()).backward()
    dweight = weight.main_grad if into_main_grad else weight.grad
    for value, target in ((losses, expected), (hidden.grad, exact[0].grad)):
        error = relative_error(value, target)
        assert error < limit, error
    error = relative_error(dweight, exact[1].grad)
    assert error < limit, error
