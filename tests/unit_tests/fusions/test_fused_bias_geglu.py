# Copyright (c) 2026, the megatron-core gptoss authors.
"""The fused quick GeGLU of experts against gpt-oss' formula in float64: output, gradients."""

import pytest
import torch

from megatron.core.fusions.fused_bias_geglu import weighted_bias_quick_geglu_impl

CLAMP = 7.0


@pytest.fixture(autouse=True)
def eager():
    """Compiling each function takes seconds; their maths is what is tested here."""
    with torch.compiler.set_stance("force_eager"):
        yield


def quick_geglu_ref(x, bias, weights, offset, clamp):
    """gpt-oss' expert: bias, clamp, (up + offset) * gate * sigmoid(1.702 gate), weight."""
    gate, up = (x if bias is None else x + bias).chunk(2, dim=-1)
    if clamp is not None:
        gate, up = gate.clamp(max=clamp), up.clamp(-clamp, clamp)
    return (up + offset) * gate * torch.sigmoid(1.702 * gate) * weights


def make_inputs(with_bias):
    """x [t, 2 ffn], bias, weights [t, 1] and the output's gradient, in float64.

    Values lie past the clamp on both sides: before the bias, after it, and both.
    """
    torch.manual_seed(4)
    x = torch.randn(33, 24, dtype=torch.float64) * 6
    bias = torch.randn(24, dtype=torch.float64) * 4
    for before, after in zip(x.chunk(2, -1), (x + bias).chunk(2, -1)):
        for side in (1, -1):
            past_before, past_after = side * before > CLAMP, side * after > CLAMP
            assert (past_before & ~past_after).any() and (~past_before & past_after).any()
    weights = torch.rand(33, 1, dtype=torch.float64)
    return [x, bias if with_bias else None, weights], torch.randn(33, 12, dtype=torch.float64)


def run(function, inputs, grad, dtype=torch.float64):
    """Name to value of the output and of the gradient of each input that is not None."""
    inputs = [v if v is None else v.detach().to(dtype).requires_grad_() for v in inputs]
    out = function(*inputs)
    given = {n: v for n, v in zip(("dx", "dbias", "dweights"), inputs) if v is not None}
    grads = torch.autograd.grad(out, list(given.values()), grad.to(dtype))
    return dict(zip(["out", *given], [out.detach(), *grads]))


@pytest.mark.parametrize("offset", [0.0, 1.0], ids=["offset0", "offset1"])
@pytest.mark.parametrize("clamp", [None, CLAMP], ids=["free", "clamp"])
@pytest.mark.parametrize("with_bias", [False, True], ids=["nobias", "bias"])
def test_bias_and_clamp(with_bias, clamp, offset):
    """The clamp came before the bias: values past it passed, values inside got no gradient."""
    inputs, grad = make_inputs(with_bias)
    got = run(
        lambda x, b, w: weighted_bias_quick_geglu_impl(x, b, w, False, offset, clamp), inputs, grad
    )
    ref = run(lambda x, b, w: quick_geglu_ref(x, b, w, offset, clamp), inputs, grad)
    for name in ref:
        torch.testing.assert_close(
            got[name], ref[name], rtol=1e-12, atol=1e-12, msg=lambda m: f"{name}: {m}"
        )


def test_bf16():
    """In bf16 no further from float64 than twice the eager formula in bf16."""
    inputs, grad = make_inputs(True)
    # What bf16 holds exactly, so that the three runs get the same numbers.
    inputs, grad = [v.bfloat16().double() for v in inputs], grad.bfloat16().double()
    fused = lambda x, b, w: weighted_bias_quick_geglu_impl(x, b, w, False, 1.0, CLAMP)
    eager = lambda x, b, w: quick_geglu_ref(x, b, w, 1.0, CLAMP)
    ref = run(eager, inputs, grad)
    got, same = (run(f, inputs, grad, torch.bfloat16) for f in (fused, eager))
    for name in ref:
        assert got[name].dtype == torch.bfloat16
        error, limit = ((v[name].double() - ref[name]).norm() for v in (got, same))
        assert error <= 2 * limit, f"{name}: error {error:.3e}, eager bf16 {limit:.3e}"


def test_fp8_input_store():
    """With the input kept in FP8 the forward is exact and the backward that of the rounded input.

    What is rounded is the biased and clamped input, and the clamp still stops its gradients.
    """
    inputs, grad = make_inputs(True)
    got = run(
        lambda x, b, w: weighted_bias_quick_geglu_impl(x, b, w, True, 1.0, CLAMP), inputs, grad
    )

    def rounded(x, bias, weights):
        gate, up = (x + bias).chunk(2, dim=-1)
        clamped = torch.cat((gate.clamp(max=CLAMP), up.clamp(-CLAMP, CLAMP)), -1)
        # Straight through the rounding: its value, the clamp's gradient.
        kept = clamped + (clamped.detach().to(torch.float8_e4m3fn).double() - clamped.detach())
        return quick_geglu_ref(kept, None, weights, 1.0, None)

    ref = run(rounded, inputs, grad)
    ref["out"] = quick_geglu_ref(*inputs, 1.0, CLAMP)
    for name in ref:
        torch.testing.assert_close(
            got[name], ref[name], rtol=1e-12, atol=1e-12, msg=lambda m: f"{name}: {m}"
        )
