# Copyright (c) 2026, the megatron-core gptoss authors.

"""Requirements of TransformerEngine, checked before a model is built.

The rules are those of TransformerEngine 2.20.2: `get_attention_backend` in
pytorch/attention/dot_product_attention/utils.py, the checks of context_parallel.py in the same
directory, and Megatron's `get_fp8_recipe`. cuDNN 9.13.1 and the largest head dim are checked in its
compiled part, which was not read. Without these checks TransformerEngine fails inside a layer, or
falls back to unfused attention, whose scores need too much memory beyond 8k tokens.
"""

import re
from argparse import Namespace
from dataclasses import dataclass
from typing import Iterator

import torch

from megatron.core.transformer.sink_attention.backends.base import package_version
from megatron.gpt_oss.errors import UsageError

# Minimum versions.
SOFTMAX_TYPE_TE = (2, 8, 0)
LEARNABLE_CUDNN = (9, 13, 1)
PACKED_CUDNN = (9, 18, 0)
SAVE_ORIGINAL_INPUT_TE = (2, 6, 0)
FP8_RECIPE_TE = {
    "delayed": (1, 0, 0),
    "mxfp8": (2, 1, 0),
    "tensorwise": (2, 2, 0),
    "blockwise": (2, 3, 0),
}
# Limits of FusedAttention's backward on GPUs before Blackwell.
LARGEST_HEAD_DIM, HEAD_DIM_MULTIPLE = 128, 8
FP8_ROWS = 16  # FP8 GEMMs need multiples of this many rows


@dataclass(frozen=True)
class Versions:
    """Versions of TransformerEngine and cuDNN: (major, minor, patch), or None if unknown."""

    te: tuple[int, int, int] | None
    cudnn: tuple[int, int, int] | None


