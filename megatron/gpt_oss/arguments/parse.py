# Copyright (c) 2026, the megatron-core gptoss authors.

"""The command line of the entry script: a preset's values under Megatron's own flags.

A preset's values become argparse defaults of Megatron's parser, so that any flag overrides them; a
flag that contradicts the preset's architecture, an unknown flag and a missing file are refused in
one sentence before torch.distributed is touched. A command line is parsed once, with its recipes'
flags in it; every check takes what came of that.
"""

import argparse
import collections
import contextlib
import difflib
import glob
import importlib.util
import math
import os
import re
import sys
from argparse import ArgumentParser, Namespace
from functools import partial
from pathlib import Path
from typing import Callable, Iterator, NoReturn, Sequence

from megatron.core import device_utils
from megatron.gpt_oss.arguments import help as flag_help
from megatron.gpt_oss.arguments.check_flags import check_flags
from megatron.gpt_oss.arguments.device_connections import set_device_connections
from megatron.gpt_oss.arguments.expert_overlap import check_expert_overlap
from megatron.gpt_oss.arguments.flags import (
    HELP_ALL,
    LM_LOSS_CHUNK_SIZE,
    NO_PRESET,
    add_our_arguments,
)
from megatron.gpt_oss.arguments.foreign_names import advice, foreign_name
from megatron.gpt_oss.arguments.recipe import with_recipes
from megatron.gpt_oss.arguments.recompute import policy_flags
from megatron.gpt_oss.arguments.run_spec import RunSpec
from megatron.gpt_oss.arguments.te_requirements import check_installed, check_transformer_engine
from megatron.gpt_oss.arguments.validate_data import blend_defaults, read_prefixes
from megatron.gpt_oss.arguments.validate_run import (
    check_async_save,
    check_batch_size_schedule,
    check_run_arguments,
)
from megatron.gpt_oss.arguments.validate_sequence import check_sequence
from megatron.gpt_oss.checkpoint.hf.config import preset_from_hf_config, read_hf_config
from megatron.gpt_oss.data.indexed_dataset import check_dataset
from megatron.gpt_oss.errors import PresetError, UsageError, as_refusal
from megatron.gpt_oss.presets import (
    MOST_LAYERS,
    PRESETS,
    Preset,
    architecture_flags,
    extended,
    get_preset,
    preset_flags,
)
from megatron.gpt_oss.training.metrics.writers import check_writers

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

# What the chunked loss leaves out.
_UNCHUNKED_ONLY = ("use_mup", "defer_embedding_wgrad_compute")


Provider = Callable[[ArgumentParser], ArgumentParser]


def read(argv: Sequence[str] | None = None, extra_args_provider: Provider | None = None) -> RunSpec:
    """Parse a command line, once, and check it; Megatron's own validation is `validate`.

    Args:
        argv: the words after the script's name; sys.argv by default.
        extra_args_provider: more flags of the entry script.
    Raises:
        UsageError: the command line is wrong. Nothing has been made.
        SystemExit: --help or --help-all, which is printed.
    """
    from megatron.training.arguments import parse_args

    words = list(sys.argv[1:] if argv is None else argv)
    if flag_help.asked_for(words):
        flag_help.show_help()
        raise SystemExit(0)
    reader = _Reader(words, extra_args_provider)
    try:
        with contextlib.nullcontext() if HELP_ALL in words else _without_help_texts():
            parse_args(reader)
    except (AssertionError, ValueError) as error:
        if (refusal := as_refusal(error)) is None:
            raise
        raise refusal from error
    return reader.spec


def parse(
    argv: Sequence[str] | None = None, extra_args_provider: Provider | None = None
) -> Namespace:
    """`read` and `validate` in one."""
    return validate(read(argv, extra_args_provider))


def validate(spec: RunSpec) -> Namespace:
    """Megatron's validation of a run's arguments, which sets its global variables as well.

    Returns:
        `spec.args`, as the validation leaves them.
    Raises:
        UsageError: Megatron refuses them. No process group has been made.
    """
    from megatron.training.global_vars import get_tokenizer, set_global_variables

    def finish(args: Namespace):
        check_installed(args.transformer_impl)
        set_global_variables(args)
        return get_tokenizer()

    return _validate(spec.args, finish)


def validate_for_plan(spec: RunSpec) -> Namespace:
    """`validate` for a run that is only looked at, perhaps on another machine.

    No global variable is set, no writer opened.
    """
    from megatron.core.num_microbatches_calculator import _build_num_microbatches_calculator
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    def finish(args: Namespace):
        _build_num_microbatches_calculator(  # which checks how the batches divide
            rank=args.rank,
            global_batch_size=args.global_batch_size,
            micro_batch_size=args.micro_batch_size,
            data_parallel_size=args.data_parallel_size * args.gtp_weight_remat_size,
            decrease_batch_size_if_needed=args.decrease_batch_size_if_needed,
            step_batch_size_schedule=args.step_batch_size_schedule,
            seq_length=args.seq_length,
        )
        return build_tokenizer(args)

    return _validate(spec.args, finish)


