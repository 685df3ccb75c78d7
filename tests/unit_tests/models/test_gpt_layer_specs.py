# Copyright (c) 2026, the megatron-core gptoss authors.

"""The local GPT specs of models with experts."""

import pytest

from megatron.core.models import backends
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig


def block_spec(normalization):
    config = TransformerConfig(
        num_layers=2,
        hidden_size=16,
        num_attention_heads=4,
        num_moe_experts=2,
        moe_layer_freq=[1, 0],
        normalization=normalization,
        transformer_impl="local",
    )
    return gpt_layer_specs.get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, normalization=normalization, pp_rank=0
    )


class ApexNorm:
    """Replaces Apex' FusedLayerNorm, which supports only LayerNorm."""


@pytest.fixture
def apex(monkeypatch):
    for module in (backends, gpt_layer_specs):
        monkeypatch.setattr(module, "LNImpl", ApexNorm)


def test_norms_with_apex(apex):
    """RMSNorm took Apex' LayerNorm as its final norm, then LayerNorm PyTorch's."""
    for normalization, norm in (("RMSNorm", WrappedTorchNorm), ("LayerNorm", ApexNorm)):
        spec = block_spec(normalization)
        assert spec.layer_norm is norm
        for layer in spec.layer_specs:
            assert layer.submodules.input_layernorm is norm
            assert layer.submodules.pre_mlp_layernorm is norm


def test_checkpoint_keys():
    """TransformerEngine's spec fuses the norm into a dense MLP, and not into experts."""
    moe, dense = (
        layer.submodules.sharded_state_dict_keys_map for layer in block_spec("RMSNorm").layer_specs
    )
    fused = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    assert moe == fused
    assert dense == {**fused, "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
