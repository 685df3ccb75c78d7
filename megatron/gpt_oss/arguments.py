# Copyright (c) 2026, the megatron-core gptoss authors.

"""The command line of the entry script: a preset's values under Megatron's own flags.

A preset's values become argparse defaults of Megatron's parser, so that --help shows them and any
flag overrides them; a flag that contradicts the preset's architecture, an unknown flag and a
missing file are refused in one sentence before torch.distributed is touched.
"""

import argparse
import difflib
import glob
import importlib.util
import math
import os
import re
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Callable, Sequence

from megatron.gpt_oss.checkpoint.hf_config import preset_from_hf_config, read_hf_config
from megatron.gpt_oss.data.blend_arguments import add_blend_arguments, blend_defaults
from megatron.gpt_oss.data.index_file import check_dataset
from megatron.gpt_oss.device_connections import set_device_connections
from megatron.gpt_oss.errors import PresetError, UsageError, as_refusal
from megatron.gpt_oss.expert_overlap import check_expert_overlap
from megatron.gpt_oss.memory_policy import POLICIES, policy_flags
from megatron.gpt_oss.presets import (
    MOST_LAYERS,
    PRESETS,
    Preset,
    architecture_flags,
    extended,
    get_preset,
    preset_flags,
)
from megatron.gpt_oss.sequence_arguments import check_sequence
from megatron.gpt_oss.transformer_engine import (
    SINK_ATTENTION,
    check_installed,
    check_transformer_engine,
)

NO_PRESET = "none"

# Arguments that no preset sets and that would make another model of it: the parser's own default
# is the only value that fits.
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

# Tokens whose logits live at a time: 1.6 GB in bf16, large enough for the products' full rate.
LM_LOSS_CHUNK_SIZE = 4096
# What the chunked loss leaves out.
_UNCHUNKED_ONLY = ("use_mup", "defer_embedding_wgrad_compute")


def add_gpt_oss_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Add our own flags to Megatron's parser (an `extra_args_provider`)."""
    group = parser.add_argument_group(title="gpt-oss")
    group.add_argument(
        "--preset",
        metavar="NAME",
        default=None,
        help=f"The model: {', '.join(PRESETS)}, or '{NO_PRESET}' to describe it with Megatron's "
        "own flags. Supplies the defaults of all other flags.",
    )
    group.add_argument(
        "--preset-layers",
        type=int,
        metavar="N",
        default=None,
        help="Another number of layers than the preset's: a shallower model of the same shape, "
        "for tests and benchmarks.",
    )
    group.add_argument(
        "--yarn-factor",
        type=float,
        metavar="F",
        default=None,
        help="Extend the context: positions up to F times 4,096 instead of the published 32 times "
        "(131,072), by YaRN. Training has to follow; convert to-hf writes it to config.json.",
    )
    group.add_argument(
        "--load-hf",
        metavar="FOLDER",
        default=None,
        help="Start from the weights of this Hugging Face gpt-oss checkpoint, at any parallel "
        "layout.",
    )
    group.add_argument(
        "--lm-loss-chunk-size",
        type=int,
        metavar="TOKENS",
        default=0,
        help="Compute head and loss over this many tokens at a time, so that the logits of all "
        "tokens (0.8 MB a token in fp32) never exist. 0: all at once. A preset takes "
        f"{LM_LOSS_CHUNK_SIZE}.",
    )
    group.add_argument(
        "--no-moe-grouped-gemm",
        dest="moe_grouped_gemm",
        action="store_false",
        default=argparse.SUPPRESS,
        help="Run the experts of a layer one after the other. A preset runs them as two grouped "
        "products.",
    )
    group.add_argument(
        "--sink-attention",
        choices=SINK_ATTENTION,
        default="megatron",
        help="Whose attention runs among TransformerEngine's layers: Megatron-Core's own with "
        "sinks, for every layout and cuDNN, or TransformerEngine's (te), which needs more of both "
        "(docs/transformer_engine.md).",
    )
    add_blend_arguments(group)
    group.add_argument(
        "--memory",
        choices=list(POLICIES),
        default=None,
        help="How much is computed again to keep less: fast keeps all, balanced makes the cheap "
        "part again, experts their whole part, lean keeps a layer's input alone. --recompute-* and "
        "--lm-loss-chunk-size win.",
    )
    return parser


