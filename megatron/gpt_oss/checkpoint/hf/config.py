# Copyright (c) 2026, the megatron-core gptoss authors.

"""Read and check config.json of a Hugging Face gpt-oss model; convert it from and to a `Preset`."""

from pathlib import Path

from megatron.gpt_oss.checkpoint.hf.fields import alternating_layers, read_fields
from megatron.gpt_oss.errors import CheckpointError
from megatron.gpt_oss.json_file import read_json
from megatron.gpt_oss.presets import Preset, extend_context

CONFIG_NAME = "config.json"


def read_hf_config(directory: Path) -> dict:
    """Read the config.json of a gpt-oss directory.

    Raises:
        CheckpointError: directory or file is missing, not JSON, or of a model that is not
            supported.
    """
    directory = Path(directory)
    path = directory / CONFIG_NAME
    if not directory.is_dir():
        raise CheckpointError(
            f"No directory {directory}. Give a Hugging Face checkpoint directory."
        )
    if not path.is_file():
        raise CheckpointError(
            f"{directory} has no {CONFIG_NAME}: it is not a Hugging Face checkpoint, or its "
            "download is incomplete."
        )
    config = read_json(path, dict, CheckpointError, "Download it again.")
    check_hf_config(config, path)
    return config


def check_hf_config(config: dict, path: Path | str = CONFIG_NAME) -> None:
    """Reject a config that is not implemented here, or that transformers rejects.

    Raises:
        CheckpointError: names the file, the field, its value and the supported values.
    """
    model_type = config.get("model_type")
    if model_type != "gpt_oss":
        raise CheckpointError(
            f"{path} describes a model of type '{str(model_type)[:60]}', not 'gpt_oss'. "
            "Give the directory of a gpt-oss checkpoint, e.g. openai/gpt-oss-20b."
        )
    read_fields(config, str(path))


def preset_from_hf_config(config: dict, name: str = "hf", seq_length: int = 4096) -> Preset:
    """The `Preset` of the model that transformers builds from a config.

    Raises:
        CheckpointError: see `check_hf_config`.
    """
    read = read_fields(config, CONFIG_NAME)
    kinds = read["layer_types"]
    return Preset(
        name=name,
        num_layers=read["num_hidden_layers"],
        hidden_size=read["hidden_size"],
        num_attention_heads=read["num_attention_heads"],
        num_query_groups=read["num_key_value_heads"],
        head_dim=read["head_dim"],
        num_experts=read["num_local_experts"],
        moe_ffn_hidden_size=read["intermediate_size"],
        vocab_size=read["vocab_size"],
        seq_length=min(seq_length, read["max_position_embeddings"]),
        num_experts_per_tok=read["num_experts_per_tok"],
        max_position_embeddings=read["max_position_embeddings"],
        sliding_window=read["sliding_window"],
        layer_types=None if kinds == alternating_layers(len(kinds)) else tuple(kinds),
        rms_norm_eps=read["rms_norm_eps"],
        initializer_range=read["initializer_range"],
        swiglu_limit=read["swiglu_limit"],
        **_yarn(read),
    )


def _yarn(read: dict) -> dict:
    """The rotary embedding as fields of a preset."""
    rope = read["rope"]
    theta = rope["rope_theta"]
    theta = int(theta) if theta == int(theta) else theta
    if rope["rope_type"] == "default":
        # YaRN of factor 1 is plain RoPE.
        longest = read["max_position_embeddings"]
        return {
            "rope_theta": theta,
            "yarn_factor": 1.0,
            "yarn_original_max_position_embeddings": longest,
        }
    yarn = {
        "rope_theta": theta,
        "yarn_factor": float(rope["factor"]),
        "yarn_original_max_position_embeddings": rope["original_max_position_embeddings"],
        "yarn_beta_fast": float(rope["beta_fast"]),
        "yarn_beta_slow": float(rope["beta_slow"]),
        "yarn_truncate": rope["truncate"],
    }
    if rope["attention_factor"] is not None:
        return yarn | {"yarn_attention_factor": float(rope["attention_factor"])}
    if rope["mscale"] is not None:
        yarn |= {
            "yarn_mscale": float(rope["mscale"]),
            "yarn_mscale_all_dim": float(rope["mscale_all_dim"]),
        }
    return yarn


def hf_config_from_preset(preset: Preset, dtype: str = "bfloat16", **extra) -> dict:
    """The config.json of a preset, with the field names of old and new transformers.

    Args:
        preset: the model.
        dtype: "bfloat16" or "float32", of the weights.
        extra: additional fields, e.g. eos_token_id.
    """
    return {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "attention_bias": True,
        "attention_dropout": 0.0,
        "dtype": dtype,
        "head_dim": preset.head_dim,
        "hidden_act": "silu",
        "hidden_size": preset.hidden_size,
        "initializer_range": preset.initializer_range,
        "intermediate_size": preset.moe_ffn_hidden_size,
        "layer_types": list(preset.layer_types or alternating_layers(preset.num_layers)),
        "max_position_embeddings": preset.max_position_embeddings,
        "num_attention_heads": preset.num_attention_heads,
        "num_experts_per_tok": preset.num_experts_per_tok,
        "experts_per_token": preset.num_experts_per_tok,
        "num_hidden_layers": preset.num_layers,
        "num_key_value_heads": preset.num_query_groups,
        "num_local_experts": preset.num_experts,
        "output_router_logits": False,
        "rms_norm_eps": preset.rms_norm_eps,
        "rope_scaling": _rope_scaling(preset),
        "rope_theta": preset.rope_theta,
        "initial_context_length": preset.yarn_original_max_position_embeddings,
        "router_aux_loss_coef": 0.9,
        "sliding_window": preset.sliding_window,
        "swiglu_limit": preset.swiglu_limit,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": preset.vocab_size,
        **extra,
    }


def with_yarn_factor(config: dict, factor: float) -> dict:
    """The config of the same model with another YaRN factor, which extends its context.

    Values that transformers would derive from the old length are written explicitly.
    """
    preset = extend_context(preset_from_hf_config(config), factor)
    given = [name for name in ("rope_scaling", "rope_parameters") if config.get(name)]
    changed = {"max_position_embeddings": preset.max_position_embeddings}
    if "original_max_position_embeddings" in config:
        changed["original_max_position_embeddings"] = preset.yarn_original_max_position_embeddings
    for name in given or ["rope_scaling"]:
        kept = {k: v for k, v in (config.get(name) or {}).items() if k not in _OF_ROPE}
        changed[name] = kept | _rope_scaling(preset)
        if "rope_theta" in (config.get(name) or {}):
            changed[name]["rope_theta"] = preset.rope_theta
    return config | changed


_OF_ROPE = ("type", "attention_factor", "mscale", "mscale_all_dim", "rope_theta")


def _rope_scaling(preset: Preset) -> dict:
    """rope_scaling of a preset, without rope_theta."""
    rope = {
        "beta_fast": preset.yarn_beta_fast,
        "beta_slow": preset.yarn_beta_slow,
        "factor": preset.yarn_factor,
        "original_max_position_embeddings": preset.yarn_original_max_position_embeddings,
        "rope_type": "yarn",
        "truncate": preset.yarn_truncate,
    }
    if preset.yarn_attention_factor is not None:
        rope["attention_factor"] = preset.yarn_attention_factor
    if preset.yarn_mscale and preset.yarn_mscale_all_dim:
        rope["mscale"] = preset.yarn_mscale
        rope["mscale_all_dim"] = preset.yarn_mscale_all_dim
    return rope
