# Copyright (c) 2026, the megatron-core gptoss authors.
"""--freeze and --lr-multiplier: select parameters by patterns of their names.

Names are Megatron's, with layers numbered from 0 over all pipeline stages, e.g.
`decoder.layers.3.mlp.router.weight`. Patterns are shell patterns: '*.router.*', 'embedding.*'.
"""

import re
from argparse import Namespace
from fnmatch import fnmatchcase
from typing import Callable, Sequence

import torch

from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.gpt_oss.errors import UsageError
from megatron.training.non_finite import global_names

Hook = Callable[[list[torch.nn.Module]], list[torch.nn.Module]]


def parse_multipliers(words: Sequence[str]) -> dict[str, float]:
    """Parse the values of --lr-multiplier: ['*.router.*=0.1'] gives {'*.router.*': 0.1}.

    Raises:
        UsageError: a word is not PATTERN=FACTOR with a factor of 0 or more.
    """
    factors = {}
    for word in words:
        pattern, _, number = word.rpartition("=")
        try:
            factor = float(number)
        except ValueError:
            factor = -1.0
        if not pattern or not 0 <= factor < float("inf"):
            raise UsageError(
                f"--lr-multiplier {word}: expected PATTERN=FACTOR with a factor of 0 or more, for "
                "example '*.router.*=0.1'."
            )
        factors[pattern] = factor
    return factors


def check_patterns(args: Namespace) -> None:
    """Check --freeze and --lr-multiplier as far as possible without a model.

    Raises:
        UsageError: a value is invalid, or cannot be combined with another flag.
    """
    factors = parse_multipliers(args.lr_multiplier)
    if 0 in factors.values() and args.lr_warmup_init:
        raise UsageError(
            f"--lr-warmup-init {args.lr_warmup_init} would change parameters "
            "whose --lr-multiplier is 0. Give --lr-warmup-init 0."
        )
    if factors and args.decoupled_lr is not None:
        raise UsageError(
            f"--lr-multiplier and --decoupled-lr {args.decoupled_lr} both set the learning rate of "
            "embedding and head. Use multipliers instead: --lr-multiplier 'embedding.*=FACTOR' "
            "'output_layer.*=FACTOR'."
        )
    for flag in ("use_megatron_fsdp", "use_torch_fsdp2"):
        if (args.freeze or args.lr_multiplier) and getattr(args, flag, False):
            raise UsageError(
                f"--freeze and --lr-multiplier cannot be combined with --{flag.replace('_', '-')}."
            )


def pattern_hook(args: Namespace) -> Hook:
    """A hook for `GPTModelConfig.pre_wrap_hooks`, which runs before DDP and optimizer are built.

    --freeze sets requires_grad = False: the parameter has no gradient, no space in the gradient
    buffers and no optimizer state. --lr-multiplier sets the attribute `lr_multiplier`, from which
    `megatron.training.learning_rate_multipliers` builds parameter groups. If several patterns match
    a parameter, the last one on the command line applies.

    Raises:
        UsageError: on every rank, if a pattern matches no parameter on any rank, or no parameter is
            left to train.
    """
    factors = parse_multipliers(args.lr_multiplier)

    def hook(model_chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
        named = {
            name: parameter
            for chunk in model_chunks
            for parameter, name in global_names(chunk).items()
            if isinstance(parameter, torch.nn.Parameter)
        }
        for flag, patterns in (("--freeze", args.freeze), ("--lr-multiplier", factors)):
            _check_all_match(flag, list(patterns), list(named))
        for name, parameter in named.items():
            if any(fnmatchcase(name, pattern) for pattern in args.freeze):
                parameter.requires_grad_(False)
            for pattern, factor in factors.items():
                if fnmatchcase(name, pattern):
                    parameter.lr_multiplier = factor
        if args.freeze:
            trains = {name: parameter.requires_grad for name, parameter in named.items()}
            _check_frozen(args.freeze, trains, args.save and not args.no_save_optim)
            if args.recompute_granularity is not None:
                _require_grad_of_embedding_output(model_chunks)
        return model_chunks

    return hook


def _require_grad_of_embedding_output(model_chunks: list[torch.nn.Module]) -> None:
    """Set requires_grad on the output of the embedding.

    Activation checkpointing computes gradients only if an input of the layer requires one. With a
    frozen embedding no weight of the first layer would get a gradient.
    """

    def require_grad(module, inputs, output):
        return output.requires_grad_() if torch.is_grad_enabled() else output

    for chunk in model_chunks:
        for module in chunk.modules():
            if isinstance(module, LanguageModelEmbedding):
                module.register_forward_hook(require_grad)


def _check_all_match(flag: str, patterns: list[str], names: list[str]) -> None:
    """Raise the same UsageError on every rank if a pattern matches no parameter on any rank."""
    if not patterns:
        return
    matches = [any(fnmatchcase(name, pattern) for name in names) for pattern in patterns]
    all_ranks = _all_gather_object((matches, names[:3] + names[-1:]))
    for index, pattern in enumerate(patterns):
        if not any(matched[index] for matched, _ in all_ranks):
            examples = ", ".join(all_ranks[0][1])
            raise UsageError(
                f"{flag} {pattern} matches no parameter. Example names: {examples}. "
                "A pattern must match the full name: '*.router.*', not 'router'."
            )


def _check_frozen(patterns: Sequence[str], trains: dict[str, bool], saves: bool) -> None:
    """Check that a parameter trains, and that a checkpoint can hold the optimizer state.

    Args:
        patterns: values of --freeze.
        trains: whether each parameter of this rank trains, by name.
        saves: whether checkpoints hold optimizer state.
    """
    all_trains: dict[str, bool] = {}
    for part in _all_gather_object(trains):
        all_trains.update(part)
    words = f"--freeze {' '.join(patterns)}"
    if not any(all_trains.values()):
        raise UsageError(f"{words} leaves no parameter to train.")
    # A checkpoint stacks the layers (and experts) of a parameter into one tensor.
    frozen, trained = (
        {_without_numbers(name): name for name, value in all_trains.items() if value == wanted}
        for wanted in (False, True)
    )
    for key in frozen.keys() & trained.keys() if saves else ():
        raise UsageError(
            f"{words} freezes {frozen[key]} but not {trained[key]}; a checkpoint holds optimizer "
            "state for all layers and experts or for none. Freeze all of them, or use "
            "--lr-multiplier PATTERN=0 instead."
        )


def _without_numbers(name: str) -> str:
    return re.sub(r"(^|\.)\d+(?=\.)", r"\1*", name)


def _all_gather_object(value) -> list:
    values = [value]
    if torch.distributed.is_initialized():
        values *= torch.distributed.get_world_size()
        torch.distributed.all_gather_object(values, value)
    return values
