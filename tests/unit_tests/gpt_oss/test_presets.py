# Copyright (c) 2026, the megatron-core gptoss authors.

"""Presets against the published config.json, and the TransformerConfig that their flags make."""

import pytest
import torch

from megatron.core.transformer.utils import is_layer_window_attention
from megatron.gpt_oss.arguments.parse import read
from megatron.gpt_oss.checkpoint.hf.config import hf_config_from_preset, preset_from_hf_config
from megatron.gpt_oss.errors import PresetError
from megatron.gpt_oss.layer_specs import gpt_oss_block_spec, model_config_from_args
from megatron.gpt_oss.presets import PRESETS, architecture_flags, get_preset
from megatron.training.arguments import validate_args

# config.json of openai/gpt-oss-20b and -120b, August 2025, less quantisation and token ids.
PUBLISHED = {
    "attention_bias": True,
    "attention_dropout": 0.0,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 2880,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_key_value_heads": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 201088,
}
PUBLISHED_SIZES = {"20b": (24, 32), "120b": (36, 128)}  # layers, experts


@pytest.mark.parametrize("name", PUBLISHED_SIZES)
def test_hf_config_is_the_published_one(name):
    layers, experts = PUBLISHED_SIZES[name]
    config = hf_config_from_preset(get_preset(name))
    pattern = ["sliding_attention", "full_attention"] * (layers // 2)
    expected = PUBLISHED | {
        "num_hidden_layers": layers,
        "num_local_experts": experts,
        "layer_types": pattern,
        "architectures": ["GptOssForCausalLM"],
        "dtype": "bfloat16",
    }
    assert config == expected


def test_120b_is_what_transformers_takes_by_default():
    """GptOssConfig's defaults describe 120b; an independent source of the same facts."""
    from transformers import GptOssConfig

    ours = GptOssConfig(**hf_config_from_preset(get_preset("120b"))).to_dict()
    theirs = GptOssConfig().to_dict()
    for key in ("architectures", "dtype", "experts_per_token", "initial_context_length"):
        ours.pop(key, None), theirs.pop(key, None)
    for key in ("router_aux_loss_coef", "rope_scaling"):  # released files and defaults differ
        ours.pop(key, None), theirs.pop(key, None)
    assert ours == theirs


@pytest.mark.parametrize("name", PRESETS)
def test_preset_survives_its_hf_config(name):
    preset = get_preset(name)
    config = hf_config_from_preset(preset)
    assert preset_from_hf_config(config, name, preset.seq_length) == preset
    # transformers 5 writes rope_parameters, theta included
    config["rope_parameters"] = config.pop("rope_scaling") | {
        "rope_theta": config.pop("rope_theta")
    }
    assert preset_from_hf_config(config, name, preset.seq_length) == preset


def _model_config(monkeypatch, *argv):
    """The model config from Megatron's parser and validation, as in the entry script."""
    argv = [*argv, "--micro-batch-size", "1", "--tokenizer-type", "NullTokenizer"]
    monkeypatch.setenv("WORLD_SIZE", "1")
    args = read(argv).args
    validate_args(args)
    return model_config_from_args(args)


@pytest.mark.parametrize("name", PRESETS)
def test_flags_make_the_transformer_config(monkeypatch, name):
    preset = get_preset(name)
    config = _model_config(monkeypatch, "--preset", name)
    transformer = config.transformer
    expected = {
        "num_layers": preset.num_layers,
        "hidden_size": preset.hidden_size,
        "num_attention_heads": preset.num_attention_heads,
        "num_query_groups": preset.num_query_groups,
        "kv_channels": preset.head_dim,
        "num_moe_experts": preset.num_experts,
        "moe_ffn_hidden_size": preset.moe_ffn_hidden_size,
        "moe_router_topk": 4,
        "moe_router_score_function": "softmax",
        "moe_router_pre_softmax": False,
        "moe_router_topk_scaling_factor": None,
        "moe_router_enable_expert_bias": False,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_layer_freq": 1,
        "moe_shared_expert_intermediate_size": None,
        "gated_linear_unit": True,
        "glu_linear_offset": 1.0,
        "activation_func_clamp_value": 7.0,
        "add_bias_linear": True,
        "add_qkv_bias": True,
        "normalization": "RMSNorm",
        "layernorm_epsilon": 1e-5,
        "layernorm_zero_centered_gamma": False,
        "qk_layernorm": False,
        "softmax_type": "learnable",
        "softmax_scale": None,
        "attention_softmax_in_fp32": True,
        "window_size": (127, 0),
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "init_method_std": 0.02,
        "transformer_impl": "local",
        "yarn_rotary_scaling_factor": 32.0,
        "yarn_original_max_position_embeddings": 4096,
        "yarn_beta_fast": 32.0,
        "yarn_beta_slow": 1.0,
        "yarn_mscale": 1.0,
        "yarn_mscale_all_dim": 0.0,
        "yarn_correction_range_round_to_int": False,
    }
    assert {key: getattr(transformer, key) for key in expected} == expected
    assert config.position_embedding_type == "yarn"
    assert (config.rotary_base, config.rotary_percent) == (150000, 1.0)
    assert config.seq_length == 131072
    assert config.vocab_size == preset.vocab_size and not config.should_pad_vocab
    assert config.share_embeddings_and_output_weights is False
    assert config.transformer_layer_spec is gpt_oss_block_spec
    x = torch.linspace(-9, 9, 37, dtype=torch.float64)
    assert torch.allclose(transformer.activation_func(x), x * torch.sigmoid(1.702 * x))


def test_windowed_layers_are_those_of_hugging_face():
    flags = architecture_flags(get_preset("20b"))
    kinds = [
        is_layer_window_attention(flags["window_size"], flags["window_attn_skip_freq"], number)
        for number in range(1, 25)  # Megatron counts layers from 1
    ]
    types = hf_config_from_preset(get_preset("20b"))["layer_types"]
    assert kinds == [kind == "sliding_attention" for kind in types]


def test_tiny_is_awkward():
    tiny = get_preset("tiny")
    width = tiny.num_attention_heads * tiny.head_dim
    sizes = {tiny.hidden_size, width, tiny.moe_ffn_hidden_size, 2 * tiny.moe_ffn_hidden_size}
    assert len(sizes) == 4
    assert 1 < tiny.num_query_groups < tiny.num_attention_heads
    assert tiny.vocab_size % 4 and tiny.vocab_size % 2 == 0
    assert tiny.seq_length > 2 * tiny.sliding_window


def test_depth_and_names():
    assert get_preset("20b", num_layers=2).num_layers == 2
    with pytest.raises(PresetError, match="'21b'.*tiny, 20b, 120b"):
        get_preset("21b")
    with pytest.raises(PresetError, match="--preset-layers 0"):
        get_preset("20b", num_layers=0)
