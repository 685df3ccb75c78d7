# Copyright (c) 2026, the megatron-core gptoss authors.

"""GPTModel's loss where its logits would be gathered, against PyTorch's over the gathered logits."""

import pytest
import torch

from tests.unit_tests.optimizer.test_gradient_norm import Layout, build_model

LENGTH, BATCH = 8, 2


def batch():
    generator = torch.Generator().manual_seed(5)
    tokens, labels = (torch.randint(64, (BATCH, LENGTH), generator=generator) for _ in range(2))
    return tokens, labels, torch.arange(LENGTH).expand(BATCH, LENGTH)


def loss_and_gradient(parallel_output, runtime_gather_output, fusion):
    """[(losses [b, s], gradient of their sum by the output layer's weight)]: the model's, and those
    of PyTorch's cross entropy over its gathered logits."""
    from megatron.core import parallel_state as ps
    from megatron.core import tensor_parallel

    ps.initialize_model_parallel(tensor_model_parallel_size=2, expert_tensor_parallel_size=1)
    tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    torch.manual_seed(1)
    _, model = build_model(
        Layout(tp=2),
        torch.float32,
        {"parallel_output": parallel_output},
        cross_entropy_loss_fusion=fusion,
        cross_entropy_fusion_impl="native",
    )
    tokens, labels, positions = batch()
    # Eager: the test is about the maths, not the compiler.
    with torch.compiler.set_stance("force_eager"):
        losses = model(
            tokens, positions, None, labels=labels, runtime_gather_output=runtime_gather_output
        )
        logits = model(tokens, positions, None, runtime_gather_output=True)
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="none"
    )
    results = []
    for value in (losses, expected.view(BATCH, LENGTH)):
        model.zero_grad()
        value.sum().backward()
        results.append((value.detach(), model.output_layer.weight.grad.clone()))
    return results


@pytest.mark.parametrize("fusion", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize(
    "parallel_output, gather",
    [(True, None), (False, None), (True, True)],
    ids=["parallel", "parallel_output-false", "runtime_gather_output"],
)
def test_loss(parallel_output, gather, fusion, ranks):
    """Regression: the loss was too large by log(TP), and the gradient lacked the label's term."""
    for found, expected in ranks.run(
        loss_and_gradient, parallel_output, gather, fusion, world_size=2
    ):
        torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-5)