def _validate(args: Namespace, finish: Callable[[Namespace], object]) -> Namespace:
    from megatron.training.arguments import validate_args

    try:
        validate_args(args)
        tokens = finish(args).vocab_size
    except (AssertionError, ValueError) as error:
        if (refusal := as_refusal(error)) is None:
            raise
        raise refusal from error
    _check_expert_ranks(args)
    args.tokenizer_vocab_size = tokens  # kept in checkpoints: rows beyond it may be padding
    if args.padded_vocab_size is not None and tokens > args.padded_vocab_size:
        raise UsageError(
            f"The tokenizer has {tokens} tokens, the model {args.padded_vocab_size} rows of "
            "vocabulary. Give the model's own tokenizer with --tokenizer-model."
        )
    check_run_arguments(args)
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
            "--tensor-model-parallel-size), or use a multiple of {ranks} ranks."
        )


@contextlib.contextmanager
def _without_help_texts() -> Iterator[None]:
    """Megatron's parser reads the source of 26 classes for them: half a second of every start."""
    from megatron.training.argument_utils import ArgumentGroupFactory

    read_them = ArgumentGroupFactory._get_field_docstrings
    ArgumentGroupFactory._get_field_docstrings = lambda self, cls: collections.defaultdict(str)
    try:
        yield
    finally:
        ArgumentGroupFactory._get_field_docstrings = read_them


class _Reader:
    """Megatron's `extra_args_provider`, which reads and checks the command line with its parser.

    Megatron's `parse_args` builds the parser, asks what it is given back for the arguments, and
    adds the rank's environment to them: this object is both the provider and what it gives back.
    """

    def __init__(self, argv: Sequence[str], extra_args_provider: Provider | None):
        self._argv, self._extra = argv, extra_args_provider
        self.spec: RunSpec | None = None

    def __call__(self, parser: ArgumentParser) -> "_Reader":
        parser = add_our_arguments(parser)
        if self._extra is not None:
            parser = self._extra(parser)
        parser.error = _refuse  # upstream's usage text is several hundred lines long
        if HELP_ALL in self._argv:
            flag_help.show_all(parser)
            raise SystemExit(0)

        def given_by(words: Sequence[str]) -> Namespace:
            return _explicit(words, parser)

        words = with_recipes(self._argv, given_by)
        self.spec = _checked(words, given_by(words), parser)
        return self

    def parse_args(self) -> Namespace:
        return self.spec.args


def _refuse(message: str) -> NoReturn:
    raise UsageError(f"{message[:1].upper()}{message[1:]}. --help-all lists every flag.")


def _explicit(words: Sequence[str], parser: ArgumentParser) -> Namespace:
    """What a command line itself says: a namespace without any default.

    Raises:
        UsageError: a value does not parse, or a flag is unknown (with the nearest known one).
    """
    kept = {action: action.default for action in parser._actions}
    defaults, parser._defaults = parser._defaults, {}
    for action in kept:
        action.default = argparse.SUPPRESS
    try:
        given, unknown = parser.parse_known_args(list(words))
    finally:
        parser._defaults = defaults
        for action, default in kept.items():
            action.default = default
    if unknown:
        raise UsageError(_unknown_message(unknown[0], parser))
    return given


def _checked(words: Sequence[str], given: Namespace, parser: ArgumentParser) -> RunSpec:
    """Put the preset, and what single flags bring, under what is given; then every check.

    Raises:
        UsageError: see `read`.
    """
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
    if getattr(given, "run_dir", None) is not None:
        defaults["save"] = defaults["load"] = str(Path(given.run_dir) / "checkpoints")
    if getattr(given, "sink_attention", "megatron") == "te":
        defaults["cp_comm_type"] = ["a2a"]  # the one that TransformerEngine has for sinks
    parser.set_defaults(**defaults)
    # Fills in what is not given: argparse leaves alone what a namespace has.
    args = parser.parse_args([], Namespace(**vars(given)))
    value = partial(getattr, args)
    check_sequence(value)
    check_transformer_engine(value)
    set_device_connections(value)
    for more in (policy_flags(given, value), check_writers(args)):
        parser.set_defaults(**more)
        for dest, default in more.items():
            if not hasattr(given, dest):
                setattr(args, dest, default)
    check_expert_overlap(value)
    # A dry run may be made on another machine than the run.
    check_async_save(args, device_utils.is_cuda() or args.dry_run is not None)
    check_batch_size_schedule(args)
    untested = check_flags(words, given, parser)
    return RunSpec(tuple(words), given, args, preset, untested, tuple(vars(args)))


