# Copyright (c) 2026, the megatron-core gptoss authors.

"""Sizes of the gpt-oss models, and the Megatron arguments of each.

Values that all models share (YaRN, window pattern, clamp, epsilon) are the defaults of `Preset`.
The values are those of config.json in openai/gpt-oss-20b and -120b.
"""

import dataclasses
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron.gpt_oss.errors import PresetError

# A larger number is a typing error or from a damaged file, and would exhaust memory.
MAX_LAYERS = 10_000


@dataclass(frozen=True)
class Preset:
    """Sizes of one model; the defaults are the values that all gpt-oss models share."""

    name: str
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    num_experts: int
    moe_ffn_hidden_size: int
    vocab_size: int  # rows of the embedding; larger than the tokenizer's vocabulary
    seq_length: int  # default sequence length of training
    num_experts_per_tok: int = 4
    max_position_embeddings: int = 131072
    sliding_window: int = 128  # keys per query in windowed layers, its own included
    # Attention type of each layer, as in Hugging Face; None: layers 0, 2, ... are windowed.
    layer_types: tuple[str, ...] | None = None
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    swiglu_alpha: float = 1.702  # fixed in megatron.core.fusions.fused_bias_geglu.quick_gelu
    swiglu_limit: float = 7.0
    rope_theta: int | float = 150000
    yarn_factor: float = 32.0
    yarn_original_max_position_embeddings: int = 4096
    yarn_beta_fast: float = 32.0
    yarn_beta_slow: float = 1.0
    yarn_truncate: bool = False
    yarn_attention_factor: float | None = None  # None: from factor, mscale and mscale_all_dim
    yarn_mscale: float = 1.0  # mscale and mscale_all_dim have an effect if neither is 0
    yarn_mscale_all_dim: float = 0.0

    def is_windowed(self, layer: int) -> bool:
        """Whether a layer, numbered from 0, has the sliding window."""
        if self.layer_types is None:
            return layer % 2 == 0
        return self.layer_types[layer] == "sliding_attention"


PRESETS = {
    preset.name: preset
    for preset in (
        # Irregular sizes for tests: hidden != heads * head_dim != expert width, grouped heads, and
        # a vocabulary that is a multiple of 2 but not of 4, so TP 2 needs no padding.
        Preset(
            name="tiny",
            num_layers=4,
            hidden_size=128,
            num_attention_heads=4,
            num_query_groups=2,
            head_dim=64,  # as in 20b, so that YaRN's ramp is the same
            num_experts=8,
            moe_ffn_hidden_size=96,
            vocab_size=270,
            seq_length=512,
        ),
        Preset(
            name="20b",
            num_layers=24,
            hidden_size=2880,
            num_attention_heads=64,
            num_query_groups=8,
            head_dim=64,
            num_experts=32,
            moe_ffn_hidden_size=2880,
            vocab_size=201088,
            seq_length=4096,
        ),
        Preset(
            name="120b",
            num_layers=36,
            hidden_size=2880,
            num_attention_heads=64,
            num_query_groups=8,
            head_dim=64,
            num_experts=128,
            moe_ffn_hidden_size=2880,
            vocab_size=201088,
            seq_length=4096,
        ),
    )
}


def get_preset(name: str, num_layers: int | None = None) -> Preset:
    """Look up a preset by name.

    Args:
        name: a key of `PRESETS`.
        num_layers: replaces the number of layers, for tests and benchmarks.
    Raises:
        PresetError: the name is unknown, or `num_layers` is not in 1 to `MAX_LAYERS`.
    """
    if name not in PRESETS:
        raise PresetError(
            f"Unknown preset '{name}'. Choose one of {', '.join(PRESETS)}; a training run also "
            "takes 'none', to describe the model with Megatron's own flags."
        )
    preset = PRESETS[name]
    if num_layers is None:
        return preset
    if not 1 <= num_layers <= MAX_LAYERS:
        raise PresetError(f"--preset-layers {num_layers} is invalid. Give 1 to {MAX_LAYERS}.")
    return dataclasses.replace(preset, num_layers=num_layers)


def extend_context(preset: Preset, yarn_factor: float | None) -> Preset:
    """The same model with a longer context.

    Args:
        yarn_factor: YaRN scaling factor: context length over original length. None returns the
            preset unchanged.
    Raises:
        PresetError: the factor is below the preset's own, with which the weights were trained.
    """
    if yarn_factor is None:
        return preset
    if not yarn_factor >= preset.yarn_factor:
        raise PresetError(
            f"--yarn-factor {yarn_factor:g}: --preset {preset.name} already has "
            f"{preset.yarn_factor:g}. Give a larger factor, or drop the flag."
        )
    length = int(yarn_factor * preset.yarn_original_max_position_embeddings)
    return dataclasses.replace(preset, yarn_factor=yarn_factor, max_position_embeddings=length)


