# Copyright (c) 2026, the megatron-core gptoss authors.

"""What a Hugging Face folder has beside weights and config: tokenizer, templates, licence."""

import shutil
from pathlib import Path

from megatron.gpt_oss.checkpoint.hf.config import CONFIG_NAME
from megatron.gpt_oss.checkpoint.hf.reader import INDEX_NAME
from megatron.gpt_oss.data.byte_tokenizer import TOKENIZER_NAME
from megatron.gpt_oss.data.tokenizer_files import read_tokenizer
from megatron.gpt_oss.errors import CheckpointError
from megatron.gpt_oss.outputs import naming

_WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".incomplete",
)
# A tokenizer has some 30 MB; what is larger is weights by another name.
_LARGEST = 200 * 10**6


def companion_files(folder: Path) -> list[Path]:
    """The files to take along, config and shard index left out (they are written anew)."""
    return sorted(
        path
        for path in Path(folder).iterdir()
        if path.is_file()
        and not path.name.startswith(".")
        and path.name not in (CONFIG_NAME, INDEX_NAME)
        and path.suffix not in _WEIGHTS
        and path.stat().st_size <= _LARGEST
    )


def copy_companions(source: Path, target: Path) -> None:
    """Copy them, byte for byte, into a folder that is made if it is not there."""
    target.mkdir(parents=True, exist_ok=True)
    for path in companion_files(source):
        with naming(target / path.name):
            shutil.copyfile(path, target / path.name)


def check_tokenizer(folder: Path) -> None:
    """Refuse a tokenizer.json that cannot be read; a folder without one is well.

    Raises:
        CheckpointError: names the file and what is wrong with it.
    """
    path = Path(folder) / TOKENIZER_NAME
    if not path.exists():
        return
    read_tokenizer(path, CheckpointError)