def _unknown_message(word: str, parser: ArgumentParser) -> str:
    name = foreign_name(word.split("=")[0])
    if not word.startswith("-") and "=" in word and name is not None:
        return f"'{word}' is not a flag. {advice(name)}"
    if not word.startswith("-"):
        return f"'{word}' belongs to no flag. Is a '--' or a quotation mark missing before it?"
    flag = word.split("=")[0]
    if name is not None:
        return f"Unknown flag {flag}. {advice(name)} --help-all lists every flag."
    near = difflib.get_close_matches(flag, parser._option_string_actions, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    return f"Unknown flag {flag}.{hint} --help-all lists every flag."


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
            raise PresetError(f"--num-layers {depth} is invalid. Give 1 to {MOST_LAYERS}.")
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
        remedy = f"Drop the flag, or describe the model with flags and --preset {NO_PRESET}."
        if dest == "rotary_scaling_factor":
            remedy = f"To extend the context give --yarn-factor {value:g}."
        if dest == "num_layers":
            remedy = f"To change only the number of layers give --preset-layers {value}."
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
            f"--lm-loss-chunk-size {chunk_size}: expected tokens per chunk, or 0 for no chunks."
        )
    for dest in _UNCHUNKED_ONLY:
        if chunk_size and getattr(given, dest, False):
            flag = "--" + dest.replace("_", "-")
            raise UsageError(
                f"--lm-loss-chunk-size {chunk_size} cannot be used with {flag}. Drop one of them."
            )


def check_files(given: Namespace, preset: Preset | None) -> None:
    """Refuse paths to data, tokenizer and Hugging Face checkpoint that are not there.

    Raises:
        UsageError: names the flag, the path and what is missing there.
    """
    for dest in ("data_path", "train_data_path", "valid_data_path", "test_data_path"):
        for word in read_prefixes(getattr(given, dest, None)):
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
    if model is None and hasattr(given, "dry_run") and given.preset in PRESETS:
        # Its size is known. One id less than rows: the null tokenizer adds an end of a document.
        rows = PRESETS[given.preset].vocab_size
        return {
            "tokenizer_type": "NullTokenizer",
            "vocab_size": getattr(given, "vocab_size", rows - 1),
        }
    if model is None:
        raise UsageError(
            "No tokenizer. Give --tokenizer-model DIR with the tokenizer.json that the data was "
            "tokenized with (--load-hf DIR uses its own)."
        )
    return {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": model}


def _check_dataset(flag: str, prefix: str) -> None:
    if "://" in prefix:
        return  # object storage
    missing = [prefix + end for end in (".bin", ".idx") if not os.path.isfile(prefix + end)]
    if not missing:
        check_dataset(prefix)
        return
    hint = "Create the dataset with: gptoss tokenize"
    if glob.glob(f"{glob.escape(prefix)}.*-*.idx"):
        hint = "It was split by length: use --data-blend with a file that names it"
    if prefix.endswith((".bin", ".idx")):
        hint = f"Give the path without its extension: {prefix[:-4]}"
    raise UsageError(f"{flag} {prefix}: no file {' and no file '.join(missing)}. {hint}.")


def _check_tokenizer(model: str) -> None:
    if os.path.exists(model):
        return
    looks_like_hub_name = re.fullmatch(r"[\w-]+/[\w.-]+", model) and not model.endswith(".json")
    if looks_like_hub_name and importlib.util.find_spec("transformers") is not None:
        return
    raise UsageError(
        f"--tokenizer-model {model}: no such file or directory. Give a directory with "
        "tokenizer.json (any Hugging Face gpt-oss checkpoint has one)."
    )


def _check_hf_checkpoint(folder: str, preset: Preset | None, yarn_factor: float | None) -> None:
    from megatron.gpt_oss.checkpoint.hf.reader import HFReader

    config = read_hf_config(Path(folder))
    HFReader(Path(folder)).check_files()
    if preset is None:
        return
    found = extended(preset_from_hf_config(config), yarn_factor)
    theirs, ours = architecture_flags(found), architecture_flags(preset)
    for dest, value in ours.items():
        if theirs[dest] != value:
            raise PresetError(
                f"--load-hf {folder} is a different model than --preset {preset.name}: it has "
                f"{dest} = {theirs[dest]}, the preset {value}. Choose the preset (and "
                "--preset-layers) that matches the checkpoint."
            )
