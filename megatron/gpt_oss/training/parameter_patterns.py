# Copyright (c) 2026, the megatron-core gptoss authors.
"""--freeze and --lr-multiplier: parameters chosen by patterns of their names.

Names are Megatron's, layers numbered from 0 over all pipeline stages, e.g.
`decoder.layers.3.mlp.router.weight`; patterns as the shell's: '*.router.*', 'embedding.*'.
"""

from argparse import Namespace
from fnmatch import fnmatchcase
from typing import Callable, Sequence

import torch

from megatron.gpt_oss.errors import UsageError
from megatron.training.non_finite import global_names

Hook = Callable[[list[torch.nn.Module]], list[torch.nn.Module]]


def parse_multipliers(words: Sequence[str]) -> dict[str, float]:
    """{'*.router.*': 0.1} from ['*.router.*=0.1'].

    Raises:
        UsageError: a word is not PATTERN=FACTOR with a factor above 0.
    """
    factors = {}
    for word in words:
        pattern, _, number = word.rpartition("=")
        try:
            factor = float(number)
        except ValueError:
            factor = -1.0
        if not pattern or not 0 < factor < float("inf"):
            raise UsageError(
                f"--lr-multiplier {word}: wanted PATTERN=FACTOR with a factor above 0, for example "
                "'*.router.*=0.1'. To leave parameters as they are: --freeze PATTERN."
            )
        factors[pattern] = factor
    return factors


def check_patterns(args: Namespace) -> None:
    """What of --freeze and --lr-multiplier can be refused before there is a model.

    Raises:
        UsageError: names the flag and what to do.
    """
    if parse_multipliers(args.lr_multiplier) and args.decoupled_lr is not None:
        raise UsageError(
            f"--lr-multiplier and --decoupled-lr {args.decoupled_lr} both set the learning rate of "
            "embedding and head. Write it as a multiplier: --lr-multiplier 'embedding.*=FACTOR' "
            "'output_layer.*=FACTOR'."
        )
    for flag in ("use_megatron_fsdp", "use_torch_fsdp2"):
        if (args.freeze or args.lr_multiplier) and getattr(args, flag, False):
            raise UsageError(
                f"--freeze and --lr-multiplier do not go with --{flag.replace('_', '-')}."
            )


def pattern_hook(args: Namespace) -> Hook:
    """A hook for `GPTModelConfig.pre_wrap_hooks`, before DDP and optimizer look at parameters.

    A frozen parameter gets requires_grad = False: it has no gradient, no place in the gradient
    buffers and no optimizer state. A factor becomes the attribute `lr_multiplier`, from which
    `megatron.training.learning_rate_multipliers` makes parameter groups; of several patterns that
    fit, the last one on the command line counts.

    Raises:
        UsageError: on every rank, if a pattern fits no parameter of the whole model, or nothing is
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
            _check_all_fit(flag, list(patterns), list(named))
        for name, parameter in named.items():
            if any(fnmatchcase(name, pattern) for pattern in args.freeze):
                parameter.requires_grad_(False)
            for pattern, factor in factors.items():
                if fnmatchcase(name, pattern):
                    parameter.lr_multiplier = factor
        if args.freeze:
            _check_something_trains(args.freeze, any(p.requires_grad for p in named.values()))
        return model_chunks

    return hook


def _check_all_fit(flag: str, patterns: list[str], names: list[str]) -> None:
    """A pattern may fit on one pipeline stage alone, and every rank has to say the same."""
    if not patterns:
        return
    fits = [any(fnmatchcase(name, pattern) for name in names) for pattern in patterns]
    everywhere = _gathered((fits, names[:3] + names[-1:]))
    for index, pattern in enumerate(patterns):
        if not any(seen[index] for seen, _ in everywhere):
            examples = ", ".join(everywhere[0][1])
            raise UsageError(
                f"{flag} {pattern} fits no parameter. Names look like these: {examples}. A pattern "
                "has to fit the whole name: '*.router.*', not 'router'."
            )


def _check_something_trains(patterns: Sequence[str], trains: bool) -> None:
    if not any(_gathered(trains)):
        raise UsageError(f"--freeze {' '.join(patterns)} leaves no parameter to train.")


def _gathered(value) -> list:
    values = [value]
    if torch.distributed.is_initialized():
        values *= torch.distributed.get_world_size()
        torch.distributed.all_gather_object(values, value)
    return values
