# Copyright (c) 2026, the megatron-core gptoss authors.

"""Write a Hugging Face gpt-oss folder from a Megatron checkpoint, tensor by tensor.

Needs no process group and no model: one process reads a torch_dist checkpoint that any parallel
layout saved, an expert at a time, and writes each where the file's header says that it lies. The
folder appears when it is whole; a killed export goes on with the next file.
"""

import json
import os
from pathlib import Path

from megatron.gpt_oss.checkpoint.companions import check_tokenizer, copy_companions
from megatron.gpt_oss.checkpoint.hf_config import (
    CONFIG_NAME,
    hf_config_from_preset,
    preset_from_hf_config,
    read_hf_config,
    with_yarn_factor,
)
from megatron.gpt_oss.checkpoint.hf_reader import INDEX_NAME
from megatron.gpt_oss.checkpoint.hf_writer import (
    MAX_SHARD_BYTES,
    FilePlan,
    write_config,
    write_weights,
)
from megatron.gpt_oss.checkpoint.mapping import FC1, QKV
from megatron.gpt_oss.checkpoint.torch_dist_reader import (
    COMPANIONS_NAME,
    TorchDistReader,
    find_iteration,
)
from megatron.gpt_oss.checkpoint.unfinished import fingerprint, unfinished
from megatron.gpt_oss.errors import CheckpointError
from megatron.gpt_oss.presets import Preset
from megatron.gpt_oss.progress import Progress


def export_hf(
    checkpoint: str | Path,
    out: str | Path,
    like: str | Path | None = None,
    dtype: str = "bf16",
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: bool = False,
    yarn_factor: float | None = None,
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
        yarn_factor: with which the model was trained, where that extends the context of `like`; by
            default what arguments.json in the run's folder says.
    Returns:
        The folder.
    Raises:
        UsageError: no or a damaged checkpoint, another model than `like`, `out` is not empty, or
            the disk has no room.
    """
    job = ExportJob(checkpoint, like, dtype, max_shard_bytes, yarn_factor)
    return job.run(Path(out), overwrite, progress)


class ExportJob:
    """An export that has been checked and can begin; see `export_hf` for arguments and errors."""

    def __init__(
        self,
        checkpoint: str | Path,
        like: str | Path | None = None,
        dtype: str = "bf16",
        max_shard_bytes: int = MAX_SHARD_BYTES,
        yarn_factor: float | None = None,
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
        factor = yarn_factor or _trained_factor(iteration)
        if factor is not None and factor != preset_from_hf_config(self.config).yarn_factor:
            self.config = with_yarn_factor(self.config, factor)
        self.plan = FilePlan.of(self.preset, dtype, max_shard_bytes, weight_map)

    def run(self, out: Path, overwrite: bool = False, progress: bool = False) -> Path:
        """Write the folder, see `export_hf`."""
        needed = self.plan.bytes_total()
        with unfinished(out, self.task(), needed, overwrite) as work:
            with Progress(needed, "GB", 1e-9, progress) as bar:
                write_weights(self.reader, self.preset, self.plan, work.folder, work, bar)
            write_config(self.config, self.plan.dtype, work.folder)
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


def _trained_factor(iteration: Path) -> float | None:
    """YaRN's factor of the run that wrote RUN/checkpoints/iter_*, if it gave one."""
    try:
        text = (iteration.parent.parent / "arguments.json").read_text(encoding="utf-8")
        return json.loads(text).get("yarn_factor")
    except (OSError, ValueError, AttributeError):
        return None


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
