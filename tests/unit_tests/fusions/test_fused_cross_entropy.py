# Copyright (c) 2026, the megatron-core gptoss authors.
"""The vocabulary-parallel cross entropies, fused and not, against torch's in float64."""

import pytest
import torch
import torch.nn.functional as F

from megatron.core import parallel_state
from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

SEQUENCE, BATCH, VOCAB = 13, 2, 66
# Unit roundoff: the last step of the gradient is the rounding to the logits' dtype.
ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def make_data(dtype):
    """Logits [s, b, v] and the loss' gradient, in float64 but exact in dtype; targets."""
    torch.manual_seed(6)
    logits = (torch.randn(SEQUENCE, BATCH, VOCAB) * 3).to(dtype).double()
    target = torch.randint(VOCAB, (SEQUENCE, BATCH))
    return logits, target, torch.rand(SEQUENCE, BATCH).double() + 0.1


def run_rank(dtype, fused=True, label_smoothing=0.0):
    """Loss and the gradient of this rank's part of the logits."""
    parallel_state.initialize_model_parallel(torch.distributed.get_world_size())
    group = parallel_state.get_tensor_model_parallel_group()
    logits, target, grad = make_data(dtype)
    part = logits.chunk(group.size(), -1)[group.rank()].to(dtype).contiguous().requires_grad_()
    # Compiling each fused function takes seconds; their maths is what is tested here. They work on
    # a clone because they overwrite logits in fp32.
    with torch.compiler.set_stance("force_eager"):
        if fused:
            loss = fused_vocab_parallel_cross_entropy(part.clone(), target, group)
        else:
            loss = vocab_parallel_cross_entropy(part.clone(), target, label_smoothing)
        loss.backward(grad.float())
    return loss.detach().double(), part.grad


def smoothed_loss(logits, target, label_smoothing=0.0):
    """1 - label_smoothing for the target, the rest in equal parts for the other tokens."""
    other = label_smoothing / (VOCAB - 1)
    wanted = torch.full_like(logits, other)
    wanted.scatter_(-1, target.unsqueeze(-1), 1 - label_smoothing)
    return -(wanted * F.log_softmax(logits, -1)).sum(-1)


def check(results, dtype, label_smoothing=0.0):
    logits, target, grad = make_data(dtype)
    logits.requires_grad_()
    loss_ref = smoothed_loss(logits, target, label_smoothing)
    if not label_smoothing:
        plain = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
        torch.testing.assert_close(loss_ref.flatten(), plain, rtol=1e-12, atol=1e-12)
    (dlogits_ref,) = torch.autograd.grad(loss_ref, logits, grad)
    for rank, (loss, _) in enumerate(results):
        torch.testing.assert_close(
            loss, loss_ref, rtol=1e-6, atol=1e-6, msg=lambda m: f"loss of rank {rank}: {m}"
        )
    dlogits = torch.cat([part for _, part in results], -1)
    assert dlogits.dtype == dtype
    # fp16 has fixed steps of 2^-24 below its smallest normal number.
    torch.testing.assert_close(
        dlogits.double(),
        dlogits_ref.detach(),
        rtol=1.01 * ROUNDOFF[dtype] + 4e-6,
        atol=2.0**-24 if dtype == torch.float16 else 1e-7,
        msg=lambda m: f"dlogits: {m}",
    )


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("dtype", list(ROUNDOFF), ids=str)
@pytest.mark.parametrize("tp", [1, 2])
def test_gradient(ranks, tp, dtype, fused):
    """The fused gradient was rounded to bf16 for logits of any dtype: 1.6e-3 off in fp32."""
    check(ranks.run(run_rank, dtype, fused, world_size=tp), dtype)


@pytest.mark.parametrize("tp", [1, 2])
def test_label_smoothing(ranks, tp):
    """Each rank smoothed over its own part of the vocabulary, so TP 2 was not TP 1."""
    smoothing = 0.1
    results = ranks.run(run_rank, torch.float32, False, smoothing, world_size=tp)
    check(results, torch.float32, smoothing)