def architecture_flags(preset: Preset) -> dict:
    """The Megatron arguments (by dest) that define the model.

    A command line that changes one of them describes another model. YaRN is
    --position-embedding-type yarn; --rope-type yarn selects the YaRN of multi-latent attention and
    is rejected for this model.
    """
    return {
        "num_layers": preset.num_layers,
        "hidden_size": preset.hidden_size,
        "num_attention_heads": preset.num_attention_heads,
        "group_query_attention": True,
        "num_query_groups": preset.num_query_groups,
        "kv_channels": preset.head_dim,
        "ffn_hidden_size": preset.moe_ffn_hidden_size,
        "padded_vocab_size": preset.vocab_size,
        "untie_embeddings_and_output_weights": True,
        "normalization": "RMSNorm",
        "layernorm_epsilon": preset.rms_norm_eps,
        "add_bias_linear": True,  # linear_proj, router, experts; norms and output layer have none
        "add_qkv_bias": True,
        # Attention: Megatron's window excludes the query's own key, Hugging Face's includes it.
        # With a skip frequency of 2 layers 0, 2, ... are windowed.
        "softmax_type": "learnable",
        "window_size": (preset.sliding_window - 1, 0),
        "window_attn_skip_freq": (
            2
            if preset.layer_types is None
            else [int(preset.is_windowed(layer)) for layer in range(len(preset.layer_types))]
        ),
        "position_embedding_type": "yarn",
        "rotary_base": preset.rope_theta,
        "rotary_scaling_factor": preset.yarn_factor,
        "yarn_original_max_position_embeddings": preset.yarn_original_max_position_embeddings,
        "yarn_beta_fast": preset.yarn_beta_fast,
        "yarn_beta_slow": preset.yarn_beta_slow,
        "yarn_correction_range_round_to_int": preset.yarn_truncate,
        "yarn_attention_factor": preset.yarn_attention_factor,
        "mscale": preset.yarn_mscale,
        "mscale_all_dim": preset.yarn_mscale_all_dim,
        # Experts in every layer: clamped SwiGLU, softmax over the selected logits only.
        "num_experts": preset.num_experts,
        "moe_layer_freq": 1,
        "moe_ffn_hidden_size": preset.moe_ffn_hidden_size,
        "moe_router_topk": preset.num_experts_per_tok,
        "moe_router_score_function": "softmax",
        "moe_router_pre_softmax": False,
        "quick_geglu": True,
        "glu_linear_offset": 1.0,
        "activation_func_clamp_value": preset.swiglu_limit,
    }


def default_flags(preset: Preset) -> dict:
    """Defaults of the local (PyTorch) implementation, which the command line may override."""
    return {
        "seq_length": preset.seq_length,
        "max_position_embeddings": preset.max_position_embeddings,
        "init_method_std": preset.initializer_range,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "transformer_impl": "local",
        "attention_softmax_in_fp32": True,
        "cp_comm_type": ["auto"],
        # The fused softmax kernels support neither sinks nor windows.
        "masked_softmax_fusion": False,
        # The fusion would compile the activation for each number of tokens per expert, which costs
        # more than it saves.
        "bias_gelu_fusion": False,
        # fused_bias_residual fuses bias and residual without compiling.
        "bias_dropout_fusion": False,
        # PyTorch's RMSNorm has no persistent kernel; the local norm requires this flag.
        "no_persist_layer_norm": True,
        # The fused wgrad GEMM is a kernel of Apex.
        "gradient_accumulation_fusion": _has_module("fused_weight_gradient_mlp_cuda"),
        # GroupedExperts: two grouped GEMMs for all experts of a layer. Numbers, checkpoints and
        # initial weights are those of SequentialMLP (--no-moe-grouped-gemm).
        "moe_grouped_gemm": True,
        "moe_token_dispatcher_type": "alltoall",
        # Near ties among the logits are frequent: bf16 would select other experts.
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
    }


def preset_flags(preset: Preset) -> dict:
    """All Megatron argument defaults (by dest) of a preset, for the local implementation."""
    return {**default_flags(preset), **architecture_flags(preset)}


def windowed_layers(flags: Mapping[str, Any], num_layers: int) -> tuple[bool, ...]:
    """Whether each layer has a window, from Megatron's window_size and window_attn_skip_freq."""
    window, frequency = flags.get("window_size", (0, 0)), flags.get("window_attn_skip_freq")
    if not window:
        return (False,) * num_layers
    if frequency is None:
        return (True,) * num_layers
    if isinstance(frequency, int):
        return tuple(number % frequency != 0 for number in range(1, num_layers + 1))
    return tuple(map(bool, frequency))


def _has_module(name: str) -> bool:
    return importlib.util.find_spec(name) is not None
