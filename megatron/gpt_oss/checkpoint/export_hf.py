# Copyright (c) 2026, the megatron-core gptoss authors.

"""Convert a Megatron checkpoint to a Hugging Face gpt-oss directory, expert by expert.

One process without process group and model reads a torch_dist checkpoint of any parallel layout and
writes each part at its offset in a safetensors file. The directory appears when it is complete. A
killed export resumes with the next file.
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
    auxiliary_files,
    check_tokenizer,
    copy_auxiliary_files,
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
from megatron.gpt_oss.checkpoint.resumable_output import (
    TO_HF,
    TO_MEGATRON,
    fingerprint,
    open_output,
)
from megatron.gpt_oss.checkpoint.torch_dist.reader import (
    AUXILIARY_NAME,
    TorchDistReader,
    find_iteration,
)
from megatron.gpt_oss.errors import CheckpointError, UsageError
from megatron.gpt_oss.outputs import changed_file, record_of
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
    """Convert a torch_dist checkpoint to a Hugging Face directory.

    Args:
        checkpoint: a --save directory (its latest iteration) or one iter_* directory.
        out: output directory; must be empty or not exist.
        like: a Hugging Face gpt-oss directory to copy config, tokenizer and other small files from,
            and the names of its weight files if they have the same tensors. By default the files
            that `convert to-megatron` saved with the checkpoint. Without either, the config follows
            from tensor shapes and run arguments, and there is no tokenizer.
        dtype: of the weights: "bf16", "fp32" or "mxfp4" (expert matrices rounded to nearest, other
            tensors in bf16).
        overwrite: replace an earlier export in `out` once the new one is complete. `out` must not
            have other files.
        max_shard_bytes: maximum size of a file.
        progress: show a bar on stderr.
        yarn_factor: YaRN factor of the training if it extended the context of `like`; by default
            that of the checkpoint or of run.json.
        vocab_size: rows of the vocabulary to write; by default all but padding, see
            `vocabulary_of`.
    Returns:
        The output directory.
    Raises:
        UsageError: the checkpoint is missing or damaged, `like` is another model, `out` is not
            empty, or the disk has not enough space.
    """
    job = ExportJob(checkpoint, like, dtype, max_shard_bytes, yarn_factor, vocab_size)
    return job.run(Path(out), overwrite, progress)


class ExportJob:
    """An export whose inputs are checked; see `export_hf` for arguments and errors."""

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
        self.like = _saved_with(iteration.parent) if like is None else Path(like)
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
        """Set the YaRN factor of the training in the config if it extends the context."""
        factor = asked or self.reader.arguments().get("rotary_scaling_factor")
        factor = factor or _trained_factor(iteration)
        own = preset_from_hf_config(self.config).yarn_factor
        if factor is not None and factor != own and (asked is not None or factor > own):
            self.config = with_yarn_factor(self.config, factor)

    def run(self, out: Path, overwrite: bool = False, progress: bool = False) -> Path:
        """Write the directory, see `export_hf`."""
        needed = self.plan.bytes_total()
        auxiliary = [] if self.like is None else auxiliary_files(self.like)
        names = {*self.plan.files, INDEX_NAME, CONFIG_NAME, *(path.name for path in auxiliary)}
        inputs = [self.checkpoint, self.reader.directory, *filter(None, [self.like])]
        with open_output(
            out, self.task(), needed, overwrite, names=names, made_by=TO_HF, inputs=inputs
        ) as work:
            if work.complete:
                return out
            write_weights(self.reader, self.preset, self.plan, work.directory, work, progress)
            write_config(self.config, self.plan.dtype, work.directory)
            if self.like is not None:
                copy_auxiliary_files(self.like, work.directory)
        return out

    def task(self) -> dict:
        """All that determines the output; a run with another value cannot resume this one."""
        return {
            "direction": "to Hugging Face",
            "source": fingerprint([self.reader.directory / ".metadata"]),
            "dtype": self.plan.dtype,
            "config": self.config,
            "files": list(self.plan.files),
        }


def _saved_with(checkpoint: Path) -> Path | None:
    """The directory of the files that `convert to-megatron` saved with a checkpoint, if it did.

    Raises:
        CheckpointError: one was changed or deleted since. The directory as a whole may be gone.
    """
    directory = checkpoint / AUXILIARY_NAME
    if not directory.is_dir():
        return None
    name = changed_file(checkpoint, record_of(checkpoint, TO_MEGATRON), AUXILIARY_NAME)
    if name is not None:
        raise CheckpointError(
            f"{checkpoint / name} is not the file that `{TO_MEGATRON}` wrote. If you changed it, give "
            f"--like {directory}; otherwise give --like and the Hugging Face "
            "directory that it came from."
        )
    return directory if (directory / CONFIG_NAME).is_file() else None


def _trained_factor(iteration: Path) -> float | None:
    """--yarn-factor of the run that wrote RUN/checkpoints/iter_*, or None."""
    path = find_run_file(iteration.parent.parent)
    try:
        factor = recorded_arguments(path).get("yarn_factor") if path is not None else None
    except UsageError:
        return None
    return factor if is_number(factor) else None


def _weight_map(directory: Path) -> dict[str, str] | None:
    """{tensor: file name} of a directory, or None without a valid index."""
    try:
        return read_weight_map(directory / INDEX_NAME)
    except UsageError:
        return None
