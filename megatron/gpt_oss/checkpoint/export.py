# Copyright (c) 2026, the megatron-core gptoss authors.

"""Write a Hugging Face gpt-oss folder from a Megatron checkpoint, tensor by tensor.

Needs no process group and no model: one process reads a torch_dist checkpoint that any parallel
layout saved, an expert at a time, and writes each where the file's header says that it lies. The
folder appears when it is whole; a killed export goes on with the next file.
"""

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megatron.gpt_oss.checkpoint.companions import check_tokenizer, copy_companions
from megatron.gpt_oss.checkpoint.hf_config import (
    CONFIG_NAME,
    hf_config_from_preset,
    preset_from_hf_config,
    read_hf_config,
)
from megatron.gpt_oss.checkpoint.hf_reader import INDEX_NAME, MXFP4_SUFFIXES, SINGLE_NAME
from megatron.gpt_oss.checkpoint.load import sharded_tensors
from megatron.gpt_oss.checkpoint.mapping import (
    FC1,
    QKV,
    MegatronSource,
    as_contiguous,
    hf_names,
    hf_shape,
    is_expert_matrix,
    locate,
    megatron_to_hf,
)
from megatron.gpt_oss.checkpoint.mxfp4 import BLOCK, quantize
from megatron.gpt_oss.checkpoint.read_ahead import read_ahead
from megatron.gpt_oss.checkpoint.safetensors_file import SafetensorsWriter, safetensors_header
from megatron.gpt_oss.checkpoint.torch_dist_reader import (
    COMPANIONS_NAME,
    TorchDistReader,
    find_iteration,
)
from megatron.gpt_oss.checkpoint.unfinished import Unfinished, fingerprint, unfinished
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


def export_hf(
    checkpoint: str | Path,
    out: str | Path,
    like: str | Path | None = None,
    dtype: str = "bf16",
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: bool = False,
) -> Path:
    """Write a torch_dist checkpoint as a Hugging Face folder.

    Args:
        checkpoint: a --save folder (its latest iteration is taken) or one iter_* folder.
        out: the folder to write; must not exist, or be empty.
        like: a Hugging Face gpt-oss folder whose config, tokenizer and other small files are taken
            over, and the names of its weight files where they hold the same tensors. By default
            what `convert to-megatron` put beside the checkpoint. Without either the config is read
            off the tensors' shapes, all else as in the published models, and there is no tokenizer.
        dtype: "bf16", "fp32" or "mxfp4" (the experts' matrices, rounded to nearest; the rest
            in bf16), of the weights written.
        overwrite: `out` may be a model folder; it is replaced once the new one is whole.
        max_shard_bytes: size of one file.
        progress: show a line on stderr.
    Returns:
        The folder.
    Raises:
        UsageError: no or a damaged checkpoint, another model than `like`, `out` is not empty, or
            the disk has no room.
    """
    return ExportJob(checkpoint, like, dtype, max_shard_bytes).run(Path(out), overwrite, progress)


class ExportJob:
    """An export that has been checked and can begin; see `export_hf` for arguments and errors."""

    def __init__(
        self,
        checkpoint: str | Path,
        like: str | Path | None = None,
        dtype: str = "bf16",
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ):
        iteration = find_iteration(checkpoint)
        if like is None and (iteration.parent / COMPANIONS_NAME / CONFIG_NAME).is_file():
            like = iteration.parent / COMPANIONS_NAME
        self.like = None if like is None else Path(like)
        self.reader = TorchDistReader(iteration)
        self.preset = preset_from_shapes(self.reader)
        self.config = hf_config_from_preset(self.preset)
        weight_map = None
        if self.like is not None:
            self.config = dict(read_hf_config(self.like))
            wanted = preset_from_hf_config(self.config)
            self.preset = check_same_sizes(self.preset, wanted, checkpoint, self.like)
            check_tokenizer(self.like)
            weight_map = _weight_map(self.like)
        self.plan = FilePlan.of(self.preset, dtype, max_shard_bytes, weight_map)

    def run(self, out: Path, overwrite: bool = False, progress: bool = False) -> Path:
        """Write the folder, see `export_hf`."""
        needed = self.plan.bytes_total()
        with unfinished(out, self.task(), needed, overwrite) as work:
            with Progress(needed, "GB", 1e-9, progress) as bar:
                write_weights(self.reader, self.preset, self.plan, work.folder, work, bar)
            _write_config(self.config, self.plan.dtype, work.folder)
            if self.like is not None:
                copy_companions(self.like, work.folder)
        return out

    def task(self) -> dict:
        """What makes the result what it is."""
        return {
            "direction": "to Hugging Face",
            "source": fingerprint([self.reader.folder / ".metadata"]),
            "dtype": self.plan.dtype,
            "config": self.config,
            "files": list(self.plan.files),
        }


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

    def bytes_of(self, name: str, expert: int | None = None) -> int:
        """Bytes of what is stored for a name, or for one expert of it."""
        first = 0 if expert is None else 1
        return sum(math.prod(s[first:]) * d.itemsize for _, d, s in self.stored[name])

    def bytes_total(self) -> int:
        """Bytes of all weights."""
        return sum(self.bytes_of(name) for name in self.stored)

    def stored_names(self, file: str) -> list[str]:
        """Names of the tensors in a file."""
        return [stored for name in self.files[file] for stored, _, _ in self.stored[name]]

    def pieces(self, file: str, preset: Preset) -> list[tuple[str, int | None]]:
        """What is read at a time: tensors, and each expert's part of the large ones."""
        return [
            (name, expert)
            for name in self.files[file]
            for expert in (range(preset.num_experts) if is_expert_matrix(name) else (None,))
        ]

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
            f"--dtype {MXFP4}: '{name}' has {fan_in} inputs, and MXFP4 takes them in blocks of "
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
    _write_config(config, dtype, folder)


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
    pieces = [piece for file in files for piece in plan.pieces(file, preset)]
    values = read_ahead(
        lambda piece: _values(*piece, source, preset, plan), pieces, lambda p: plan.bytes_of(*p)
    )
    count = len(before)
    for file in files:
        with SafetensorsWriter(folder / file, plan.header(file)) as writer:
            for name, expert in plan.pieces(file, preset):
                for (stored, _, _), value in zip(plan.stored[name], next(values)):
                    writer.write(stored, value, expert or 0)
                count += expert is None or expert == preset.num_experts - 1
                if bar is not None:
                    note = f"{count} of {len(plan.stored)} tensors"
                    bar.advance(plan.bytes_of(name, expert), note)
        if work is not None:
            work.finish(file)
    if list(plan.files) == [SINGLE_NAME]:
        return
    weight_map = {stored: file for file in plan.files for stored in plan.stored_names(file)}
    index = {"metadata": {"total_size": plan.bytes_total()}, "weight_map": weight_map}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (folder / INDEX_NAME).write_text(text, encoding="utf-8")


