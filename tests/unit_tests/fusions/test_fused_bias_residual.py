# Copyright (c) 2026, the megatron-core gptoss authors.

"""When the fused bias-residual add runs; all other cases use upstream's function."""

from pathlib import Path

import pytest
import torch

from megatron.core.fusions import fused_bias_residual as fused
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from tests.harness.triton_interpreter import run_in_interpreter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def tensors(dtype=torch.bfloat16, device="cpu"):
    torch.manual_seed(0)
    x, residual = (torch.randn(33, 2, 40).to(device, dtype).requires_grad_() for _ in range(2))
    return x, torch.randn(40).to(device, dtype).requires_grad_(), residual


def test_reference_is_rounded_once():
    """bf16 keeps 8 bits: half a unit in the last place."""
    x, bias, residual = (tensor.detach() for tensor in tensors())
    exact = x.double() + bias.double() + residual.double()
    error = (fused.add_bias_and_residual_ref(x, bias, residual).double() - exact).abs()
    assert (error <= exact.abs() * 2**-8 + 1e-6).all()
    # Upstream rounds x + bias as well: were its error as small, the test would show nothing.
    upstream = get_bias_dropout_add(True, False)((x, bias), residual, 0.0)
    assert ((upstream.double() - exact).abs() > exact.abs() * 2**-8 + 1e-6).any()


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
def test_cpu_is_unchanged(training, with_bias):
    """Upstream's function, bit for bit, its gradients too."""
    results = []
    for get in (fused.get_bias_residual_add, get_bias_dropout_add):
        x, bias, residual = tensors()
        leaves = [x, bias, residual] if with_bias else [x, residual]
        out = get(training, False)((x, bias if with_bias else None), residual, 0.0)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    assert all(map(torch.equal, *results))


def test_where_it_applies(monkeypatch):
    """A bias and no dropout, or evaluation; one dtype and shape."""
    calls = []
    monkeypatch.setattr(fused, "_runs_on_triton", lambda *tensors: True)
    monkeypatch.setattr(fused, "add_bias_and_residual", lambda *tensors: calls.append(tensors))
    x, bias, residual = tensors()
    fused.get_bias_residual_add(True, False)((x, bias), residual, 0.0)
    fused.get_bias_residual_add(False, False)((x, bias), residual, 0.1)
    assert len(calls) == 2 and all(map(lambda a, b: a is b, calls[0], (x, bias, residual)))
    fused.get_bias_residual_add(True, False)((x, bias), residual, 0.1)
    fused.get_bias_residual_add(True, False)((x, None), residual, 0.0)
    assert len(calls) == 2


def test_triton_kernel_in_interpreter():
    run_in_interpreter(Path(__file__).with_name("test_fused_bias_residual_triton.py"))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("change", ["none", "dtype", "shape"])
def test_cuda(change):
    """The kernel where it takes the tensors; upstream's function for fp32 residuals and the like."""
    x, bias, residual = (tensor.detach() for tensor in tensors(device="cuda"))
    if change == "dtype":
        residual = residual.float()
    if change == "shape":
        bias = bias.expand_as(x)
    assert fused._runs_on_triton(x, bias, residual) == (change == "none")
    found = fused.get_bias_residual_add(True, False)((x, bias), residual, 0.0)
    if change == "none":
        assert torch.equal(found, fused.add_bias_and_residual_ref(x, bias, residual))
    else:
        assert torch.equal(found, get_bias_dropout_add(True, False)((x, bias), residual, 0.0))
