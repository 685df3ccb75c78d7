# Copyright (c) 2026, the megatron-core gptoss authors.

"""Sizes, constants and vocabulary padding of the model in a Megatron checkpoint.

Sizes follow from tensor shapes. Constants (window, rotary embedding, top-k, epsilon, clamp) are
read from the run arguments, which Megatron saves in the checkpoint.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any, Mapping

import torch

from megatron.gpt_oss.checkpoint.architecture import comparable, first_difference
from megatron.gpt_oss.checkpoint.hf.config import check_hf_config, hf_config_from_preset
from megatron.gpt_oss.checkpoint.hf.fields import (
    MAX_EXPERTS,
    alternating_layers,
)
from megatron.gpt_oss.checkpoint.mapping import FC1, GLOBAL_NAMES, LAYER_NAMES, QKV
from megatron.gpt_oss.checkpoint.torch_dist.layout import ParallelSizes, checkpoint_files
from megatron.gpt_oss.checkpoint.torch_dist.reader import TorchDistReader
from megatron.gpt_oss.errors import CheckpointError
from megatron.gpt_oss.json_file import brief
from megatron.gpt_oss.presets import MAX_LAYERS, Preset, windowed_layers

VOCABULARY = tuple(key for key in GLOBAL_NAMES if not key.startswith("decoder."))
_OPTIMIZER = re.compile(r"(chained_\d+\.)?optimizer\.")
# Compared before tensors, so that a message names the size.
SIZES = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "head_dim",
    "num_experts",
    "moe_ffn_hidden_size",
)


def preset_of_checkpoint(reader: TorchDistReader) -> Preset:
    """The preset of a checkpoint's model; its `vocab_size` includes padding.

    Raises:
        CheckpointError: a tensor is missing, has an unexpected shape or no counterpart in the
            Hugging Face format, or the model is not gpt-oss.
    """
    preset = _preset_from_shapes(reader)
    _check_sizes(preset, reader.directory)
    try:
        preset = _with_constants(preset, reader.arguments(), reader.directory)
    except (TypeError, AttributeError, ArithmeticError, LookupError) as error:
        raise CheckpointError(
            f"{reader.directory} holds run arguments that are invalid for a gpt-oss model "
            f"({brief(error)}). The checkpoint is damaged; use another one."
        ) from error
    # The Hugging Face config must be able to represent the model.
    check_hf_config(hf_config_from_preset(preset), reader.directory)
    _check_tensors(reader, preset)
    return preset


def _preset_from_shapes(reader: TorchDistReader) -> Preset:
    vocab_size, hidden_size = _shape(reader, "embedding.word_embeddings.weight", 2)
    (num_heads,) = _shape(reader, "self_attention.core_attention.softmax_offset", 1)
    _, query_rows = _shape(reader, "self_attention.linear_proj.weight", 2)
    qkv_rows, _ = _shape(reader, QKV + "weight", 2)
    num_experts, fc1_rows, _ = _shape(reader, FC1 + "weight", 3)
    head_dim = query_rows // num_heads
    return Preset(
        name="checkpoint",
        num_layers=reader.num_layers(),
        hidden_size=hidden_size,
        num_attention_heads=num_heads,
        num_query_groups=(qkv_rows // head_dim - num_heads) // 2,
        head_dim=head_dim,
        num_experts=num_experts,
        moe_ffn_hidden_size=fc1_rows // 2,
        vocab_size=vocab_size,
        seq_length=4096,
    )


def _shape(reader: TorchDistReader, key: str, rank: int) -> tuple[int, ...]:
    shape = reader.shape(key)
    if len(shape) != rank or 0 in shape:
        raise CheckpointError(
            f"{reader.directory}: '{key}' has shape {brief(shape)}, expected {rank} sizes above 0. "
            "Is it a checkpoint of a gpt-oss model?"
        )
    return shape


def _check_sizes(preset: Preset, directory: Path) -> None:
    """Reject sizes of damaged files, over which loops would take hours."""
    for name, most in (("num_layers", MAX_LAYERS), ("num_experts", MAX_EXPERTS)):
        if not 1 <= getattr(preset, name) <= most:
            raise CheckpointError(
                f"{directory} has {name} = {getattr(preset, name)} (from its tensors), expected 1 "
                f"to {most}. The checkpoint is damaged; use another one."
            )


# {field of a preset: argument of the run}
_CONSTANTS = {
    "num_experts_per_tok": "moe_router_topk",
    "rms_norm_eps": "layernorm_epsilon",
    "swiglu_limit": "activation_func_clamp_value",
    "rope_theta": "rotary_base",
    "yarn_factor": "rotary_scaling_factor",
    "yarn_original_max_position_embeddings": "yarn_original_max_position_embeddings",
    "yarn_beta_fast": "yarn_beta_fast",
    "yarn_beta_slow": "yarn_beta_slow",
    "yarn_truncate": "yarn_correction_range_round_to_int",
    "yarn_attention_factor": "yarn_attention_factor",
    "yarn_mscale": "mscale",
    "yarn_mscale_all_dim": "mscale_all_dim",
}


def _with_constants(preset: Preset, arguments: Mapping[str, Any], directory: Path) -> Preset:
    """Set the constants from the run arguments; without arguments keep the published values."""
    if not arguments:
        return preset
    found = comparable(arguments, preset.num_layers)
    constants = {
        field: found[dest] for field, dest in _CONSTANTS.items() if found.get(dest) is not None
    }
    window = found.get("window_size")
    if window is not None and window[0] >= 0:
        constants["sliding_window"] = window[0] + 1
    if "window_attn_skip_freq" in arguments:
        kinds = [
            "sliding_attention" if windowed else "full_attention"
            for windowed in windowed_layers(arguments, preset.num_layers)
        ]
        if kinds != alternating_layers(preset.num_layers):
            constants["layer_types"] = tuple(kinds)
    preset = dataclasses.replace(preset, **constants)
    difference = first_difference(preset, arguments)
    if difference is not None:
        dest, wanted, value = difference
        raise CheckpointError(
            f"{directory} was trained with {dest} = {value}, gpt-oss has {wanted}. The Hugging "
            "Face format cannot represent it."
        )
    longest = max(int(preset.yarn_factor * preset.yarn_original_max_position_embeddings), 1)
    length = min(preset.seq_length, longest)
    return dataclasses.replace(preset, max_position_embeddings=longest, seq_length=length)


def _check_tensors(reader: TorchDistReader, preset: Preset) -> None:
    """Reject a checkpoint that lacks a tensor, or has one without counterpart."""
    expected = {
        part.key: part.global_shape
        for file in checkpoint_files(preset, ParallelSizes())
        for part in file.parts
    }
    shapes = {k: v for k, v in reader.tensor_shapes().items() if not _OPTIMIZER.match(k)}
    found: dict[tuple[str, int | None], str] = {}
    for key, shape in shapes.items():
        known, layer = _canonical_key(key, expected)
        if known is None:
            others = sum(_canonical_key(other, expected)[0] is None for other in shapes) - 1
            raise CheckpointError(
                f"{reader.directory} holds '{key}'{f' and {others} more' if others else ''}, which "
                "gpt-oss in Hugging Face does not have; the export would lose it."
            )
        if (known, layer) in found or (known, None) in found:
            raise CheckpointError(
                f"{reader.directory} holds '{key}' and another tensor for the same weights. It is "
                "unclear which of the two to use."
            )
        found[known, layer] = key
        wanted = expected[known] if layer is None else expected[known][1:]
        if tuple(shape) != tuple(wanted):
            raise CheckpointError(
                f"{reader.directory}: '{key}' has shape {tuple(shape)}, expected {tuple(wanted)} "
                "from the other tensors. Is it a checkpoint of a gpt-oss model?"
            )
    for key in expected:
        layers = [None] if (key, None) in found else range(preset.num_layers)
        if not key.startswith("decoder.layers."):
            layers = [None]
        missing = [layer for layer in layers if (key, layer) not in found]
        if missing:
            where = "" if missing[0] is None else f" of layer {missing[0]}"
            raise CheckpointError(
                f"{reader.directory} has no tensor '{key}'{where}. Is it a checkpoint of a gpt-oss "
                "model?"
            )


def _canonical_key(key: str, expected: Mapping[str, Any]) -> tuple[str | None, int | None]:
    """The key that `convert to-megatron` uses for a tensor, and the layer if the key has it."""
    match = re.fullmatch(r"decoder\.layers\.(?:(\d+)\.)?(.+)", key)
    if match is None:
        return (key if key in expected else None), None
    layer, ending = None if match[1] is None else int(match[1]), match[2]
    same = [e for e, name in LAYER_NAMES.items() if name == LAYER_NAMES.get(ending)]
    for candidate in (ending, *same):
        if "decoder.layers." + candidate in expected:
            return "decoder.layers." + candidate, layer
    return None, None


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Number of vocabulary rows of a checkpoint.

    Attributes:
        rows: vocabulary rows that are tokens.
        padding: padding rows after them.
        note: a message for the user, or "".
    """

    rows: int
    padding: int = 0
    note: str = ""