def _values(
    name: str, expert: int | None, source: MegatronSource, preset: Preset, plan: FilePlan
) -> tuple[torch.Tensor, ...]:
    """What is stored for a tensor, or for one expert's part of it."""
    dtype = plan.stored[name][0][1]
    value = megatron_to_hf(name, preset, source, expert)
    if plan.dtype != MXFP4 or expert is None:
        return (as_contiguous(value, dtype),)
    try:
        return quantize(value.transpose(0, 1))
    except ValueError as error:
        raise CheckpointError(
            f"'{name}' of the checkpoint, expert {expert}, cannot be rounded to MXFP4: {error}."
        ) from error


def _write_config(config: dict, dtype: str, folder: Path) -> None:
    config = {k: v for k, v in config.items() if k not in ("torch_dtype", "quantization_config")}
    config["dtype"] = DTYPES[dtype][1]
    if dtype == MXFP4:
        config["quantization_config"] = QUANTIZATION_CONFIG
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (folder / CONFIG_NAME).write_text(text, encoding="utf-8")


def _weight_map(folder: Path) -> dict[str, str] | None:
    """Which file holds what in a folder with an index, if it can be read."""
    try:
        index = json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))
        weight_map = index["weight_map"]
        if all(os.path.basename(file) == file for file in weight_map.values()):
            return weight_map
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return None


class ModelSource:
    """A `MegatronSource` over a live model that one rank holds whole (TP, PP and EP of 1).

    Args:
        model: a GPTModel, unwrapped.
    """

    def __init__(self, model: torch.nn.Module):
        self._whole: dict[str, torch.Tensor] = {}
        self._layers: dict[tuple[str, int], torch.Tensor] = {}
        with torch.no_grad():
            for part in sharded_tensors(model.sharded_state_dict()):
                where = locate(part.key, part.global_offset, part.local_shape)
                prepended = part.prepend_axis_num
                shape = part.global_shape[prepended:]
                index = where.index
                if where.layer is None:
                    target = self._whole.setdefault(where.key, part.data.new_empty(shape))
                else:
                    if where.expert is not None:
                        shape = (part.global_shape[prepended - 1], *shape)
                        index = (where.expert, *index)
                    at = (where.key, where.layer)
                    target = self._layers.setdefault(at, part.data.new_empty(shape))
                target[index] = part.data

    def whole(self, key: str) -> torch.Tensor:
        """See `MegatronSource`."""
        return self._whole[key]

    def layer(self, keys: tuple[str, ...], layer: int, expert: int | None = None) -> torch.Tensor:
        """See `MegatronSource`."""
        tensor = next(self._layers[key, layer] for key in keys if (key, layer) in self._layers)
        return tensor if expert is None else tensor[expert]


def preset_from_shapes(reader: TorchDistReader) -> Preset:
    """The sizes that a checkpoint's tensors imply; the rest as all gpt-oss models have it.

    Raises:
        CheckpointError: a tensor of gpt-oss is missing.
    """
    vocab_size, hidden_size = reader.shape("embedding.word_embeddings.weight")
    (num_heads,) = reader.shape("self_attention.core_attention.softmax_offset")
    _, query_rows = reader.shape("self_attention.linear_proj.weight")
    qkv_rows, _ = reader.shape(QKV + "weight")
    num_experts, fc1_rows, _ = reader.shape(FC1 + "weight")
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


def check_same_sizes(
    found: Preset, wanted: Preset, checkpoint: str | Path, like: str | Path
) -> Preset:
    """The sizes of `like`, if the checkpoint has them (its vocabulary may be padded)."""
    for field in (
        "num_layers",
        "hidden_size",
        "num_attention_heads",
        "num_query_groups",
        "head_dim",
        "num_experts",
        "moe_ffn_hidden_size",
    ):
        if getattr(found, field) != getattr(wanted, field):
            raise CheckpointError(
                f"{checkpoint} has {field} = {getattr(found, field)}, {like} has "
                f"{getattr(wanted, field)}. Give the Hugging Face folder that training began with."
            )
    if found.vocab_size < wanted.vocab_size:
        raise CheckpointError(
            f"{checkpoint} has {found.vocab_size} rows of vocabulary, {like} has "
            f"{wanted.vocab_size}. Give the Hugging Face folder that training began with."
        )
    return wanted
