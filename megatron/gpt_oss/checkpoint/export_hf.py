# Copyright (c) 2026, the megatron-core gptoss authors.

"""Write a Hugging Face gpt-oss folder from a Megatron checkpoint, tensor by tensor.

Needs no process group and no model: one process reads a torch_dist checkpoint that any parallel
layout saved, an expert at a time, and writes each where the file's header says that it lies. The
folder appears when it is whole; a killed export goes on with the next file.
"""

import dataclasses
from pathlib import Path

from megatron.gpt_oss.checkpoint.checkpoint_model import (
    check_same_constants,
    check_same_sizes,
    preset_of_checkpoint,
    vocabulary_of,
)
from megatron.gpt_oss.checkpoint.hf.auxiliary_files import (
    check_tokenizer,
    companion_files,
    copy_companions,
)
from megatron.gpt_oss.checkpoint.hf.config import (
    CONFIG_NAME,
    check_hf_config,
    hf_config_from_preset,
    preset_from_hf_config,
    read_hf_config,
    with_yarn_factor,
)
from megatron.gpt_oss.checkpoint.hf.fields import is_number
from megatron.gpt_oss.checkpoint.hf.reader import INDEX_NAME, read_weight_map
from megatron.gpt_oss.checkpoint.hf.writer import (
    MAX_SHARD_BYTES,
    FilePlan,
    write_config,
    write_weights,
)
from megatron.gpt_oss.checkpoint.resumable_output import TO_HF, fingerprint, unfinished
from megatron.gpt_oss.checkpoint.torch_dist.reader import (
    COMPANIONS_NAME,
    TorchDistReader,
    find_iteration,
)
from megatron.gpt_oss.errors import UsageError
from megatron.gpt_oss.progress import Progress
from megatron.gpt_oss.training.run_file import find_run_file, recorded_arguments


def export_hf(
    checkpoint: str | Path,
    out: str | Path,
    like: str | Path | None = None,
    dtype: str = "bf16",
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: bool = False,
    yarn_factor: float | None = None,
    vocab_size: int | None = None,
) -> Path:
    """Write a torch_dist checkpoint as a Hugging Face folder.

    Args:
        checkpoint: a --save folder (its latest iteration is taken) or one iter_* folder.
        out: the folder to write; must not exist, or be empty.
        like: a Hugging Face gpt-oss folder whose config, tokenizer and other small files are taken
            over, and the names of its weight files where they hold the same tensors. By default
            what `convert to-megatron` put beside the checkpoint. Without either the config is read
            off the tensors' shapes and the arguments of the run, and there is no tokenizer.
        dtype: "bf16", "fp32" or "mxfp4" (the experts' matrices, rounded to nearest; the rest
            in bf16), of the weights written.
        overwrite: `out` may be an earlier export, with no file besides; it is replaced once the
            new one is complete.
        max_shard_bytes: size of one file.
        progress: show a line on stderr.
        yarn_factor: with which the model was trained, where that extends the context of `like`; by
            default what the checkpoint, or run.json in the run's folder, says.
        vocab_size: rows of the vocabulary to write; by default all that are not padding, see
            `vocabulary_of`.
    Returns:
        The folder.
    Raises:
        UsageError: no or a damaged checkpoint, another model than `like`, `out` is not empty, or
            the disk has no room.
    """
    job = ExportJob(checkpoint, like, dtype, max_shard_bytes, yarn_factor, vocab_size)
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
        vocab_size: int | None = None,
    ):
        iteration = find_iteration(checkpoint)
        self.checkpoint = Path(checkpoint)
        if like is None and (iteration.parent / COMPANIONS_NAME / CONFIG_NAME).is_file():
            like = iteration.parent / COMPANIONS_NAME
        self.like = None if like is None else Path(like)
        self.reader = TorchDistReader(iteration)
        held = preset_of_checkpoint(self.reader)
        self.config = hf_config_from_preset(held)
        weight_map = None
        if self.like is not None:
            self.config = dict(read_hf_config(self.like))
            check_same_sizes(held, preset_from_hf_config(self.config), checkpoint, self.like)
            check_tokenizer(self.like)
            weight_map = _weight_map(self.like)
        self._extend(yarn_factor, iteration)
        described = preset_from_hf_config(self.config)
        asked = () if yarn_factor is None else ("rotary_scaling_factor",)
        check_same_constants(self.reader, described, checkpoint, self.like or "its config", asked)
        like_rows = None if self.like is None else described.vocab_size
        self.vocabulary = vocabulary_of(self.reader, like_rows, vocab_size)
        self.config["vocab_size"] = self.vocabulary.rows
        check_hf_config(self.config, self.like or CONFIG_NAME)
        self.preset = dataclasses.replace(described, vocab_size=self.vocabulary.rows)
        self.plan = FilePlan.of(self.preset, dtype, max_shard_bytes, weight_map)

    def _extend(self, asked: float | None, iteration: Path) -> None:
        """Write YaRN's factor of the training into the config, where it extends the context."""
        factor = asked or self.reader.arguments().get("rotary_scaling_factor")
        factor = factor or _trained_factor(iteration)
        own = preset_from_hf_config(self.config).yarn_factor
        if factor is not None and factor != own and (asked is not None or factor > own):
            self.config = with_yarn_factor(self.config, factor)

    def run(self, out: Path, overwrite: bool = False, progress: bool = False) -> Path:
        """Write the folder, see `export_hf`."""
        needed = self.plan.bytes_total()
        companions = [] if self.like is None else companion_files(self.like)
        names = {*self.plan.files, INDEX_NAME, CONFIG_NAME, *(path.name for path in companions)}
        inputs = [self.checkpoint, self.reader.folder, *filter(None, [self.like])]
        with unfinished(
            out, self.task(), needed, overwrite, names=names, made_by=TO_HF, inputs=inputs
        ) as work:
            if work.complete:
                return out
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
    path = find_run_file(iteration.parent.parent)
    try:
        factor = recorded_arguments(path).get("yarn_factor") if path is not None else None
    except UsageError:
        return None
    return factor if is_number(factor) else None


def _weight_map(folder: Path) -> dict[str, str] | None:
    """Which file holds what in a folder with an index, if it can be read."""
    try:
        return read_weight_map(folder / INDEX_NAME)
    except UsageError:
        return None
