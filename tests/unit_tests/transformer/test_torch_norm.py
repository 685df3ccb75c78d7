# Copyright (c) 2026, the megatron-core gptoss authors.

"""The norms of PyTorch on the local spec."""

import pytest
import torch
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm

from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig


def config(**changes):
    fields = dict(num_layers=1, hidden_size=48, num_attention_heads=4, normalization="RMSNorm")
    return TransformerConfig(**{**fields, **changes})


def test_persist_layer_norm():
    """The command line's default was refused."""
    norm = WrappedTorchNorm(config(persist_layer_norm=True), hidden_size=48, eps=1e-5)
    assert isinstance(norm, torch.nn.RMSNorm)


@pytest.mark.parametrize("sequence_parallel", [True, False])
@pytest.mark.parametrize("normalization", ["RMSNorm", "LayerNorm"])
def test_sequence_parallel(normalization, sequence_parallel):
    """It was refused; the mark on the parameters has their gradients summed over TP."""
    changes = dict(tensor_model_parallel_size=2, sequence_parallel=sequence_parallel)
    norm = WrappedTorchNorm(config(normalization=normalization, **changes), hidden_size=48)
    marks = [param.sequence_parallel for param in norm.parameters()]
    assert marks == [sequence_parallel] * (1 if normalization == "RMSNorm" else 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm(dtype):
    """As Hugging Face's, bit for bit in bfloat16: the weight is applied before the rounding."""
    generator = torch.Generator().manual_seed(0)
    norm = WrappedTorchNorm(config(params_dtype=dtype), hidden_size=48, eps=1e-5).to(dtype)
    reference = GptOssRMSNorm(48, eps=1e-5).to(dtype)
    weight = 1 + 0.2 * torch.randn(48, generator=generator)
    x = (3 * torch.randn(37, 2, 48, generator=generator)).to(dtype)
    with torch.no_grad():
        for module in (norm, reference):
            module.weight.copy_(weight)
    # Float32 sums in another order.
    tolerance = 1e-6 if dtype == torch.float32 else 0
    torch.testing.assert_close(norm(x), reference(x), rtol=tolerance, atol=0)
