# Copyright (c) 2026, the megatron-core gptoss authors.

"""config.json of a Hugging Face gpt-oss checkpoint: read, check, and to or from a `Preset`."""

import json
from pathlib import Path

from megatron.gpt_oss.errors import CheckpointError
from megatron.gpt_oss.presets import Preset, extended

CONFIG_NAME = "config.json"

# Fields whose value the implementation fixes: another value means another model.
_FIXED = {"hidden_act": "silu", "tie_word_embeddings": False, "attention_bias": True}
_SHARED = {field: Preset.__dataclass_fields__[field].default for field in ("swiglu_alpha",)}
_REQUIRED = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_local_experts",
    "intermediate_size",
    "vocab_size",
)


def read_hf_config(folder: Path) -> dict:
    """Read the config.json of a gpt-oss folder.

    Raises:
        CheckpointError: the folder or file is missing, is not JSON, or is of another model.
    """
    folder = Path(folder)
    path = folder / CONFIG_NAME
    if not folder.is_dir():
        raise CheckpointError(f"No folder {folder}. Give the folder of a Hugging Face checkpoint.")
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no {CONFIG_NAME}: it is not a Hugging Face checkpoint, or its download "
            "is not complete."
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}). Fetch it again.") from error
    check_hf_config(config, path)
    return config


def check_hf_config(config: dict, path: Path | str = CONFIG_NAME) -> None:
    """Refuse a config that is not gpt-oss as it is implemented here.

    Raises:
        CheckpointError: names the file, the field, its value and the one expected.
    """
    model_type = config.get("model_type")
    if model_type != "gpt_oss":
        raise CheckpointError(
            f"{path} describes a model of type '{model_type}', not 'gpt_oss'. Give the folder of a "
            "gpt-oss checkpoint, e.g. openai/gpt-oss-20b."
        )
    missing = [field for field in _REQUIRED if field not in config]
    if missing:
        raise CheckpointError(f"{path} lacks {', '.join(missing)}. Fetch the file again.")
    for field, value in {**_FIXED, **_SHARED}.items():
        if config.get(field, value) != value:
            raise CheckpointError(
                f"{path} has {field} = {config[field]!r}; gpt-oss has {value!r} and no other value "
                "is implemented."
            )
    layer_types = config.get("layer_types")
    if layer_types is not None and layer_types != _layer_types(config["num_hidden_layers"]):
        raise CheckpointError(
            f"{path} has layer_types that do not alternate sliding_attention, full_attention over "
            f"{config['num_hidden_layers']} layers. No other pattern is implemented."
        )
    rope = _rope(config)
    if rope.get("rope_type", "yarn") != "yarn":
        raise CheckpointError(
            f"{path} has rope_type = {rope['rope_type']!r}; gpt-oss has 'yarn' and no other value "
            "is implemented."
        )


def preset_from_hf_config(config: dict, name: str = "hf", seq_length: int = 4096) -> Preset:
    """The `Preset` that a (checked) config describes; absent fields have the family's values."""
    rope = _rope(config)
    optional = {
        "num_experts_per_tok": config.get("num_experts_per_tok", config.get("experts_per_token")),
        "max_position_embeddings": config.get("max_position_embeddings"),
        "sliding_window": config.get("sliding_window"),
        "rms_norm_eps": config.get("rms_norm_eps"),
        "initializer_range": config.get("initializer_range"),
        "swiglu_limit": config.get("swiglu_limit"),
        "rope_theta": rope.get("rope_theta"),
        "yarn_factor": rope.get("factor"),
        "yarn_original_max_position_embeddings": rope.get("original_max_position_embeddings"),
        "yarn_beta_fast": rope.get("beta_fast"),
        "yarn_beta_slow": rope.get("beta_slow"),
        "yarn_truncate": rope.get("truncate"),
    }
    return Preset(
        name=name,
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        num_attention_heads=config["num_attention_heads"],
        num_query_groups=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        num_experts=config["num_local_experts"],
        moe_ffn_hidden_size=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        seq_length=seq_length,
        **{field: value for field, value in optional.items() if value is not None},
    )


def hf_config_from_preset(preset: Preset, dtype: str = "bfloat16", **extra) -> dict:
    """The config.json of a preset, as transformers reads it (old and new field names alike).

    Args:
        preset: the model.
        dtype: "bfloat16" or "float32", of the weights in the folder.
        extra: further fields, e.g. eos_token_id.
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
        "layer_types": _layer_types(preset.num_layers),
        "max_position_embeddings": preset.max_position_embeddings,
        "num_attention_heads": preset.num_attention_heads,
        "num_experts_per_tok": preset.num_experts_per_tok,
        "experts_per_token": preset.num_experts_per_tok,
        "num_hidden_layers": preset.num_layers,
        "num_key_value_heads": preset.num_query_groups,
        "num_local_experts": preset.num_experts,
        "output_router_logits": False,
        "rms_norm_eps": preset.rms_norm_eps,
        "rope_scaling": {
            "beta_fast": preset.yarn_beta_fast,
            "beta_slow": preset.yarn_beta_slow,
            "factor": preset.yarn_factor,
            "original_max_position_embeddings": preset.yarn_original_max_position_embeddings,
            "rope_type": "yarn",
            "truncate": preset.yarn_truncate,
        },
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
    """The config of the same model over the context that a factor of YaRN stretches it to."""
    preset = extended(preset_from_hf_config(config), factor)
    config = config | {"max_position_embeddings": preset.max_position_embeddings}
    for name in ("rope_scaling", "rope_parameters"):
        if config.get(name):
            config[name] = config[name] | {"factor": factor}
    return config


def _rope(config: dict) -> dict:
    """YaRN's numbers, which transformers 4 keeps in rope_scaling and 5 in rope_parameters."""
    rope = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    if "rope_theta" not in rope and "rope_theta" in config:
        rope["rope_theta"] = config["rope_theta"]
    return rope


def _layer_types(num_layers: int) -> list[str]:
    return ["full_attention" if i % 2 else "sliding_attention" for i in range(num_layers)]
