# Copyright (c) 2026, the megatron-core gptoss authors.

"""--preset, and the flags that must agree with its architecture."""

from argparse import ArgumentParser, Namespace

from megatron.gpt_oss.arguments.flags import LM_LOSS_CHUNK_SIZE, NO_PRESET
from megatron.gpt_oss.errors import PresetError, UsageError
from megatron.gpt_oss.presets import (
    MAX_LAYERS,
    PRESETS,
    Preset,
    architecture_flags,
    extend_context,
    get_preset,
    preset_flags,
)

# Architecture arguments that presets do not set: they must keep the parser's default.
_FOREIGN_ARCHITECTURE = (
    "swiglu",
    "squared_relu",
    "multi_latent_attention",
    "qk_layernorm",
    "qk_l2_norm",
    "rotary_percent",
    "rotary_interleaved",
    "use_rope_scaling",
    "use_rotary_position_embeddings",
    "no_rope_freq",
    "rotary_seq_len_interpolation_factor",
    "moe_router_topk_scaling_factor",
    "moe_router_num_groups",
    "moe_shared_expert_intermediate_size",
    "layernorm_zero_centered_gamma",
    "mtp_num_layers",
    "encoder_num_layers",
)
# Flags that the chunked loss does not support.
_UNCHUNKED_ONLY = ("use_mup", "defer_embedding_wgrad_compute")


def chosen_preset(given: Namespace) -> Preset | None:
    """The model of --preset, --preset-layers and --yarn-factor; None for --preset none.

    Raises:
        PresetError: no or an unknown preset, or an invalid depth.
    """
    name = getattr(given, "preset", None)
    num_layers = getattr(given, "preset_layers", None)
    if name is None:
        raise PresetError(
            f"No --preset. Choose one of {', '.join(PRESETS)}, or '{NO_PRESET}' to describe the "
            "model with Megatron's own flags."
        )
    if name == NO_PRESET:
        if num_layers is not None:
            raise PresetError(
                f"--preset-layers {num_layers} changes the depth of a preset, and --preset is "
                f"'{NO_PRESET}'. Give --num-layers instead."
            )
        depth = getattr(given, "num_layers", None)
        if depth is not None and not 1 <= depth <= MAX_LAYERS:
            raise PresetError(f"--num-layers {depth} is invalid. Give 1 to {MAX_LAYERS}.")
        if (factor := getattr(given, "yarn_factor", None)) is not None:
            raise PresetError(
                f"--yarn-factor {factor:g} extends a preset, and --preset is '{NO_PRESET}'. Give "
                "--rotary-scaling-factor and --max-position-embeddings instead."
            )
        return None
    return extend_context(get_preset(name, num_layers), getattr(given, "yarn_factor", None))


def preset_defaults(given: Namespace, preset: Preset | None) -> dict:
    """Values of Megatron's arguments that the preset sets, by dest."""
    if preset is None:
        return {}
    defaults = preset_flags(preset)
    if not any(getattr(given, dest, False) for dest in _UNCHUNKED_ONLY):
        defaults["lm_loss_chunk_size"] = LM_LOSS_CHUNK_SIZE
    return defaults


def check_architecture(given: Namespace, preset: Preset, parser: ArgumentParser) -> None:
    """Refuse flags that change the architecture of the preset.

    Raises:
        PresetError: names flag, value, the preset's value and what to do.
    """
    if getattr(given, "rope_type", None) == "yarn":
        raise PresetError(
            "--rope-type yarn is for multi-latent attention; Megatron refuses it for gpt-oss. "
            f"Drop the flag: --preset {preset.name} already sets --position-embedding-type yarn."
        )
    expected = {dest: parser.get_default(dest) for dest in _FOREIGN_ARCHITECTURE}
    expected.update(architecture_flags(preset))
    for dest, value in vars(given).items():
        if dest not in expected or value == expected[dest]:
            continue
        flag = _flag_of(dest, value, parser)
        hint = f"Drop the flag, or describe the model with flags and --preset {NO_PRESET}."
        if dest == "rotary_scaling_factor":
            hint = f"To extend the context give --yarn-factor {value:g}."
        if dest == "num_layers":
            hint = f"To change only the number of layers give --preset-layers {value}."
        raise PresetError(
            f"{flag} contradicts --preset {preset.name}, which has "
            f"{dest} = {expected[dest]}. {hint}"
        )


def _flag_of(dest: str, value: object, parser: ArgumentParser) -> str:
    """The flag as given, for example '--num-layers 12' or '--disable-bias-linear'."""
    actions = [action for action in parser._actions if action.dest == dest]
    for action in actions:
        if action.nargs == 0 and action.const == value:
            return action.option_strings[0]
    shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
    return f"{actions[0].option_strings[0]} {shown}"


def check_lm_loss(given: Namespace) -> None:
    """Refuse a negative --lm-loss-chunk-size, and flags that the chunked loss does not support.

    Raises:
        UsageError: names the flag and what to do.
    """
    chunk_size = getattr(given, "lm_loss_chunk_size", 0)
    if chunk_size < 0:
        raise UsageError(
            f"--lm-loss-chunk-size {chunk_size}: expected tokens per chunk, or 0 for no chunks."
        )
    for dest in _UNCHUNKED_ONLY:
        if chunk_size and getattr(given, dest, False):
            flag = "--" + dest.replace("_", "-")
            raise UsageError(
                f"--lm-loss-chunk-size {chunk_size} cannot be used with {flag}. Drop one of them."
            )