def vocabulary_of(
    reader: TorchDistReader, like: int | None, asked: int | None = None
) -> Vocabulary:
    """Distinguish the vocabulary rows that are tokens from padding.

    Without --padded-vocab-size, Megatron pads the size of the tokenizer to a multiple of
    --make-vocab-size-divisible-by times TP. A run saves these arguments in its checkpoint. Without
    them, rows of zeros are padding (`load_hf` writes zeros) and all other rows are tokens.

    Args:
        reader: of the checkpoint.
        like: vocab_size of a Hugging Face directory of the same model, if any.
        asked: --vocab-size.
    Raises:
        CheckpointError: the checkpoint has fewer rows than `like` or `asked`, or rows may be either
            padding or tokens.
    """
    held = reader.shape(VOCABULARY[0])[0]
    if asked is not None:
        if not 1 <= asked <= held:
            raise CheckpointError(f"--vocab-size {asked}: the checkpoint has {held} rows.")
        return Vocabulary(asked, held - asked)
    if like is not None and held < like:
        raise CheckpointError(
            f"{reader.directory} has {held} rows of vocabulary, the Hugging Face checkpoint "
            f"{like}. Give the Hugging Face checkpoint that training started from."
        )
    if held == like:
        return Vocabulary(held)
    arguments = reader.arguments()
    tokens = arguments.get("tokenizer_vocab_size")
    multiple = (arguments.get("make_vocab_size_divisible_by") or 1) * (
        arguments.get("tensor_model_parallel_size") or 1
    )
    if tokens is not None:
        padded = -(-tokens // multiple) * multiple == held
        rows = max(tokens, like or 0) if padded else held
        return _vocabulary(rows, held, like, "the tokenizer of the run has no more tokens")
    if like is None:
        return Vocabulary(held)
    if not any(_any_nonzero(reader, key, like, held) for key in VOCABULARY):
        return _vocabulary(like, held, like, "they are zeros")
    if multiple > 1 and -(-like // multiple) * multiple == held:
        raise CheckpointError(
            f"{reader.directory} has {held} rows of vocabulary, the Hugging Face checkpoint "
            f"{like}, and {like} padded to a multiple of {multiple} is {held}: the rows from "
            f"{like} on may be padding or tokens. Choose: --vocab-size {like} or --vocab-size "
            f"{held}."
        )
    return _vocabulary(held, held, like, "")


def _vocabulary(rows: int, held: int, like: int | None, why: str) -> Vocabulary:
    notes = []
    if like is not None and rows != like:
        notes.append(
            f"vocabulary: {rows} rows, the Hugging Face checkpoint has {like}; vocab_size in "
            f"config.json is {rows} (--vocab-size {like} omits the others)"
        )
    if held > rows:
        notes.append(f"vocabulary: rows {rows} to {held - 1} are padding ({why}) and omitted")
    return Vocabulary(rows, held - rows, "\n".join(notes))


def _any_nonzero(reader: TorchDistReader, key: str, first: int, stop: int) -> bool:
    return bool(torch.any(reader.global_tensor(key, slice(first, stop)) != 0))


def check_same_sizes(
    found: Preset, wanted: Preset, checkpoint: str | Path, like: str | Path
) -> None:
    """Reject a checkpoint with sizes other than a Hugging Face directory, except the vocabulary.

    Raises:
        CheckpointError: names the size, and both values.
    """
    for field in SIZES:
        if getattr(found, field) != getattr(wanted, field):
            raise CheckpointError(
                f"{checkpoint} has {field} = {getattr(found, field)}, {like} has "
                f"{getattr(wanted, field)}. Give the Hugging Face checkpoint "
                "that training started from."
            )


def check_same_constants(
    reader: TorchDistReader,
    wanted: Preset,
    checkpoint: str | Path,
    like: str | Path,
    ignore: tuple[str, ...] = (),
) -> None:
    """Reject a checkpoint whose run arguments differ from the config of a Hugging Face directory.

    A checkpoint without run arguments passes.

    Raises:
        CheckpointError: names Megatron's argument, and both values.
    """
    difference = first_difference(wanted, reader.arguments(), ignore)
    if difference is not None:
        dest, expected, value = difference
        raise CheckpointError(
            f"{checkpoint} was trained with {dest} = {value}, {like} has {expected}. Give the "
            "Hugging Face checkpoint that training started from."
        )
