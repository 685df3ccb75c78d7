# Copyright (c) 2026, the megatron-core gptoss authors.

"""On the CPU the fused functions run uncompiled."""

import subprocess
import sys

import pytest
import torch

from megatron.core import device_utils
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu


@pytest.mark.skipif(device_utils.is_cuda(), reason="compiled on CUDA, as upstream does")
def test_fused_functions_are_not_compiled():
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    x, bias = torch.randn(3, 2, 8), torch.randn(8)
    gate, up = (x + bias).double().chunk(2, dim=-1)
    expected = gate * torch.sigmoid(gate) * up
    torch.testing.assert_close(bias_swiglu(x, bias).double(), expected, rtol=1e-6, atol=1e-6)
    assert not torch._dynamo.utils.counters["frames"]


@pytest.mark.skipif(device_utils.is_cuda(), reason="compiled on CUDA, as upstream does")
def test_import_brings_no_compiler():
    """Inductor takes seconds of every start, and a C++ compiler once it is called."""
    code = "import sys, megatron.core.transformer.moe.router; print(*sys.modules)"
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "torch._inductor.compile_fx" not in done.stdout.split()
