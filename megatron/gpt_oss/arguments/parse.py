# Copyright (c) 2026, the megatron-core gptoss authors.

"""The command line of a run, parsed once: preset, recipes and Megatron's flags.

The values of the preset become defaults of Megatron's parser, so any flag overrides them. A flag
that contradicts the architecture of the preset, an unknown flag and a missing file are refused
before torch.distributed is initialized.
"""

import argparse
import collections
import contextlib
import difflib
import re
import sys
from argparse import ArgumentParser, Namespace
from functools import partial
from pathlib import Path
from typing import Callable, Iterator, NoReturn, Sequence

from megatron.core import device_utils
from megatron.gpt_oss.arguments import help as flag_help
from megatron.gpt_oss.arguments.check_flags import check_flags
from megatron.gpt_oss.arguments.check_values import check_values
from megatron.gpt_oss.arguments.device_connections import set_device_connections
from megatron.gpt_oss.arguments.expert_fp8 import set_expert_fp8
from megatron.gpt_oss.arguments.expert_overlap import check_expert_overlap
from megatron.gpt_oss.arguments.flags import HELP_ALL, add_our_arguments
from megatron.gpt_oss.arguments.foreign_names import advice, foreign_name
from megatron.gpt_oss.arguments.recipe import with_recipes
from megatron.gpt_oss.arguments.recompute import policy_flags
from megatron.gpt_oss.arguments.run_spec import RunSpec
from megatron.gpt_oss.arguments.te_requirements import check_transformer_engine
from megatron.gpt_oss.arguments.validate_data import (
    blend_defaults,
    check_conversations,
    sft_defaults,
)
from megatron.gpt_oss.arguments.validate_files import check_files, tokenizer_defaults
from megatron.gpt_oss.arguments.validate_model import (
    check_architecture,
    check_lm_loss,
    chosen_preset,
    preset_defaults,
)
from megatron.gpt_oss.arguments.validate_run import check_async_save, check_batch_size_schedule
from megatron.gpt_oss.arguments.validate_sequence import check_sequence
from megatron.gpt_oss.errors import UsageError, as_refusal
from megatron.gpt_oss.training.metrics.writers import check_writers

# A word of the command line that is a value: argparse takes -1e-3 and -1,2,3 for flags.
_NEGATIVE_NUMBER = re.compile(r"-(\.?\d|inf|nan)")

Provider = Callable[[ArgumentParser], ArgumentParser]


def read(argv: Sequence[str] | None = None, extra_args_provider: Provider | None = None) -> RunSpec:
    """Parse and check a command line. Megatron's own validation follows in `validate`.

    Args:
        argv: the words after the script's name; sys.argv by default.
        extra_args_provider: adds further flags of the entry script.
    Raises:
        UsageError: the command line is invalid. Nothing has been created.
        SystemExit: after --help or --help-all.
    """
    from megatron.training.arguments import parse_args

    words = list(sys.argv[1:] if argv is None else argv)
    if flag_help.asked_for(words):
        flag_help.show_help()
        raise SystemExit(0)
    spec: RunSpec | None = None

    def provider(parser: ArgumentParser) -> ArgumentParser:
        nonlocal spec
        parser = add_our_arguments(parser)
        if extra_args_provider is not None:
            parser = extra_args_provider(parser)
        spec = _parse(words, parser)
        # Megatron's parse_args adds the rank's environment to the arguments that this returns.
        parser.parse_args = lambda: spec.args
        return parser

    try:
        with contextlib.nullcontext() if HELP_ALL in words else _without_help_texts():
            parse_args(provider)
    except (AssertionError, ValueError) as error:
        if (refusal := as_refusal(error)) is None:
            raise
        raise refusal from error
    return spec


@contextlib.contextmanager
def _without_help_texts() -> Iterator[None]:
    """Skip the help texts of Megatron's parser: reading the source of 26 classes takes 0.5 s."""
    from megatron.training.argument_utils import ArgumentGroupFactory

    original = ArgumentGroupFactory._get_field_docstrings
    ArgumentGroupFactory._get_field_docstrings = lambda self, cls: collections.defaultdict(str)
    try:
        yield
    finally:
        ArgumentGroupFactory._get_field_docstrings = original


def _parse(argv: Sequence[str], parser: ArgumentParser) -> RunSpec:
    parser._negative_number_matcher = _NEGATIVE_NUMBER
    parser.error = _refuse  # upstream's usage text has several hundred lines
    if HELP_ALL in argv:
        flag_help.show_all(parser)
        raise SystemExit(0)
    given_by = partial(_explicit, parser)
    words = with_recipes(argv, given_by)
    return _checked(words, given_by(words), parser)


def _refuse(message: str) -> NoReturn:
    raise UsageError(f"{message[:1].upper()}{message[1:]}. --help-all lists every flag.")


def _explicit(parser: ArgumentParser, words: Sequence[str]) -> Namespace:
    """The arguments that a command line gives: a namespace without defaults.

    Raises:
        UsageError: a value is invalid, or a flag is unknown (names the closest one).
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
    """Add the defaults of the preset and of other flags to the given arguments; check them.

    Args:
        words: the command line with its recipes.
        given: the arguments that the command line gives, without defaults.
    Raises:
        UsageError: see `read`.
    """
    check_values(given, parser)
    preset = chosen_preset(given)
    if preset is not None:
        check_architecture(given, preset, parser)
    check_files(given, preset)
    check_lm_loss(given)
    defaults = {
        **preset_defaults(given, preset),
        **tokenizer_defaults(given),
        **blend_defaults(given),
        **sft_defaults(given),
        **_directory_defaults(given),
        **_te_defaults(given),
    }
    parser.set_defaults(**defaults)
    # argparse sets only the arguments that the namespace lacks.
    args = parser.parse_args([], Namespace(**vars(given)))
    check_sequence(args)
    check_conversations(args)
    set_expert_fp8(given, args)
    check_transformer_engine(args)
    set_device_connections(args)
    for more in (policy_flags(given, args), check_writers(args)):
        parser.set_defaults(**more)
        for dest, default in more.items():
            if not hasattr(given, dest):
                setattr(args, dest, default)
    check_expert_overlap(args)
    # A dry run may be on another machine than the run.
    check_async_save(args, device_utils.is_cuda() or args.dry_run is not None)
    check_batch_size_schedule(args)
    untested = check_flags(words, given, parser)
    return RunSpec(tuple(words), given, args, preset, untested, tuple(vars(args)))


def _directory_defaults(given: Namespace) -> dict:
    """--save and --load of --run-dir, if it gets checkpoints.

    Raises:
        UsageError: --no-checkpoints and --save contradict each other.
    """
    if getattr(given, "no_checkpoints", False):
        if hasattr(given, "save"):
            raise UsageError(f"--no-checkpoints and --save {given.save}: drop one of them.")
        return {}
    if getattr(given, "run_dir", None) is None:
        return {}
    checkpoints = str(Path(given.run_dir) / "checkpoints")
    return {"save": checkpoints, "load": checkpoints}


def _te_defaults(given: Namespace) -> dict:
    """TransformerEngine supports sinks with one communication type."""
    return {"cp_comm_type": ["a2a"]} if getattr(given, "sink_attention", None) == "te" else {}


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
