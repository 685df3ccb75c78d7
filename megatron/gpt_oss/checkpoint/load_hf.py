# Copyright (c) 2026, the megatron-core gptoss authors.

"""Fill a live Megatron model from a Hugging Face checkpoint, at any parallel layout.

Every rank asks the model's own sharded state dict which part of which global tensor it holds, and
reads just that from disk: no rank gathers, sends, or holds more than its own weights and one part.
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
from megatron.gpt_oss.checkpoint.hf.check import check_tensors
from megatron.gpt_oss.checkpoint.hf.config import preset_from_hf_config, read_hf_config
from megatron.gpt_oss.checkpoint.hf.reader import HFReader
from megatron.gpt_oss.checkpoint.mapping import (
    GLOBAL_NAMES,
    copy_matrix,
    hf_to_megatron,
    is_vocabulary_matrix,
    locate,
)
from megatron.gpt_oss.errors import CheckpointError
from megatron.gpt_oss.presets import Preset, extended

logger = logging.getLogger(__name__)


@torch.no_grad()
def load_hf(
    model_chunks: Sequence[torch.nn.Module], folder: str | Path, yarn_factor: float | None = None
) -> None:
    """Copy the weights of a Hugging Face gpt-oss folder into a model's parameters.

    Call it before the optimizer is made; later, an optimizer with main parameters needs
    `optimizer.reload_model_params()`. `load_hf_hook` does it at the right time.

    Args:
        model_chunks: this rank's chunks (several with virtual pipeline stages), wrapped or not.
        folder: BF16 or MXFP4 checkpoint.
        yarn_factor: the model's, where it is to extend the folder's context.
    Raises:
        CheckpointError: the folder is incomplete, of another model, or a parameter stayed unfilled.
    """
    folder = Path(folder)
    preset = extended(preset_from_hf_config(read_hf_config(folder)), yarn_factor)
    reader = HFReader(folder)
    check_tensors(reader, preset)
    for chunk in unwrap_model(list(model_chunks)):
        check_same_function(
            preset,
            str(folder),
            arguments_of_model(chunk),
            "the model",
            "Choose the preset that matches the checkpoint.",
        )
        filled = 0
        for part in sharded_tensors(chunk.sharded_state_dict()):
            where = locate(part.key, part.global_offset, part.local_shape)
            _check_vocabulary(part, preset, folder)
            value = hf_to_megatron(where, preset, reader.read)
            assert value.shape == part.data.shape, (part.key, value.shape, part.data.shape)
            copy_matrix(part.data, value)
            filled += part.data.numel()
        expected = sum(parameter.numel() for parameter in chunk.parameters())
        if filled != expected:
            raise CheckpointError(
                f"{folder} filled {filled} of {expected} parameter elements of this rank. "
                "Is the model built with the preset's flags?"
            )
    logger.info(f"loaded Hugging Face weights from {folder}")


def _check_vocabulary(part: ShardedTensor, preset: Preset, folder: Path) -> None:
    """Refuse a model with fewer rows of vocabulary than the folder; more are padding."""
    name = GLOBAL_NAMES.get(part.key)
    if name is None or not is_vocabulary_matrix(name):
        return
    rows = part.global_shape[part.prepend_axis_num]
    if rows < preset.vocab_size:
        raise CheckpointError(
            f"{folder} has {preset.vocab_size} rows of vocabulary, the model {rows}. Use "
            f"at least as many rows: --padded-vocab-size {preset.vocab_size}."
        )


def load_hf_hook(folder: str | Path, yarn_factor: float | None = None) -> Callable[[list], list]:
    """A hook for `GPTModelConfig.pre_wrap_hooks`: runs before DDP and optimizer take copies."""

    def hook(model_chunks: list) -> list:
        load_hf(model_chunks, folder, yarn_factor)
        return model_chunks

    return hook


def sharded_tensors(state_dict: ShardedStateDict) -> Iterator[ShardedTensor]:
    """All tensors of a sharded state dict, factories (gate and up of an expert) built.

    The factories chunk a parameter into views: writing to their data writes to the parameter.
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
