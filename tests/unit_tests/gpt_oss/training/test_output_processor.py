# Copyright (c) 2026, the megatron-core gptoss authors.

"""GPTModel with the chunked loss: losses and gradients equal those of the loss from all logits."""

import pytest
import torch

from megatron.gpt_oss.arguments.parse import read
from megatron.gpt_oss.errors import UsageError
from megatron.gpt_oss.training.output_processor import chunked_loss_processor
from tests.harness.compare import relative_error
from tests.harness.models import ODD


def losses_and_gradients(model, options):
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(ODD.vocab_size, (2, 37), generator=generator)
    mask = (torch.rand(2, 37, generator=generator) > 0.2).float()
    positions = torch.arange(37).expand(2, -1)
    model.zero_grad()
    losses = model(ids, positions, None, labels=ids.roll(-1, 1), loss_mask=mask, **options)
    ((losses * mask).sum() / 3).backward()
    return losses.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_whole_model(make_model, tied):
    """Every parameter's gradient, the embedding's with tied weights included."""
    overrides = {"untie_embeddings_and_output_weights": False} if tied else {}
    model = make_model(ODD, seq_length=37, **overrides).train()
    expected_losses, expected = losses_and_gradients(model, {})
    options = {"output_processor": chunked_loss_processor(10)}
    losses, gradients = losses_and_gradients(model, options)
    assert torch.allclose(losses, expected_losses, rtol=1e-6, atol=1e-6)
    assert gradients.keys() == expected.keys()
    for name, value in gradients.items():
        error = relative_error(value, expected[name])
        assert error < 1e-5, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--lm-loss-chunk-size -1", "--lm-loss-chunk-size -1: expected tokens per chunk"),
        ("--lm-loss-chunk-size 8 --use-mup", "cannot be used with --use-mup"),
    ],
)
def test_refused(flags, message):
    with pytest.raises(UsageError, match=message):
        read(["--preset", "tiny", *flags.split()])
