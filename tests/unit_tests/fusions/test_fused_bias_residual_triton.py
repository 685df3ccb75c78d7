# Copyright (c) 2026, the megatron-core gptoss authors.

"""The Triton kernel of bias and residual against float64.

On a CUDA device as it is; without one in Triton's interpreter, where TRITON_INTERPRET=1 is set
before the first import (test_fused_bias_residual.py starts such a run where triton is installed).
"""

import os

import pytest
import torch

pytest.importorskip("triton")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a CUDA device or TRITON_INTERPRET=1", allow_module_level=True)

from megatron.core.fusions import fused_bias_residual as fused

# `make test-gpu` runs them; the run in the interpreter names this file.
pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# fp32: two additions; bf16 is rounded once, and cut by the interpreter.
LIMITS = {torch.float32: 2**-22, torch.bfloat16: 2**-8 if DEVICE == "cuda" else 2**-7}


def draw(*shape, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)


@pytest.mark.parametrize("dtype", LIMITS, ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "shape", [(97, 1, 40), (5, 2, 1030), (1, 3, 1), (0, 1, 40), (7, 2880)], ids=str
)
def test_kernel(shape, dtype):
    """Values and gradients; x with strides of its own."""
    x = draw(*shape[::-1], dtype=dtype, seed=0).permute(*reversed(range(len(shape))))
    bias, residual = draw(shape[-1], dtype=dtype, seed=1), draw(*shape, dtype=dtype, seed=2)
    leaves = [tensor.detach().requires_grad_() for tensor in (x, bias, residual)]
    out = fused.add_bias_and_residual(*leaves)
    dout = draw(*shape, dtype=dtype, seed=3)
    dx, dbias, dresidual = torch.autograd.grad(out, leaves, dout)
    assert out.dtype == dtype and out.shape == x.shape
    assert torch.equal(dx, dout) and torch.equal(dresidual, dout)
    # Relative to the largest term: the sum may be near zero.
    terms = [tensor.double() for tensor in (x, bias.expand(shape), residual)]
    scale = torch.stack([term.abs() for term in terms]).sum(0)
    assert ((out.double() - sum(terms)).abs() <= LIMITS[dtype] * scale).all()
    expected = dout.double().flatten(0, -2).sum(0)
    limit = LIMITS[dtype] * dout.double().abs().flatten(0, -2).sum(0)
    assert dbias.dtype == dtype and ((dbias.double() - expected).abs() <= limit).all()


@pytest.mark.skipif(DEVICE == "cpu", reason="needs 18 GB and a device")
def test_more_elements_than_int32():
    """131,072 tokens x 2,880 columns x 8 pass 2^31: the last rows are right."""
    shape = 131_072, 8, 2880
    x = torch.zeros(shape, dtype=torch.bfloat16, device=DEVICE)
    residual = torch.zeros_like(x)
    x[-33:], residual[-33:] = (draw(33, 8, 2880, dtype=torch.bfloat16, seed=i) for i in range(2))
    bias = draw(2880, dtype=torch.bfloat16, seed=2)
    out = fused.add_bias_and_residual(x, bias, residual)[-33:]
    expected = fused.add_bias_and_residual_ref(x[-33:], bias, residual[-33:])
    assert torch.equal(out, expected)