def installed_versions() -> Versions:
    """The installed versions, without importing TransformerEngine."""
    packages = ("transformer_engine", "transformer_engine_torch", "transformer_engine_cu13")
    te = next(filter(None, map(package_version, packages)), None)
    number = torch.backends.cudnn.version() if torch.cuda.is_available() else None
    cudnn = None
    if number is not None and number >= 90000:
        cudnn = (number // 10000, number // 100 % 100, number % 100)
    return Versions(te and _numbers(te), cudnn)


def _numbers(version: str) -> tuple[int, int, int]:
    found = [int(word) for word in re.findall(r"\d+", version)[:3]]
    return tuple(found + [0] * (3 - len(found)))


def check_installed(transformer_impl: str, versions: Versions | None = None) -> None:
    """Refuse --transformer-impl transformer_engine if it is not installed.

    Raises:
        UsageError: says what to do.
    """
    versions = versions or installed_versions()
    if transformer_impl == "transformer_engine" and versions.te is None:
        raise UsageError(
            "--transformer-impl transformer_engine: TransformerEngine is not installed. Use an "
            "image that has it or install transformer-engine[pytorch], or drop the flag: "
            "--transformer-impl local needs only PyTorch and supports everything but its FP8 recipes."
        )


def check_transformer_engine(args: Namespace, versions: Versions | None = None) -> None:
    """Refuse what TransformerEngine does not support. Unknown versions count as new enough.

    Args:
        args: the arguments, before Megatron's validation.
    Raises:
        UsageError: names what is missing and what to use instead.
    """
    versions = versions or installed_versions()
    if args.transformer_impl != "transformer_engine":
        if args.fp4:
            raise UsageError(
                f"--fp4-format {args.fp4} needs TransformerEngine: give --transformer-impl "
                "transformer_engine, or drop the flag and train in bf16."
            )
        if args.sink_attention == "te":
            raise UsageError(
                "--sink-attention te needs --transformer-impl transformer_engine. Give it, or drop "
                "--sink-attention te."
            )
        return
    for problem in _fp8_problems(args, versions):
        raise UsageError(problem)
    if args.sink_attention == "te":
        for problem in attention_problems(args, versions):
            raise UsageError(
                f"--sink-attention te: {problem}. Drop the flag: Megatron-Core's own attention "
                "supports this case."
            )


def attention_problems(args: Namespace, versions: Versions) -> Iterator[str]:
    """Reasons why TransformerEngine's fused attention does not support this; no final period."""
    cp, tp = args.context_parallel_size, args.tensor_model_parallel_size
    sinks = args.softmax_type != "vanilla"
    packed = bool(args.dataloader_inter_document_masking)
    if not (args.bf16 or args.fp16):
        yield "its fused attention is for bf16 and fp16, and neither --bf16 nor --fp16 is given"
    backend = getattr(args.attention_backend, "name", args.attention_backend)
    if sinks and backend not in (None, "auto", "fused"):
        yield f"--attention-backend {backend} does not support sinks there, only fused does"
    head_dim = args.kv_channels
    if head_dim and (head_dim > LARGEST_HEAD_DIM or head_dim % HEAD_DIM_MULTIPLE):
        yield (
            f"its fused backward takes head dims up to {LARGEST_HEAD_DIM} in steps of "
            f"{HEAD_DIM_MULTIPLE}, --kv-channels is {head_dim}"
        )
    if args.reset_attention_mask:
        yield "--reset-attention-mask creates mask tensors, which its fused attention cannot use"
    if sinks:
        yield from _sink_problems(args, versions, packed, cp)
    if cp > 1:
        yield from _context_parallel_problems(args, packed, cp, tp)


def _sink_problems(args: Namespace, versions: Versions, packed: bool, cp: int) -> Iterator[str]:
    needed = f"softmax type {args.softmax_type}"
    if _older(versions.te, SOFTMAX_TYPE_TE):
        yield f"{needed} needs TransformerEngine {_shown(SOFTMAX_TYPE_TE)}, found {_shown(versions.te)}"
    if _older(versions.cudnn, LEARNABLE_CUDNN):
        yield f"{needed} needs cuDNN {_shown(LEARNABLE_CUDNN)}, found {_shown(versions.cudnn)}"
    if packed and _older(versions.cudnn, PACKED_CUDNN):
        yield (
            f"{needed} in packed documents (thd) needs cuDNN {_shown(PACKED_CUDNN)}, found "
            f"{_shown(versions.cudnn)}"
        )
    if args.deterministic_mode:
        yield f"its backward with {needed} is not deterministic, and --deterministic-mode is given"
    comm_types = args.cp_comm_type or ["p2p"]
    for name in comm_types if cp > 1 else ():
        if name != "a2a":
            yield f"{needed} under context parallelism needs a2a, --cp-comm-type is {name}"


def _context_parallel_problems(args: Namespace, packed: bool, cp: int, tp: int) -> Iterator[str]:
    if packed:
        yield (
            "it splits every packed document over the ranks, which needs lengths in multiples of "
            f"{2 * cp}, and documents here have any length"
        )
    for what, dest in (("attention heads", "num_attention_heads"), ("groups", "num_query_groups")):
        number = getattr(args, dest)
        if number and number % (tp * cp):
            yield (
                f"a2a splits the {number} {what} over tensor_model_parallel_size * "
                f"context_parallel_size = {tp * cp} ranks, which does not divide them"
            )


def _fp8_problems(args: Namespace, versions: Versions) -> Iterator[str]:
    if not args.fp8:
        return
    recipe = args.fp8_recipe
    recipe = getattr(recipe, "value", recipe)
    needed = FP8_RECIPE_TE.get(recipe)
    if needed is not None and _older(versions.te, needed):
        yield (
            f"--fp8-recipe {recipe} needs TransformerEngine {_shown(needed)}, found "
            f"{_shown(versions.te)}. Give another recipe, or drop --fp8-format for bf16."
        )
    recomputed = args.recompute_modules or ()
    if "moe_act" in recomputed and _older(versions.te, SAVE_ORIGINAL_INPUT_TE):
        yield (
            "--recompute-modules moe_act in FP8 needs TransformerEngine "
            f"{_shown(SAVE_ORIGINAL_INPUT_TE)}, found {_shown(versions.te)}. Drop moe_act."
        )
    length, batch = args.seq_length, args.micro_batch_size or 1
    parts = args.context_parallel_size
    if args.sequence_parallel:
        parts *= args.tensor_model_parallel_size
    if length and length * batch // parts % FP8_ROWS:
        yield (
            f"--fp8-format: a rank has {length * batch // parts} tokens, and FP8 GEMMs need "
            f"multiples of {FP8_ROWS}. Give --seq-length in multiples of {FP8_ROWS * parts}."
        )


def describe(versions: Versions | None = None) -> str:
    """One line for `gptoss doctor`."""
    versions = versions or installed_versions()
    if versions.te is None:
        return (
            "TransformerEngine: not installed; --transformer-impl local does not need it (only FP8 "
            "does)."
        )
    found = f"TransformerEngine {_shown(versions.te)}: --transformer-impl transformer_engine"
    recipes = [name for name, needed in FP8_RECIPE_TE.items() if not _older(versions.te, needed)]
    attention = "--sink-attention te can be chosen"
    if _older(versions.te, SOFTMAX_TYPE_TE):
        attention = f"--sink-attention te needs TransformerEngine {_shown(SOFTMAX_TYPE_TE)}"
    elif versions.cudnn is None:
        attention = "no GPU that PyTorch can use"
    elif _older(versions.cudnn, LEARNABLE_CUDNN):
        attention = (
            f"--sink-attention te needs cuDNN {_shown(LEARNABLE_CUDNN)}, PyTorch has "
            f"{_shown(versions.cudnn)}"
        )
    return f"{found} with FP8 {', '.join(recipes)}; {attention}."


def _older(found: tuple | None, needed: tuple) -> bool:
    return found is not None and found < needed


def _shown(version: tuple) -> str:
    return ".".join(map(str, version))
