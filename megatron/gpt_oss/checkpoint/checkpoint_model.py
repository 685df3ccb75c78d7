# Copyright (c) 2026, the megatron-core gptoss authors.

"""The model that a Megatron checkpoint holds: sizes, constants, and how much of it is padding.

Sizes are the tensors' shapes. What the shapes do not say (window, rotation, top-k, epsilon, clamp)
is read from the arguments of the run, which Megatron keeps in the checkpoint.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any, Mapping

import torch

from megatron.gpt_oss.checkpoint.architecture import comparable, first_difference
from megatron.gpt_oss.checkpoint.hf.config import check_hf_config, hf_config_from_preset
from megatron.gpt_oss.checkpoint.hf.fields import (
    MOST_EXPERTS,
    alternating_layers,
)
from megatron.gpt_oss.checkpoint.mapping import FC1, GLOBAL_NAMES, LAYER_NAMES, QKV
from megatron.gpt_oss.checkpoint.torch_dist.layout import Layout, checkpoint_files
from megatron.gpt_oss.checkpoint.torch_dist.reader import TorchDistReader
from megatron.gpt_oss.errors import CheckpointError
from megatron.gpt_oss.json_file import brief
from megatron.gpt_oss.presets import MOST_LAYERS, Preset, windowed_layers

VOCABULARY = tuple(key for key in GLOBAL_NAMES if not key.startswith("decoder."))
_OPTIMIZER = re.compile(r"(chained_\d+\.)?optimizer\.")
# Sizes that are compared one by one, so that the message names the size, not a tensor.
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
    """The model of a checkpoint; `vocab_size` counts every row, padding included.

    Raises:
        CheckpointError: a tensor is missing, has another shape or would be lost in Hugging Face's
            format, or the run was of a model that is not gpt-oss.
    """
    preset = _preset_from_shapes(reader)
    _check_sizes(preset, reader.folder)
    try:
        preset = _with_constants(preset, reader.arguments(), reader.folder)
    except (TypeError, AttributeError, ArithmeticError, LookupError) as error:
        raise CheckpointError(
            f"{reader.folder} holds run arguments that are invalid for a gpt-oss model "
            f"({brief(error)}). The checkpoint is damaged; use another one."
        ) from error
    # The sizes and constants are those of a config that can be written.
    check_hf_config(hf_config_from_preset(preset), reader.folder)
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
            f"{reader.folder}: '{key}' has shape {brief(shape)}, expected {rank} sizes above 0. Is "
            "it a checkpoint of a gpt-oss model?"
        )
    return shape


def _check_sizes(preset: Preset, folder: Path) -> None:
    """Refuse sizes by which loops would not end."""
    for name, most in (("num_layers", MOST_LAYERS), ("num_experts", MOST_EXPERTS)):
        if not 1 <= getattr(preset, name) <= most:
            raise CheckpointError(
                f"{folder} has {name} = {getattr(preset, name)} (from its tensors), expected 1 to "
                f"{most}. The checkpoint is damaged; use another one."
            )


# Fields of a preset that are arguments of the run, under the name of the argument.
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


def _with_constants(preset: Preset, arguments: Mapping[str, Any], folder: Path) -> Preset:
    """What the arguments of the run say; without arguments, what all published models have."""
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
            f"{folder} was trained with {dest} = {value}, gpt-oss has {wanted}. The Hugging "
            "Face format cannot represent it."
        )
    longest = max(int(preset.yarn_factor * preset.yarn_original_max_position_embeddings), 1)
    length = min(preset.seq_length, longest)
    return dataclasses.replace(preset, max_position_embeddings=longest, seq_length=length)


def _check_tensors(reader: TorchDistReader, preset: Preset) -> None:
    """Refuse a checkpoint that lacks a tensor, or holds one that has no counterpart."""
    expected = {
        part.key: part.global_shape
        for file in checkpoint_files(preset, Layout())
        for part in file.parts
    }
    shapes = {k: v for k, v in reader.tensor_shapes().items() if not _OPTIMIZER.match(k)}
    found: dict[tuple[str, int | None], str] = {}
    for key, shape in shapes.items():
        known, layer = _usual(key, expected)
        if known is None:
            others = sum(_usual(other, expected)[0] is None for other in shapes) - 1
            raise CheckpointError(
                f"{reader.folder} holds '{key}'{f' and {others} more' if others else ''}, which "
                "gpt-oss in Hugging Face does not have; the export would lose it."
            )
        if (known, layer) in found or (known, None) in found:
            raise CheckpointError(
                f"{reader.folder} holds '{key}' and another tensor for the same weights. It is "
                "unclear which of the two to use."
            )
        found[known, layer] = key
        wanted = expected[known] if layer is None else expected[known][1:]
        if tuple(shape) != tuple(wanted):
            raise CheckpointError(
                f"{reader.folder}: '{key}' has shape {tuple(shape)}, expected {tuple(wanted)} from "
                "the other tensors. Is it a checkpoint of a gpt-oss model?"
            )
    for key in expected:
        layers = [None] if (key, None) in found else range(preset.num_layers)
        if not key.startswith("decoder.layers."):
            layers = [None]
        missing = [layer for layer in layers if (key, layer) not in found]
        if missing:
            where = "" if missing[0] is None else f" of layer {missing[0]}"
            raise CheckpointError(
                f"{reader.folder} has no tensor '{key}'{where}. Is it a checkpoint of a gpt-oss "
                "model?"
            )


def _usual(key: str, expected: Mapping[str, Any]) -> tuple[str | None, int | None]:
    """The name under which a conversion writes a tensor, and its layer if the key has it."""
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
    """The rows of a checkpoint's vocabulary.

    Attributes:
        rows: that belong to the model.
        padding: that only fill the embedding up, behind them.
        note: a sentence for the user, or "".
    """

    rows: int
    padding: int = 0
    note: str = ""


def vocabulary_of(
    reader: TorchDistReader, like: int | None, asked: int | None = None
) -> Vocabulary:
    """Which rows of the vocabulary are the model's, and which padding.

    Megatron pads the tokenizer's size to a multiple of --make-vocab-size-divisible-by times TP,
    where nobody says --padded-vocab-size; a run keeps the three numbers in its checkpoint. Without
    them, rows of zeros are padding (`load_hf` makes them), and what else there is belongs to the
    model.

    Args:
        reader: of the checkpoint.
        like: vocab_size of the Hugging Face folder to go by, if any.
        asked: the number of rows that the user said.
    Raises:
        CheckpointError: the checkpoint has fewer rows than `like` or `asked`, or padding and grown
            rows cannot be told apart.
    """
    held = reader.shape(VOCABULARY[0])[0]
    if asked is not None:
        if not 1 <= asked <= held:
            raise CheckpointError(f"--vocab-size {asked}: the checkpoint has {held} rows.")
        return Vocabulary(asked, held - asked)
    if like is not None and held < like:
        raise CheckpointError(
            f"{reader.folder} has {held} rows of vocabulary, the Hugging Face checkpoint {like}. "
            "Give the Hugging Face checkpoint that training started from."
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
        return _told(rows, held, like, "the tokenizer of the run has no more tokens")
    if like is None:
        return Vocabulary(held)
    if not any(_any_nonzero(reader, key, like, held) for key in VOCABULARY):
        return _told(like, held, like, "they are zeros")
    if multiple > 1 and -(-like // multiple) * multiple == held:
        raise CheckpointError(
            f"{reader.folder} has {held} rows of vocabulary, the Hugging Face checkpoint {like}, "
            f"and {like} padded to a multiple of {multiple} is {held}: the rows from {like} on may be "
            f"padding or tokens. Choose: --vocab-size {like} or --vocab-size {held}."
        )
    return _told(held, held, like, "")


def _told(rows: int, held: int, like: int | None, why: str) -> Vocabulary:
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
    return bool(torch.any(reader.whole(key, slice(first, stop)) != 0))


def check_same_sizes(
    found: Preset, wanted: Preset, checkpoint: str | Path, like: str | Path
) -> None:
    """Refuse a checkpoint of other sizes than a Hugging Face folder, the vocabulary aside.

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
    """Refuse a checkpoint whose run computed another function than a Hugging Face folder says.

    A checkpoint without the arguments of its run is not compared.

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
