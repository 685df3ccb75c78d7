# Copyright (c) 2026, the megatron-core gptoss authors.

"""Compare the architecture and constants of two gpt-oss models.

The comparison uses Megatron's arguments (`architecture_flags`) of a preset, of a model in memory,
or of the run that saved a checkpoint.
"""

from typing import Any, Iterable, Mapping

import torch

from megatron.gpt_oss.errors import CheckpointError
from megatron.gpt_oss.presets import Preset, architecture_flags, get_preset, windowed_layers

# Arguments that no preset sets, with the value that gpt-oss needs.
NEUTRAL = {
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "rotary_seq_len_interpolation_factor": None,
    "use_rope_scaling": False,
    "no_rope_freq": None,
    "qk_layernorm": False,
    "qk_l2_norm": False,
    "multi_latent_attention": False,
    "layernorm_zero_centered_gamma": False,
    "apply_residual_connection_post_layernorm": False,
    "moe_router_topk_scaling_factor": None,
    "moe_router_num_groups": None,
    "moe_router_enable_expert_bias": False,
    "moe_apply_probs_on_input": False,
    "softmax_scale": None,
}
# Meaning of None.
_DEFAULTS = {
    "rotary_scaling_factor": 1.0,
    "yarn_original_max_position_embeddings": 4096,
    "yarn_beta_fast": 32.0,
    "yarn_beta_slow": 1.0,
    "yarn_correction_range_round_to_int": True,
}
# Not compared: tensor shapes cover the first; the second is of dense layers, which gpt-oss lacks.
_SHAPES = ("padded_vocab_size", "ffn_hidden_size")


def comparable(flags: Mapping[str, Any], num_layers: int) -> dict:
    """Normalize arguments, so that equivalent ones are equal.

    Args:
        flags: arguments by dest; missing ones stay missing.
        num_layers: of the model.
    """
    found = {
        dest: _DEFAULTS[dest] if value is None and dest in _DEFAULTS else value
        for dest, value in flags.items()
    }
    if "window_attn_skip_freq" in found:
        found["window_attn_skip_freq"] = windowed_layers(flags, num_layers)
        if not any(found["window_attn_skip_freq"]):
            found["window_size"] = None  # no layer has a window
    if found.get("window_size") is not None:
        found["window_size"] = tuple(found["window_size"])
    if isinstance(found.get("moe_layer_freq"), (list, tuple)) and all(found["moe_layer_freq"]):
        found["moe_layer_freq"] = 1
    scales = ("mscale", "mscale_all_dim")
    if found.get("yarn_attention_factor") is not None or not all(map(found.get, scales)):
        found.update({name: None for name in scales if name in found})
    for name in ("softmax_type", "normalization", "position_embedding_type"):
        if name in found:  # some are enums
            found[name] = getattr(found[name], "name", found[name])
    return found


def first_difference(
    expected: Preset, found: Mapping[str, Any], ignore: Iterable[str] = ()
) -> tuple[str, Any, Any] | None:
    """The first argument of a model that differs from a preset.

    Args:
        expected: the preset.
        found: the model's arguments by dest; missing ones are not compared.
        ignore: arguments that are not compared.
    Returns:
        (dest, value of the preset, value of the model), or None.
    """
    wanted = comparable({**architecture_flags(expected), **NEUTRAL}, expected.num_layers)
    compared = comparable({d: v for d, v in found.items() if d in wanted}, expected.num_layers)
    for dest, value in wanted.items():
        if dest in compared and dest not in (*_SHAPES, *ignore) and compared[dest] != value:
            return dest, value, compared[dest]
    return None


# {argument: field of TransformerConfig} where the names differ.
_IN_CONFIG = {
    "num_experts": "num_moe_experts",
    "group_query_attention": "",
    "rotary_scaling_factor": "yarn_rotary_scaling_factor",
    "mscale": "yarn_mscale",
    "mscale_all_dim": "yarn_mscale_all_dim",
}


_FLAGS = tuple(architecture_flags(get_preset("tiny")))


def arguments_of_model(model: torch.nn.Module) -> dict:
    """The arguments that a GPTModel was built with, as far as the model stores them."""
    from megatron.core.fusions.fused_bias_geglu import quick_gelu

    config = model.config
    names = {dest: _IN_CONFIG.get(dest, dest) for dest in (*_FLAGS, *NEUTRAL)}
    arguments = {
        dest: getattr(config, name) for dest, name in names.items() if hasattr(config, name)
    }
    return arguments | {
        "quick_geglu": config.gated_linear_unit and config.activation_func is quick_gelu,
        "position_embedding_type": model.position_embedding_type,
        "rotary_base": model.rotary_base,
        "untie_embeddings_and_output_weights": not model.share_embeddings_and_output_weights,
    }


def check_same_function(
    expected: Preset, expected_by: str, found: Mapping[str, Any], found_by: str, hint: str
) -> None:
    """Reject a model whose architecture or constants differ from a preset's.

    Args:
        expected: the preset.
        expected_by: name of its source, for the message.
        found: Megatron's arguments of the model, by dest.
        found_by: name of the model.
        hint: what to do.
    Raises:
        CheckpointError: names the first argument that differs, and both values.
    """
    difference = first_difference(expected, found)
    if difference is not None:
        dest, wanted, value = difference
        raise CheckpointError(
            f"{expected_by} has {_shown(dest)} = {_text(wanted)}, {found_by} {_text(value)}. {hint}"
        )


def _shown(dest: str) -> str:
    """The name of an argument in a message."""
    if dest == "window_attn_skip_freq":
        return "windowed layers"
    return _IN_CONFIG.get(dest) or dest


def _text(value: Any) -> str:
    if isinstance(value, tuple) and value and isinstance(value[0], bool):
        return str([number for number, windowed in enumerate(value) if windowed])
    return str(value)
