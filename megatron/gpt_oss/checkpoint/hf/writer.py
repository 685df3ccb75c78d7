# Copyright (c) 2026, the megatron-core gptoss authors.

"""Write the weight files of a Hugging Face directory from Megatron's tensors, part by part."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Iterator

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
from megatron.gpt_oss.checkpoint.resumable_output import ResumableOutput
from megatron.gpt_oss.checkpoint.torch_dist.layout import LARGEST_PART
from megatron.gpt_oss.errors import CheckpointError, UsageError
from megatron.gpt_oss.presets import Preset
from megatron.gpt_oss.progress import advance, progress_bar

MXFP4 = "mxfp4"
# With MXFP4 the other tensors are in bfloat16, as in the published files.
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
MAX_SHARD_BYTES = 5 * 10**9  # default of transformers


@dataclass(frozen=True)
class Piece:
    """Rows `first` to `stop` of a tensor with `rows` rows; each expert matrix is one row."""

    name: str
    first: int
    stop: int
    rows: int


@dataclass
class FilePlan:
    """The tensors of each weight file.

    Attributes:
        dtype: of the export.
        files: {file name: names of `hf_names`}.
        stored: {name of `hf_names`: (name, dtype, shape) of each stored tensor}.
    """

    dtype: str
    files: dict[str, list[str]] = field(default_factory=dict)
    stored: dict[str, list[tuple[str, torch.dtype, tuple]]] = field(default_factory=dict)

    @classmethod
    def of(
        cls, preset: Preset, dtype: str, max_bytes: int, weight_map: dict[str, str] | None = None
    ) -> "FilePlan":
        """Plan files of at most `max_bytes` in model order, or those of `weight_map` if it fits.

        Raises:
            UsageError: unknown dtype, or the model's sizes are not multiples of the MXFP4 block.
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
            # Ignore a map that splits an MXFP4 pair over two files.
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

    def bytes_of(self, name: str) -> int:
        """Bytes of the tensors that are stored for a name."""
        return sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in self.stored[name])

    def bytes_of_piece(self, piece: Piece) -> int:
        """Bytes of the rows (experts) of a piece."""
        return self.bytes_of(piece.name) * (piece.stop - piece.first) // piece.rows

    def bytes_total(self) -> int:
        """Bytes of all stored tensors."""
        return sum(self.bytes_of(name) for name in self.stored)

    def stored_names(self, file: str) -> list[str]:
        """Names of the stored tensors of a file."""
        return [stored for name in self.files[file] for stored, _, _ in self.stored[name]]

    def pieces(self, file: str) -> list["Piece"]:
        """The parts of a file that one read covers: a tensor, an expert, rows of the vocabulary."""
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
        """The stored tensors of a file in file order: descending item size."""
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
    directory: Path,
    dtype: str = "bf16",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write config and weights of a model into an existing directory.

    Args:
        source: provides Megatron's tensors.
        preset: the model's sizes.
        config: config.json; its dtype field is set.
        directory: the output directory.
        dtype: see `export_hf`.
        max_shard_bytes: maximum size of a file.
    """
    plan = FilePlan.of(preset, dtype, max_shard_bytes)
    write_weights(source, preset, plan, directory)
    write_config(config, dtype, directory)


def write_weights(
    source: MegatronSource,
    preset: Preset,
    plan: FilePlan,
    directory: Path,
    work: ResumableOutput | None = None,
    progress: bool = False,
) -> None:
    """Write the weight files and their index.

    Args:
        source: provides Megatron's tensors.
        preset: the model's sizes.
        plan: the tensors of each file.
        directory: the output directory.
        work: records the finished files; the files that it has already are skipped.
        progress: show a bar on stderr.
    """
    files = [file for file in plan.files if work is None or file not in work.done]
    pieces = [piece for file in files for piece in plan.pieces(file)]
    values = read_ahead(lambda piece: _values(piece, source, preset, plan), pieces)
    total, remaining = plan.bytes_total(), sum(map(plan.bytes_of_piece, pieces))
    with progress_bar(total, enabled=progress, initial=total - remaining) as bar:
        for file in files:
            for size in _write_file(directory / file, plan, values):
                advance(bar, size, file)
                if work is not None:
                    work.written(file, size)
            if work is not None:
                work.finish(file)
    _write_index(plan, directory)


def _write_file(
    path: Path, plan: FilePlan, values: Iterator[tuple[torch.Tensor, ...]]
) -> Iterator[int]:
    """Write the pieces of a file; yields the bytes of each."""
    with SafetensorsWriter(path, plan.header(path.name)) as writer:
        for piece in plan.pieces(path.name):
            for (stored, _, _), value in zip(plan.stored[piece.name], next(values)):
                writer.write(stored, value, piece.first)
            yield plan.bytes_of_piece(piece)


def _write_index(plan: FilePlan, directory: Path) -> None:
    """Write the index of a model of several files."""
    if list(plan.files) == [SINGLE_NAME]:
        return
    weight_map = {stored: file for file in plan.files for stored in plan.stored_names(file)}
    index = {"metadata": {"total_size": plan.bytes_total()}, "weight_map": weight_map}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (directory / INDEX_NAME).write_text(text, encoding="utf-8")


def _values(
    piece: Piece, source: MegatronSource, preset: Preset, plan: FilePlan
) -> tuple[torch.Tensor, ...]:
    """The stored tensors of a piece."""
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
    if name.endswith("gate_up_proj"):  # after rounding, because it moves a quarter of the bytes
        return interleave_gate_up(blocks), interleave_gate_up(scales)
    return blocks, scales


def write_config(config: dict, dtype: str, directory: Path) -> None:
    """Write config.json for weights of a dtype."""
    config = {k: v for k, v in config.items() if k not in ("torch_dtype", "quantization_config")}
    config["dtype"] = DTYPES[dtype][1]
    if dtype == MXFP4:
        config["quantization_config"] = QUANTIZATION_CONFIG
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (directory / CONFIG_NAME).write_text(text, encoding="utf-8")