def parse(
    argv: Sequence[str] | None = None,
    extra_args_provider: Callable[[ArgumentParser], ArgumentParser] | None = None,
) -> Namespace:
    """Parse and validate a command line through Megatron's own `parse_and_validate_args`.

    Args:
        argv: the words after the script's name; sys.argv by default.
        extra_args_provider: more flags of the entry script.
    Returns:
        Megatron's validated arguments (its global variables are set as well).
    Raises:
        UsageError: the command line is wrong. No process group has been made.
    """
    from megatron.training.arguments import parse_and_validate_args
    from megatron.training.global_vars import get_tokenizer

    argv = list(sys.argv[1:] if argv is None else argv)
    provider = preset_args_provider(argv, extra_args_provider)
    program = sys.argv
    sys.argv = [program[0], *argv]  # upstream's parser reads nothing else
    try:
        args = parse_and_validate_args(extra_args_provider=provider)
        check_installed(args.transformer_impl)
    except (AssertionError, ValueError) as error:
        if (refusal := as_refusal(error)) is None:
            raise
        raise refusal from error
    finally:
        sys.argv = program
    _check_expert_ranks(args)
    tokens = get_tokenizer().vocab_size
    args.tokenizer_vocab_size = tokens  # kept in checkpoints: rows beyond it may be padding
    if args.padded_vocab_size is not None and tokens > args.padded_vocab_size:
        raise UsageError(
            f"The tokenizer has {tokens} tokens, the model {args.padded_vocab_size} rows of "
            "vocabulary. Give the model's own tokenizer with --tokenizer-model."
        )
    return args


def _check_expert_ranks(args: Namespace) -> None:
    """Megatron finds out only while it makes the process groups."""
    sizes = {
        "expert_model_parallel_size": args.expert_model_parallel_size,
        "expert_tensor_parallel_size": args.expert_tensor_parallel_size,
        "pipeline_model_parallel_size": args.pipeline_model_parallel_size,
    }
    ranks = math.prod(sizes.values())
    if args.world_size % ranks:
        named = " * ".join(f"{name} {size}" for name, size in sizes.items())
        raise UsageError(
            f"{args.world_size} ranks cannot be divided into groups of {named} = {ranks}. Give a "
            "smaller --expert-model-parallel-size or --expert-tensor-parallel-size (its default is "
            "--tensor-model-parallel-size), or a multiple of so many ranks."
        )


def preset_args_provider(
    argv: Sequence[str],
    extra_args_provider: Callable[[ArgumentParser], ArgumentParser] | None = None,
) -> Callable[[ArgumentParser], ArgumentParser]:
    """Check a command line and return the `extra_args_provider` that puts the preset under it.

    Raises:
        UsageError: see `parse`.
    """

    def add_arguments(parser: ArgumentParser) -> ArgumentParser:
        parser = add_gpt_oss_arguments(parser)
        return extra_args_provider(parser) if extra_args_provider else parser

    if {"-h", "--help"} & set(argv):
        return add_arguments
    given, parser = explicit_arguments(argv, add_arguments)
    preset = _chosen_preset(given)
    if preset is not None:
        check_architecture(given, preset, parser)
    check_files(given, preset)
    check_lm_loss(given)
    defaults = preset_flags(preset) if preset is not None else {}
    if preset is not None and not any(getattr(given, dest, False) for dest in _UNCHUNKED_ONLY):
        defaults["lm_loss_chunk_size"] = LM_LOSS_CHUNK_SIZE
    defaults.update(_tokenizer_defaults(given))
    defaults.update(blend_defaults(given))
    if getattr(given, "sink_attention", "megatron") == "te":
        defaults["cp_comm_type"] = ["a2a"]  # the one that TransformerEngine has for sinks
    by_default = {action.dest: action.default for action in parser._actions} | defaults

    def value(dest: str) -> object:
        return getattr(given, dest, by_default[dest])

    check_sequence(value)
    check_transformer_engine(value)
    set_device_connections(value)
    policy = policy_flags(given, value)
    defaults.update(policy)
    by_default.update(policy)
    check_expert_overlap(value)

    def provider(parser: ArgumentParser) -> ArgumentParser:
        parser = add_arguments(parser)
        parser.set_defaults(**defaults)
        return parser

    return provider


