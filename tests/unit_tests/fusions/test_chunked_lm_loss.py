# Copyright (c) 2026, the megatron-core gptoss authors.

"""Losses and gradients of the chunked loss equal those of the loss from all logits."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron.core.fusions.chunked_lm_loss import chunked_lm_loss, lm_loss_ref
from tests.harness.triton_interpreter import run_in_interpreter

TOKENS, BATCH, HIDDEN, VOCAB = 22, 3, 12, 38


def example(dtype=torch.float64, scale=1.0, seed=1):
    """Hidden states, weight, labels at both ends of the vocabulary too, a mask with a gap."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(TOKENS, BATCH, HIDDEN, generator=generator, dtype=torch.float64)
    weight = scale * torch.randn(VOCAB, HIDDEN, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, VOCAB, (BATCH, TOKENS), generator=generator)
    labels[0, :4] = torch.tensor([0, VOCAB - 1, VOCAB // 2 - 1, VOCAB // 2])
    mask = torch.ones(BATCH, TOKENS, dtype=torch.float64)
    mask[1, 5:9] = 0
    return hidden.to(dtype), weight.to(dtype), labels, mask.to(dtype)


def with_gradients(function, hidden, weight, mask, factor=0.37):
    hidden, weight = (x.detach().clone().requires_grad_() for x in (hidden, weight))
    losses = function(hidden, weight)
    dhidden, dweight = torch.autograd.grad((losses * mask).sum() * factor, (hidden, weight))
    return losses.detach(), dhidden, dweight


def close(values, targets, limit):
    for name, value, target in zip(("losses", "dhidden", "dweight"), values, targets):
        error = ((value.double() - target.double()).norm() / target.double().norm()).item()
        assert error < limit, f"{name}: relative error {error:.1e}, limit {limit:.0e}"


@pytest.mark.parametrize("chunk_size", [1, 7, 66, 1000])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_exact(chunk_size, z_loss):
    """Odd chunks, one token a chunk, fewer tokens than a chunk; logits of +-60 too."""
    hidden, weight, labels, mask = example(scale=6.0)
    expected = with_gradients(lambda h, w: lm_loss_ref(h, w, labels, z_loss), hidden, weight, mask)
    options = dict(chunk_size=chunk_size, z_loss=z_loss)
    values = with_gradients(
        lambda h, w: chunked_lm_loss(h, w, labels, mask, **options), hidden, weight, mask
    )
    close(values, expected, 1e-12)


def test_backward_twice():
    """Gradients are scaled in place, so a second backward raises."""
    hidden, weight, labels, mask = example()
    loss = chunked_lm_loss(hidden.requires_grad_(), weight, labels, chunk_size=8).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="called twice"):
        loss.backward()


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-6), (torch.bfloat16, 1.5)])
def test_error(dtype, limit):
    """fp32 to 1e-6; bf16 no worse than 1.5 times all logits at once in bf16, on the same data."""
    hidden, weight, labels, mask = example(dtype)
    exact = with_gradients(
        lambda h, w: lm_loss_ref(h, w, labels), hidden.double(), weight.double(), mask.double()
    )
    values = with_gradients(
        lambda h, w: chunked_lm_loss(h, w, labels, mask, chunk_size=10), hidden, weight, mask
    )
    assert values[0].dtype == torch.float32 and values[2].dtype == dtype
    if dtype == torch.float32:
        return close(values, exact, limit)
    plain = with_gradients(lambda h, w: lm_loss_ref(h, w, labels), hidden, weight, mask)
    for value, base, target in zip(values, plain, exact):
        error, base_error = ((x.double() - target).norm() for x in (value, base))
        assert error <= limit * base_error


def test_only_what_is_needed():
    """Frozen weight, frozen hidden states, evaluation."""
    hidden, weight, labels, mask = example()
    expected = with_gradients(lambda h, w: lm_loss_ref(h, w, labels), hidden, weight, mask)
    hidden.requires_grad_()
    losses = chunked_lm_loss(hidden, weight, labels, mask, chunk_size=10)
    (dhidden,) = torch.autograd.grad((losses * mask).sum() * 0.37, hidden)
    close([losses.detach(), dhidden], expected, 1e-12)
    weight.requires_grad_()
    losses = chunked_lm_loss(hidden.detach(), weight, labels, mask, chunk_size=10)
    (dweight,) = torch.autograd.grad((losses * mask).sum() * 0.37, weight)
    close([dweight], expected[2:], 1e-12)
    with torch.no_grad():
        losses = chunked_lm_loss(hidden, weight, labels, mask, chunk_size=10)
    assert not losses.requires_grad
    close([losses], expected, 1e-12)


