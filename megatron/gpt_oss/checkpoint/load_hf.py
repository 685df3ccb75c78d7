# Copyright (c) 2026, the megatron-core gptoss authors.

"""Load a Hugging Face model into a Megatron model at any parallel layout.

The sharded state dict of each rank says which shard of which global tensor it holds. The rank reads
only these shards from disk, without communication, one at a time.
"""

import logging
from pathlib import Path
from typing import Callable, Iterator, Sequence

import torch

from megatron.core.dist_checkpointing.mapping import (
    ShardedStateDict,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.utils import unwrap_model
from megatron.gpt_oss.checkpoint.architecture import arguments_of_model, check_same_function
from megatron.gpt_oss.checkpoint.hf.check import open_hf
from megatron.gpt_oss.checkpoint.mapping import (
    GLOBAL_NAMES,
    copy_matrix,
    hf_to_megatron,
    is_vocabulary_matrix,
    locate,
)
from megatron.gpt_oss.errors import CheckpointError
from megatron.gpt_oss.presets import Preset, extend_context

logger = logging.getLogger(__name__)


@torch.no_grad()
def load_hf(
    model_chunks: Sequence[torch.nn.Module], directory: str | Path, yarn_factor: float | None = None
) -> None:
    """Copy the weights of a Hugging Face gpt-oss directory into the parameters of a model.

    Call it before the optimizer is created, as `load_hf_hook` does. Otherwise an optimizer with
    main parameters needs `optimizer.reload_model_params()`.

    Args:
        model_chunks: this rank's chunks (several with virtual pipeline stages), wrapped or not.
        directory: BF16 or MXFP4 model.
        yarn_factor: of the model, if it extends the context of the directory.
    Raises:
        CheckpointError: the directory is incomplete or of another model, or does not fill every
            parameter.
    """
    directory = Path(directory)
    reader, preset = open_hf(directory)
    preset = extend_context(preset, yarn_factor)
    for chunk in unwrap_model(list(model_chunks)):
        check_same_function(
            preset,
            str(directory),
            arguments_of_model(chunk),
            "the model",
            "Choose the preset that matches the checkpoint.",
        )
        filled = 0
        for part in sharded_tensors(chunk.sharded_state_dict()):
            where = locate(part.key, part.global_offset, part.local_shape)
            _check_vocabulary(part, preset, directory)
            value = hf_to_megatron(where, preset, reader.read)
            assert value.shape == part.data.shape, (part.key, value.shape, part.data.shape)
            copy_matrix(part.data, value)
            filled += part.data.numel()
        expected = sum(parameter.numel() for parameter in chunk.parameters())
        if filled != expected:
            raise CheckpointError(
                f"{directory} filled {filled} of {expected} parameter elements of this rank. "
                "Is the model built with the preset's flags?"
            )
    logger.info(f"loaded Hugging Face weights from {directory}")


def _check_vocabulary(part: ShardedTensor, preset: Preset, directory: Path) -> None:
    """Reject a model with fewer vocabulary rows than the directory; additional rows are padding."""
    name = GLOBAL_NAMES.get(part.key)
    if name is None or not is_vocabulary_matrix(name):
        return
    rows = part.global_shape[part.prepend_axis_num]
    if rows < preset.vocab_size:
        raise CheckpointError(
            f"{directory} has {preset.vocab_size} rows of vocabulary, the model {rows}. Use "
            f"at least as many rows: --padded-vocab-size {preset.vocab_size}."
        )


def load_hf_hook(directory: str | Path, yarn_factor: float | None = None) -> Callable[[list], list]:
    """A hook for `GPTModelConfig.pre_wrap_hooks`, which run before DDP and optimizer copy weights."""

    def hook(model_chunks: list) -> list:
        load_hf(model_chunks, directory, yarn_factor)
        return model_chunks

    return hook


def sharded_tensors(state_dict: ShardedStateDict) -> Iterator[ShardedTensor]:
    """All tensors of a sharded state dict, including those of factories (gate and up of an expert).

    Their data are views of parameters, so that writing to them writes to the parameter.
    """
    stack = list(state_dict.values())
    while stack:
        value = stack.pop()
        if isinstance(value, ShardedTensorFactory):
            value = value.build()
        if isinstance(value, ShardedTensor):
            yield value
        elif isinstance(value, dict):
            stack.extend(value.values())
        elif isinstance(value, (list, tuple)):
            stack.extend(value)