class _Parser(ArgumentParser):
    """Reports a mistake as an exception: upstream's usage text is several hundred lines long."""

    def error(self, message: str):
        raise UsageError(f"{message[:1].upper()}{message[1:]}. --help lists every flag.")


def explicit_arguments(
    argv: Sequence[str], add_arguments: Callable[[ArgumentParser], ArgumentParser]
) -> tuple[Namespace, ArgumentParser]:
    """What the command line itself says: a namespace without any default.

    Raises:
        UsageError: a value does not parse, or a flag is unknown (with the nearest known one).
    """
    from megatron.training.arguments import add_megatron_arguments

    parser = add_arguments(add_megatron_arguments(_Parser(allow_abbrev=False)))
    kept = {action: action.default for action in parser._actions}
    for action in kept:
        action.default = argparse.SUPPRESS
    given, unknown = parser.parse_known_args(list(argv))
    for action, default in kept.items():
        action.default = default
    if unknown:
        raise UsageError(_unknown_message(unknown[0], parser))
    return given, parser


def _unknown_message(word: str, parser: ArgumentParser) -> str:
    if not word.startswith("-"):
        return f"'{word}' belongs to no flag. Was a '--' or a quotation mark left out before it?"
    flag = word.split("=")[0]
    near = difflib.get_close_matches(flag, parser._option_string_actions, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    return f"Unknown flag {flag}.{hint} --help lists every flag."


def _chosen_preset(given: Namespace) -> Preset | None:
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
        if depth is not None and not 1 <= depth <= MOST_LAYERS:
            raise PresetError(f"--num-layers {depth} is not a depth. Give 1 to {MOST_LAYERS}.")
        if (factor := getattr(given, "yarn_factor", None)) is not None:
            raise PresetError(
                f"--yarn-factor {factor:g} extends a preset, and --preset is '{NO_PRESET}'. Give "
                "--rotary-scaling-factor and --max-position-embeddings instead."
            )
        return None
    return extended(get_preset(name, num_layers), getattr(given, "yarn_factor", None))


def check_architecture(given: Namespace, preset: Preset, parser: ArgumentParser) -> None:
    """Refuse explicit flags that make another model than the preset.

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
        remedy = f"Drop the flag, or describe the whole model yourself with --preset {NO_PRESET}."
        if dest == "rotary_scaling_factor":
            remedy = f"To extend the context give --yarn-factor {value:g}."
        if dest == "num_layers":
            remedy = f"For another depth of the same shape give --preset-layers {value}."
        raise PresetError(
            f"{flag} contradicts --preset {preset.name}, which has "
            f"{dest} = {expected[dest]}. {remedy}"
        )


def _flag_of(dest: str, value: object, parser: ArgumentParser) -> str:
    """The flag as the user typed it, e.g. '--num-layers 12' or '--disable-bias-linear'."""
    actions = [action for action in parser._actions if action.dest == dest]
    for action in actions:
        if action.nargs == 0 and action.const == value:
            return action.option_strings[0]
    shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
    return f"{actions[0].option_strings[0]} {shown}"


def check_lm_loss(given: Namespace) -> None:
    """Refuse a chunk size below 0, and what the chunked loss leaves out.

    Raises:
        UsageError: names the flag and what to do.
    """
    chunk_size = getattr(given, "lm_loss_chunk_size", 0)
    if chunk_size < 0:
        raise UsageError(
            f"--lm-loss-chunk-size {chunk_size}: wanted a number of tokens, or 0 for all at once."
        )
    for dest in _UNCHUNKED_ONLY:
        if chunk_size and getattr(given, dest, False):
            flag = "--" + dest.replace("_", "-")
            raise UsageError(
                f"--lm-loss-chunk-size {chunk_size} does not go with {flag}. Drop one of them."
            )


def check_files(given: Namespace, preset: Preset | None) -> None:
    """Refuse paths to data, tokenizer and Hugging Face checkpoint that are not there.

    Raises:
        UsageError: names the flag, the path and what is missing there.
    """
    for dest in ("data_path", "train_data_path", "valid_data_path", "test_data_path"):
        weight = None
        for word in getattr(given, dest, None) or ():
            if _is_weight(word):
                weight = float(word)
            elif weight != 0:  # what is never read need not be there
                _check_dataset("--" + dest.replace("_", "-"), word)
    if getattr(given, "tokenizer_model", None) is not None:
        _check_tokenizer(given.tokenizer_model)
    if getattr(given, "load_hf", None) is not None:
        _check_hf_checkpoint(given.load_hf, preset, getattr(given, "yarn_factor", None))
        if not hasattr(given, "tokenizer_type") and not hasattr(given, "tokenizer_model"):
            _check_tokenizer(os.path.join(given.load_hf, "tokenizer.json"))


def _tokenizer_defaults(given: Namespace) -> dict:
    """The tokenizer of --load-hf, unless the command line names one."""
    if hasattr(given, "tokenizer_type"):
        return {}
    model = getattr(given, "tokenizer_model", None) or getattr(given, "load_hf", None)
    if model is None:
        raise UsageError(
            "No tokenizer. Give --tokenizer-model FOLDER with the tokenizer.json that the data was "
            "made with (--load-hf FOLDER brings its own)."
        )
    return {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": model}


def _is_weight(word: str) -> bool:
    """Whether a word of a blend is the weight of the prefix that follows."""
    return re.fullmatch(r"[0-9.]+(e-?[0-9]+)?", word) is not None


def _check_dataset(flag: str, prefix: str) -> None:
    if "://" in prefix:
        return  # object storage
    missing = [prefix + end for end in (".bin", ".idx") if not os.path.isfile(prefix + end)]
    if not missing:
        check_dataset(prefix)
        return
    hint = "Make the dataset with: gptoss tokenize"
    if glob.glob(f"{glob.escape(prefix)}.*-*.idx"):
        hint = "It was split by length: name it in a file for --data-blend"
    if prefix.endswith((".bin", ".idx")):
        hint = f"Give the path without its ending: {prefix[:-4]}"
    raise UsageError(f"{flag} {prefix}: no file {' and no file '.join(missing)}. {hint}.")


def _check_tokenizer(model: str) -> None:
    if os.path.exists(model):
        return
    looks_like_hub_name = re.fullmatch(r"[\w-]+/[\w.-]+", model) and not model.endswith(".json")
    if looks_like_hub_name and importlib.util.find_spec("transformers") is not None:
        return
    raise UsageError(
        f"--tokenizer-model {model}: no such file or folder. Give a folder with tokenizer.json "
        "(any Hugging Face gpt-oss folder has one)."
    )


def _check_hf_checkpoint(folder: str, preset: Preset | None, yarn_factor: float | None) -> None:
    from megatron.gpt_oss.checkpoint.hf_reader import HFReader

    config = read_hf_config(Path(folder))
    HFReader(Path(folder)).check_files()
    if preset is None:
        return
    found = extended(preset_from_hf_config(config), yarn_factor)
    theirs, ours = architecture_flags(found), architecture_flags(preset)
    for dest, value in ours.items():
        if theirs[dest] != value:
            raise PresetError(
                f"--load-hf {folder} is another model than --preset {preset.name}: it has "
                f"{dest} = {theirs[dest]}, the preset {value}. Choose the preset (and "
                "--preset-layers) that fits the checkpoint."
            )
