# Copyright (c) 2026, the megatron-core gptoss authors.

"""The weight files of a Hugging Face folder, written tensor by tensor from Megatron's."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megatron.gpt_oss.checkpoint.hf.config import CONFIG_NAME
from megatron.gpt_oss.checkpoint.hf.mxfp4 import BLOCK, quantize
from megatron.gpt_oss.checkpoint.hf.reader import INDEX_NAME, MXFP4_SUFFIXES, SINGLE_NAME
from megatron.gpt_oss.checkpoint.hf.safetensors_file import SafetensorsWriter
from megatron.gpt_oss.checkpoint.mapping import (
    MegatronSource,
    as_contiguous,
    expert_matrix,
    hf_names,
    hf_shape,
    interleave_gate_up,
    is_expert_matrix,
    is_vocabulary_matrix,
    megatron_to_hf,
)
from megatron.gpt_oss.checkpoint.read_ahead import read_ahead
from megatron.gpt_oss.checkpoint.resumable_output import Unfinished
from megatron.gpt_oss.checkpoint.torch_dist.layout import LARGEST_PART
from megatron.gpt_oss.errors import CheckpointError, UsageError
from megatron.gpt_oss.presets import Preset
from megatron.gpt_oss.progress import Progress

MXFP4 = "mxfp4"
# What is not in MXFP4 is in bfloat16, in published files too.
DTYPES = {
    "bf16": (torch.bfloat16, "bfloat16"),
    "fp32": (torch.float32, "float32"),
    MXFP4: (torch.bfloat16, "bfloat16"),
}
# config.json of openai/gpt-oss-20b.
QUANTIZATION_CONFIG = {
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
    "quant_method": MXFP4,
}
MAX_SHARD_BYTES = 5 * 10**9  # the size of the shards that transformers writes


@dataclass(frozen=True)
class Piece:
    """Rows `first` to `stop` of the `rows` that a tensor has; of an expert matrix, one expert."""

    name: str
    first: int
    stop: int
    rows: int


@dataclass
class FilePlan:
    """Which weights go into which file.

    Attributes:
        dtype: of the export.
        files: the names of `hf_names` in each file.
        stored: (name, dtype, shape) of what a name of `hf_names` is stored as.
    """

    dtype: str
    files: dict[str, list[str]] = field(default_factory=dict)
    stored: dict[str, list[tuple[str, torch.dtype, tuple]]] = field(default_factory=dict)

    @classmethod
    def of(
        cls, preset: Preset, dtype: str, max_bytes: int, weight_map: dict[str, str] | None = None
    ) -> "FilePlan":
        """Files of at most `max_bytes` in the order of the forward, or those of `weight_map`.

        Raises:
            UsageError: there is no such dtype, or its blocks do not fit the model.
        """
        if dtype not in DTYPES:
            raise UsageError(f"Unknown dtype '{dtype}'. Choose one of {', '.join(DTYPES)}.")
        plan = cls(dtype)
        for name in hf_names(preset):
            plan.stored[name] = _stored_as(name, hf_shape(name, preset), dtype)
        stored = [name for tensors in plan.stored.values() for name, _, _ in tensors]
        if weight_map is not None and set(weight_map) == set(stored):
            for name, tensors in plan.stored.items():
                plan.files.setdefault(weight_map[tensors[0][0]], []).append(name)
            # A file that holds half of a pair is nobody's: then the map is not gone by.
            if all(weight_map[n] == f for f in plan.files for n in plan.stored_names(f)):
                return plan
            plan.files = {}
        shards: list[list[str]] = [[]]
        size = 0
        for name in plan.stored:
            if shards[-1] and size + plan.bytes_of(name) > max_bytes:
                shards.append([])
                size = 0
            shards[-1].append(name)
            size += plan.bytes_of(name)
        for number, names in enumerate(shards):
            of_many = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
            plan.files[of_many if len(shards) > 1 else SINGLE_NAME] = names
        return plan

    def bytes_of(self, name: str, rows: int | None = None) -> int:
        """Bytes of what is stored for a name, or for some rows (experts) of it."""
        return sum(
            (s[0] if rows is None else rows) * math.prod(s[1:]) * d.itemsize
            for _, d, s in self.stored[name]
        )

    def bytes_total(self) -> int:
        """Bytes of all weights."""
        return sum(self.bytes_of(name) for name in self.stored)

    def stored_names(self, file: str) -> list[str]:
        """Names of the tensors in a file."""
        return [stored for name in self.files[file] for stored, _, _ in self.stored[name]]

    def pieces(self, file: str) -> list["Piece"]:
        """What is read at a time: tensors, each expert's part, some rows of the vocabulary."""
        pieces = []
        for name in self.files[file]:
            rows, *others = self.stored[name][0][2]
            most = rows
            if is_expert_matrix(name):
                most = 1
            elif is_vocabulary_matrix(name):
                most = max(LARGEST_PART // math.prod(others), 1)
            for first in range(0, rows, most):
                pieces.append(Piece(name, first, min(first + most, rows), rows))
        return pieces

    def header(self, file: str) -> list[tuple[str, torch.dtype, tuple]]:
        """The tensors of a file in the order in which they lie there, bytes last."""
        tensors = [tensor for name in self.files[file] for tensor in self.stored[name]]
        return sorted(tensors, key=lambda tensor: -tensor[1].itemsize)


def _stored_as(name: str, shape: tuple, dtype: str) -> list[tuple[str, torch.dtype, tuple]]:
    if dtype != MXFP4 or not is_expert_matrix(name):
        return [(name, DTYPES[dtype][0], shape)]
    experts, fan_in, fan_out = shape
    if fan_in % BLOCK:
        raise UsageError(
            f"--dtype {MXFP4}: '{name}' has {fan_in} inputs, and MXFP4 needs multiples of "
            f"{BLOCK}. Give --dtype bf16."
        )
    groups = (experts, fan_out, fan_in // BLOCK)
    blocks, scales = (name + suffix for suffix in MXFP4_SUFFIXES)
    return [(blocks, torch.uint8, (*groups, BLOCK // 2)), (scales, torch.uint8, groups)]


def write_hf(
    source: MegatronSource,
    preset: Preset,
    config: dict,
    folder: Path,
    dtype: str = "bf16",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write config and weights of a model into an existing folder.

    Args:
        source: gives Megatron's tensors.
        preset: the model's sizes.
        config: config.json; its dtype field is set.
        folder: where to.
        dtype: see `export_hf`.
        max_shard_bytes: size of one file.
    """
    plan = FilePlan.of(preset, dtype, max_shard_bytes)
    write_weights(source, preset, plan, folder)
    write_config(config, dtype, folder)


def write_weights(
    source: MegatronSource,
    preset: Preset,
    plan: FilePlan,
    folder: Path,
    work: Unfinished | None = None,
    bar: Progress | None = None,
) -> None:
    """Write the weight files and their index.

    Args:
        source: gives Megatron's tensors.
        preset: the model's sizes.
        plan: which files.
        folder: where to.
        work: the files that it knows to be done are left out.
        bar: told of every tensor.
    """
    files = [file for file in plan.files if work is None or file not in work.done]
    before = [name for file in plan.files if file not in files for name in plan.files[file]]
    if bar is not None:
        bar.begin_at(sum(map(plan.bytes_of, before)))
    pieces = [piece for file in files for piece in plan.pieces(file)]
    values = read_ahead(lambda piece: _values(piece, source, preset, plan), pieces)
    count = len(before)
    for file in files:
        with SafetensorsWriter(folder / file, plan.header(file)) as writer:
            for piece in plan.pieces(file):
                for (stored, _, _), value in zip(plan.stored[piece.name], next(values)):
                    writer.write(stored, value, piece.first)
                count += piece.stop == piece.rows
                size = plan.bytes_of(piece.name, piece.stop - piece.first)
                if work is not None:
                    work.written(file, size)
                if bar is not None:
                    bar.advance(size, f"{count} of {len(plan.stored)} tensors")
        if work is not None:
            work.finish(file)
    if list(plan.files) == [SINGLE_NAME]:
        return
    weight_map = {stored: file for file in plan.files for stored in plan.stored_names(file)}
    index = {"metadata": {"total_size": plan.bytes_total()}, "weight_map": weight_map}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (folder / INDEX_NAME).write_text(text, encoding="utf-8")


def _values(
    piece: Piece, source: MegatronSource, preset: Preset, plan: FilePlan
) -> tuple[torch.Tensor, ...]:
    """What is stored for a piece."""
    name = piece.name
    if not is_expert_matrix(name):
        rows = slice(piece.first, piece.stop)
        value = megatron_to_hf(name, preset, source, rows=rows)
        return (as_contiguous(value, plan.stored[name][0][1]),)
    expert = piece.first
    if plan.dtype != MXFP4:
        value = megatron_to_hf(name, preset, source, expert)
        return (as_contiguous(value, plan.stored[name][0][1]),)
    try:
        blocks, scales = quantize(expert_matrix(name, source, expert))
    except ValueError as error:
        raise CheckpointError(
            f"'{name}' of the checkpoint, expert {expert}, cannot be rounded to MXFP4: {error}."
        ) from error
    if name.endswith("gate_up_proj"):  # a quarter of the bytes that there were before rounding
        return interleave_gate_up(blocks), interleave_gate_up(scales)
    return blocks, scales


def write_config(config: dict, dtype: str, folder: Path) -> None:
    """Write config.json for weights of this dtype."""
    config = {k: v for k, v in config.items() if k not in ("torch_dtype", "quantization_config")}
    config["dtype"] = DTYPES[dtype][1]
    if dtype == MXFP4:
        config["quantization_config"] = QUANTIZATION_CONFIG
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (folder / CONFIG_NAME).write_text(text, encoding="utf-8")