def test_never_all_logits(monkeypatch):
    """No tensor has more rows of the vocabulary than a chunk has tokens."""
    hidden, weight, labels, mask = example()
    hidden.requires_grad_()
    weight.requires_grad_()
    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.dim() and result.shape[-1] == VOCAB:
                largest.append(result.numel() // VOCAB)
            return result

    with Watch():
        loss = (chunked_lm_loss(hidden, weight, labels, mask, chunk_size=5) * mask).sum()
        loss.backward()
    assert max(largest) == max(5, HIDDEN)  # HIDDEN: the gradient of the weight, transposed


def test_gradient_that_is_no_multiple():
    """Masked twice with other masks: refused, since the weight's gradient is summed already."""
    hidden, weight, labels, mask = example()
    losses = chunked_lm_loss(hidden, weight.requires_grad_(), labels, mask, chunk_size=8)
    with pytest.raises(ValueError, match="not a multiple of loss_weights"):
        losses.sum().backward()
    losses = chunked_lm_loss(hidden, weight, labels, 0 * mask, chunk_size=8)
    (dweight,) = torch.autograd.grad((losses * 0 * mask).sum(), weight)
    assert dweight.eq(0).all()  # nothing counts: no division by zero


def with_main_grad(weight, labels, mask, hidden, given, used, chunk_size=10):
    """hidden's gradient and main_grad, which held 1 before."""
    hidden, weight = hidden.detach().clone().requires_grad_(), torch.nn.Parameter(weight.clone())
    weight.main_grad = torch.ones_like(weight, dtype=torch.float32)
    weight.grad_added_to_main_grad = False
    losses = chunked_lm_loss(
        hidden, weight, labels, mask, chunk_size=chunk_size, gradient_factor=torch.tensor(given)
    )
    ((losses * mask).sum() * used).backward()
    return losses.detach(), hidden.grad, weight


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_into_main_grad(dtype, limit):
    """The weight's gradient is added to main_grad, and the hook is informed."""
    hidden, weight, labels, mask = example(dtype)
    exact = with_gradients(
        lambda h, w: lm_loss_ref(h, w, labels), hidden.double(), weight.double(), mask.double()
    )
    losses, dhidden, weight = with_main_grad(weight, labels, mask, hidden, 0.37, 0.37)
    close([losses, dhidden, weight.main_grad - 1], exact, limit)
    assert weight.grad_added_to_main_grad


def test_into_main_grad_of_no_token():
    hidden, weight, labels, mask = example(torch.float32)
    _, dhidden, weight = with_main_grad(weight, labels, 0 * mask, hidden, 0.37, 0.37)
    assert dhidden.eq(0).all() and weight.main_grad.eq(1).all()


def test_another_factor_than_given():
    hidden, weight, labels, mask = example(torch.float32)
    with pytest.raises(ValueError, match="not gradient_factor times loss_weights"):
        with_main_grad(weight, labels, mask, hidden, 0.37, 0.3701)


def test_nan_reaches_the_gradient():
    """A loss that was made nan after the model: the optimizer must see it in some gradient."""
    hidden, weight, labels, mask = example(torch.float32)
    _, dhidden, _ = with_main_grad(weight, labels, mask, hidden, 0.37, float("nan"))
    assert dhidden.isnan().any()


def test_shared_weight_keeps_its_own_gradient():
    """With tied embeddings autograd brings more than this gradient: nothing is added ahead."""
    hidden, weight, labels, mask = example(torch.float32)
    weight = torch.nn.Parameter(weight)
    weight.main_grad = torch.zeros_like(weight)
    weight.grad_added_to_main_grad, weight.zero_out_wgrad = False, True
    factor = torch.tensor(0.37)
    losses = chunked_lm_loss(hidden, weight, labels, mask, chunk_size=9, gradient_factor=factor)
    ((losses * mask).sum() * 0.37).backward()
    expected = with_gradients(lambda h, w: lm_loss_ref(h, w, labels), hidden, weight, mask)
    close([weight.grad], expected[2:], 1e-6)
    assert weight.main_grad.eq(0).all() and not weight.grad_added_to_main_grad


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(labels=torch.zeros(BATCH, TOKENS - 1, dtype=torch.long)), "labels: .*66 tokens"),
        (dict(loss_weights=torch.ones(TOKENS, BATCH)), "loss_weights: "),
        (dict(chunk_size=0), "chunk_size: 0"),
    ],
)
def test_bad_arguments(change, message):
    hidden, weight, labels, mask = example()
    arguments = dict(labels=labels, loss_weights=mask, chunk_size=4, **{}) | change
    with pytest.raises(ValueError, match=message):
        chunked_lm_loss(hidden, weight, **arguments)


def test_kernels_in_interpreter():
    run_in_interpreter(Path(__file__).with_name("test_chunked_lm_loss_triton.py"))


def on_two_ranks(sequence_parallel):
    """This rank's results as unsharded tensors."""
    hidden, weight, labels, mask = example()
    rank, group = dist.get_rank(), dist.group.WORLD
    part = weight.chunk(2)[rank]
    local = hidden.chunk(2)[rank] if sequence_parallel else hidden
    options = dict(chunk_size=10, tp_group=group, sequence_parallel=sequence_parallel, z_loss=1e-2)
    losses, dhidden, dweight = with_gradients(
        lambda h, w: chunked_lm_loss(h, w, labels, mask, **options), local, part, mask
    )
    return losses, dhidden, dweight


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tp2", "tp2-sp"])
def test_tensor_parallel(ranks, sequence_parallel):
    """Labels in both halves of the vocabulary; the last chunk is short."""
    hidden, weight, labels, mask = example()
    expected = with_gradients(lambda h, w: lm_loss_ref(h, w, labels, 1e-2), hidden, weight, mask)
    results = ranks.run(on_two_ranks, sequence_parallel, world_size=2)
    for losses, dhidden, _ in results:
        if not sequence_parallel:
            close([losses, dhidden], expected, 1e-12)
        close([losses], expected, 1e-12)
    if sequence_parallel:
        close([torch.cat([r[1] for r in results])], expected[1:], 1e-12)
    close([torch.cat([r[2] for r in results])], expected[2:], 1e-12)
