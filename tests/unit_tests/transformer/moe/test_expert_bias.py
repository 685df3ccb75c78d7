# Copyright (c) 2026, the megatron-core gptoss authors.

"""Experts with biases on the local spec, one process, against Hugging Face's GptOssMLP."""

import pytest
import torch

from megatron.core import parallel_state
from megatron.core.transformer.moe.expert_bias import count_bias_once
from tests.harness.compare import relative_error
from tests.harness.experts_reference import moe_layer
from tests.harness.hf_reference import SIZES, hf_model, moe_to_megatron


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory):
    store = torch.distributed.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    with torch.compiler.set_stance("force_eager"):  # the test is about the maths, not the compiler
        yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def sequential_layer(dtype):
    """SequentialMLP's layer in the sizes of the Hugging Face reference."""
    return moe_layer(
        False,
        dtype,
        hidden_size=SIZES["hidden_size"],
        ffn_hidden_size=SIZES["intermediate_size"],
        moe_ffn_hidden_size=SIZES["intermediate_size"],
        num_moe_experts=SIZES["num_local_experts"],
        moe_router_topk=SIZES["num_experts_per_tok"],
        moe_router_dtype="fp64" if dtype == torch.float64 else None,
    )


# Float64 but for the softmax over the chosen experts, which the router does in float32.
TOLERANCE = 5e-7


def test_backward():
    """The bias was added in place to a view that an autograd function returned: no backward."""
    reference = hf_model().model.layers[0].mlp
    with torch.no_grad():
        reference.router.bias[1] = -100.0  # expert 1 gets no token
    params = dict(reference.named_parameters())
    layer = sequential_layer(torch.float64)
    mapped = moe_to_megatron(params, "", "")
    with torch.no_grad():
        for name, param in layer.named_parameters():
            param.copy_(mapped[name])

    generator = torch.Generator().manual_seed(7)
    x = torch.randn(13, 2, SIZES["hidden_size"], generator=generator, dtype=torch.float64)
    dout = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    x_ref, x_mg = (x.clone().requires_grad_() for _ in range(2))
    out_ref, _ = reference(x_ref)
    out_ref.backward(dout)
    out, bias = layer(x_mg)
    out.backward(dout)

    assert bias is None
    assert relative_error(out, out_ref) < TOLERANCE
    assert relative_error(x_mg.grad, x_ref.grad) < TOLERANCE
    grads = {n: p.grad if p.grad is not None else 0 * p for n, p in params.items()}
    grads = moe_to_megatron(grads, "", "")
    for name, param in layer.named_parameters():
        if ".1." in name:  # no token, no gradient
            assert grads[name].abs().max() == 0 and not param.grad.any(), name
        else:
            assert relative_error(param.grad, grads[name]) < TOLERANCE, name


def test_output_dtype():
    """Float32 probabilities do not widen a bfloat16 expert's output."""
    torch.manual_seed(1)
    layer = sequential_layer(torch.bfloat16)
    with torch.no_grad():
        for param in layer.parameters():
            param.normal_(std=0.2)
    expert = layer.experts.local_experts[0]
    x, probs = torch.randn(6, SIZES["hidden_size"]).bfloat16(), torch.rand(6)
    out, bias = expert(x, probs)
    plain = torch.nn.functional.linear(x, expert.linear_fc1.weight, expert.linear_fc1.bias).float()
    gate, up = plain.chunk(2, dim=-1)
    gate, up = gate.clamp(max=7), up.clamp(-7, 7)
    hidden = (up + 1) * gate * torch.sigmoid(1.702 * gate)
    ref = hidden @ expert.linear_fc2.weight.float().t() + expert.linear_fc2.bias.float()
    assert bias is None and out.dtype == torch.bfloat16
    # bfloat16 keeps 8 bits and the chain rounds about four times.
    assert relative_error(out, ref * probs[:, None]) < 4 * 2**-8


class Rank:
    """One rank of a group of two."""

    def __init__(self, rank):
        self.rank, self.size = (lambda: rank), (lambda: 2)


@pytest.mark.parametrize("as_list", [True, False], ids=["list", "tensor"])
def test_count_bias_once(as_list):
    """The ranks' parts sum to the bias, and each rank has the full gradient."""
    bias = torch.randn(3, 5, dtype=torch.float64)
    dout = torch.randn(3, 5, dtype=torch.float64)
    total = torch.zeros_like(bias)
    for rank in (Rank(0), Rank(1)):
        copy = bias.clone().requires_grad_()
        part = count_bias_once(list(copy) if as_list else copy, rank)
        part = torch.stack(part) if as_list else part
        part.backward(dout)
        total += part.detach()
        assert torch.equal(copy.grad, dout)
    assert torch.equal(total, bias)
    assert count_bias_once(None, Rank(0)) is None
    assert count_bias_once(bias, None) is bias  # no torch.distributed
