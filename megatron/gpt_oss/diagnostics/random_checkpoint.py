# Copyright (c) 2026, the megatron-core gptoss authors.

"""A random Hugging Face gpt-oss checkpoint that is small enough to train on a laptop.

It is written with safetensors, without transformers, and transformers can load it.
"""

import dataclasses
import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file

from megatron.gpt_oss.checkpoint.hf.config import CONFIG_NAME, hf_config_from_preset
from megatron.gpt_oss.checkpoint.hf.reader import SINGLE_NAME
from megatron.gpt_oss.checkpoint.mapping import hf_names, hf_shape
from megatron.gpt_oss.checkpoint.resumable_output import open_output
from megatron.gpt_oss.data.byte_tokenizer import (
    BYTE_VOCAB_SIZE,
    TOKENIZER_CONFIG_NAME,
    TOKENIZER_NAME,
    write_byte_tokenizer,
)
from megatron.gpt_oss.presets import Preset, get_preset

INIT_TINY = "gptoss init-tiny"
_GENERATION_CONFIG = "generation_config.json"
_NAMES = (SINGLE_NAME, CONFIG_NAME, TOKENIZER_NAME, TOKENIZER_CONFIG_NAME, _GENERATION_CONFIG)


def random_hf_tensors(preset: Preset, seed: int) -> dict[str, torch.Tensor]:
    """Initial weights of gpt-oss: normal with the preset's std, biases 0, norms 1.

    The first loss is about ln(vocabulary).

    Returns:
        fp32 tensors by Hugging Face name.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name in hf_names(preset):
        shape = hf_shape(name, preset)
        if "norm" in name:
            tensors[name] = torch.ones(shape)
        elif name.endswith("bias"):
            tensors[name] = torch.zeros(shape)
        else:
            tensors[name] = torch.randn(shape, generator=generator) * preset.initializer_range
    return tensors


def write_tiny_hf(directory: str | Path, seed: int = 0, preset: Preset | None = None) -> Path:
    """Write a random BF16 checkpoint with config and byte-level tokenizer.

    Args:
        directory: created if it does not exist; output of an earlier call is replaced.
        seed: seed of the weights.
        preset: the sizes; `tiny` by default.
    Raises:
        UsageError: the directory holds other files, or cannot be written.
    """
    preset = preset or get_preset("tiny")
    task = {"seed": seed, "preset": dataclasses.asdict(preset)}
    needed = sum(math.prod(hf_shape(name, preset)) for name in hf_names(preset)) * 2
    with open_output(
        directory, task, needed, overwrite=True, names=_NAMES, made_by=INIT_TINY
    ) as work:
        if not work.complete:
            _write(work.directory, seed, preset)
    return Path(directory)


def _write(directory: Path, seed: int, preset: Preset) -> None:
    write_byte_tokenizer(directory)
    tensors = {k: v.to(torch.bfloat16) for k, v in random_hf_tensors(preset, seed).items()}
    save_file(tensors, directory / SINGLE_NAME, metadata={"format": "pt"})
    end_of_text = BYTE_VOCAB_SIZE - 1
    config = hf_config_from_preset(preset, eos_token_id=end_of_text, pad_token_id=end_of_text)
    write_json(directory / CONFIG_NAME, config)
    write_json(
        directory / _GENERATION_CONFIG,
        {"eos_token_id": end_of_text, "pad_token_id": end_of_text, "do_sample": True},
    )


def write_json(path: Path, value: dict) -> None:
    """Write a JSON file in the format of Hugging Face's files."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
