# Copyright (c) 2026, the megatron-core gptoss authors.

"""Slices of a Hugging Face gpt-oss checkpoint, read from disk only as they are asked for."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from megatron.gpt_oss.checkpoint.mxfp4 import dequantize
from megatron.gpt_oss.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MXFP4_SUFFIXES = ("_blocks", "_scales")


class HFReader:
    """Reads tensors by their BF16 names, whether the files hold BF16 or MXFP4.

    Which of the two is decided by the names that are present. An MXFP4 matrix is stored
    [E, out, in] and comes back [E, in, out], as BF16 files store it.

    Args:
        folder: with model.safetensors, or its shards and model.safetensors.index.json.
    Raises:
        CheckpointError: there is neither, or the index is not readable.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self._open_files: dict[str, safe_open] = {}
        self._last: tuple[tuple, torch.Tensor] | None = None
        index = self.folder / INDEX_NAME
        if index.is_file():
            try:
                self._file_of = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            except (ValueError, KeyError, TypeError) as error:
                raise CheckpointError(f"{index} is not a safetensors index ({error!r}).") from error
        elif (self.folder / SINGLE_NAME).is_file():
            self._file_of = dict.fromkeys(self._open(SINGLE_NAME).keys(), SINGLE_NAME)
        else:
            raise CheckpointError(
                f"{self.folder} has neither {SINGLE_NAME} nor {INDEX_NAME}. Is the download "
                "complete?"
            )

    def check_files(self) -> None:
        """Raise CheckpointError if a file of the index is missing or cut short."""
        files = sorted(set(self._file_of.values()))
        missing = [name for name in files if not (self.folder / name).is_file()]
        if missing:
            raise CheckpointError(
                f"{self.folder} has {len(files) - len(missing)} of {len(files)} files of its "
                f"index; missing: {', '.join(missing)}. Is the download complete?"
            )
        for name in files:
            self._open(name)

    def names(self) -> set[str]:
        """The tensors in the folder, MXFP4 pairs under their BF16 name."""
        blocks, scales = MXFP4_SUFFIXES
        names = {name.removesuffix(blocks) for name in self._file_of if not name.endswith(scales)}
        return names

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor as `read` returns it."""
        if self._is_mxfp4(name):
            experts, out, groups, _ = self._slice(name + MXFP4_SUFFIXES[0]).get_shape()
            return experts, groups * 32, out
        return tuple(self._slice(name).get_shape())

    def read(self, name: str, index: tuple[int | slice, ...] = ()) -> torch.Tensor:
        """Read a tensor, or a part of it.

        Args:
            name: e.g. model.layers.0.mlp.experts.gate_up_proj.
            index: an int or a contiguous slice for each leading dimension; () is all of it.
        Returns:
            The part; valid until the next call (the last one is kept, not to read it twice).
        Raises:
            CheckpointError: no such tensor, or its file is missing or damaged.
        """
        key = (name, tuple((i.start, i.stop) if isinstance(i, slice) else i for i in index))
        if self._last is None or self._last[0] != key:
            read = self._read_mxfp4 if self._is_mxfp4(name) else self._read_plain
            self._last = (key, read(name, index))
        return self._last[1]

    def _read_plain(self, name: str, index: tuple) -> torch.Tensor:
        return self._slice(name)[index if index else slice(None)]

    def _read_mxfp4(self, name: str, index: tuple) -> torch.Tensor:
        """BF16 index [experts, in, out] of a tensor stored [experts, out, in / 32]."""
        expert, columns, rows = (*index, *(slice(None),) * (3 - len(index)))
        blocks, scales = (self._slice(name + suffix)[expert, rows] for suffix in MXFP4_SUFFIXES)
        return dequantize(blocks, scales).transpose(-1, -2)[..., columns, :]

    def _is_mxfp4(self, name: str) -> bool:
        return name not in self._file_of and name + MXFP4_SUFFIXES[0] in self._file_of

    def _slice(self, name: str):
        if name not in self._file_of:
            raise CheckpointError(self._missing_message(name))
        try:
            return self._open(self._file_of[name]).get_slice(name)
        except SafetensorError as error:
            raise CheckpointError(
                f"{self.folder / self._file_of[name]} does not hold '{name}', which its index "
                f"promises ({error}). Fetch the file again."
            ) from error

    def _open(self, filename: str):
        if filename not in self._open_files:
            path = self.folder / filename
            try:
                self._open_files[filename] = safe_open(path, framework="pt")
            except FileNotFoundError as error:
                raise CheckpointError(
                    f"{self.folder} lacks {filename}, which its index names. Is the download "
                    "complete?"
                ) from error
            except SafetensorError as error:
                raise CheckpointError(
                    f"{path} ({path.stat().st_size} bytes) is damaged or cut short ({error}). "
                    "Fetch the file again."
                ) from error
        return self._open_files[filename]

    def _missing_message(self, name: str) -> str:
        """Say which tensors of the same kind there are, e.g. 23 of 24 layers."""
        parts = name.split(".")
        message = f"{self.folder} has no tensor '{name}'"
        if len(parts) > 3 and parts[1] == "layers":
            ending = ".".join(parts[3:])
            layers = {
                n.split(".")[2]
                for n in self.names()
                if n.startswith("model.layers.") and n.endswith("." + ending)
            }
            message += f" (found '{ending}' in {len(layers)} other layers)"
        files = len(set(self._file_of.values()))
        return f"{message}; it holds {len(self._file_of)} tensors in {files} files. Is it complete?"
