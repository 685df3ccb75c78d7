# Copyright (c) 2026, the megatron-core gptoss authors.

"""The router bias if TransformerEngine computes the logits.

The product's epilogue takes the bias' bytes for numbers of the output's dtype: a bf16 bias under
fp32 logits is garbage, and half of it lies past its end.
"""

import pytest
import torch

from megatron.core.transformer.moe import moe_utils
from tests.harness.compare import relative_error

TOKENS, WIDTH, EXPERTS = 37, 64, 8


def data(device="cpu"):
    generator = torch.Generator().manual_seed(1)
    shapes = (TOKENS, 2, WIDTH), (EXPERTS, WIDTH), (EXPERTS,)
    return [torch.randn(shape, generator=generator).bfloat16().to(device) for shape in shapes]


def error(tensors):
    """Relative, of the logits, against float64."""
    hidden, weight, bias = (tensor.double() for tensor in tensors)
    expected = hidden @ weight.T + bias
    found = moe_utils.router_gating_linear(*tensors, torch.float32)
    assert found.dtype == torch.float32 and found.shape == expected.shape
    return relative_error(found, expected)


def epilogue(weight, inp, dtype, layout, bias=None, **_):
    """TransformerEngine's GEMM on the CPU; its epilogue uses only the dtype of the output."""
    assert layout == "TN"
    out = inp.to(dtype) @ weight.to(dtype).T
    if bias is not None:
        room = torch.zeros(EXPERTS * dtype.itemsize, dtype=torch.uint8)
        room[: bias.nbytes] = bias.detach().view(torch.uint8)
        out += room.view(dtype)
    return (out, None, None, None)


def test_bias_in_another_dtype(monkeypatch):
    monkeypatch.setattr(moe_utils, "te_general_gemm", epilogue)
    assert error(data()) < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.skipif(moe_utils.te_general_gemm is None, reason="needs TransformerEngine")
def test_bias_with_transformer_engine():
    """0.9 on upstream; what is read past the bias' end changes it from call to call."""
    for _ in range(3):
        assert error(data("cuda")) < 1e-3
