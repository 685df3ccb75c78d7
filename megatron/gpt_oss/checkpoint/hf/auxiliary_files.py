# Copyright (c) 2026, the megatron-core gptoss authors.

"""The other files of a Hugging Face directory: tokenizer, templates, licence."""

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
# A tokenizer has about 30 MB; larger files are weights in a format that is not in the list.
_LARGEST = 200 * 10**6


def auxiliary_files(directory: Path) -> list[Path]:
    """The files to copy: all but weights, config.json and the index, which are written."""
    return sorted(
        path
        for path in Path(directory).iterdir()
        if path.is_file()
        and not path.name.startswith(".")
        and path.name not in (CONFIG_NAME, INDEX_NAME)
        and path.suffix not in _WEIGHTS
        and path.stat().st_size <= _LARGEST
    )


def copy_auxiliary_files(source: Path, target: Path) -> None:
    """Copy the auxiliary files of `source` to `target`, which is created if necessary."""
    target.mkdir(parents=True, exist_ok=True)
    for path in auxiliary_files(source):
        with naming(target / path.name):
            shutil.copyfile(path, target / path.name)


def check_tokenizer(directory: Path) -> None:
    """Reject an invalid tokenizer.json; a directory without one passes.

    Raises:
        CheckpointError: names the file and what is wrong.
    """
    path = Path(directory) / TOKENIZER_NAME
    if not path.exists():
        return
    read_tokenizer(path, CheckpointError)
