# Copyright (c) 2026, the megatron-core gptoss authors.

"""Read slices of the tensors of a Hugging Face gpt-oss checkpoint."""

import os
import threading
from pathlib import Path

import torch

from megatron.gpt_oss.checkpoint.hf.mxfp4 import BLOCK, NAN_SCALE, dequantize
from megatron.gpt_oss.checkpoint.hf.safetensors_file import Entry, SafetensorsFile
from megatron.gpt_oss.errors import CheckpointError
from megatron.gpt_oss.json_file import brief, read_json

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MXFP4_SUFFIXES = ("_blocks", "_scales")


def read_weight_map(index: Path) -> dict[str, str]:
    """Read {tensor: file name} from a model.safetensors.index.json.

    Raises:
        CheckpointError: the index is invalid, or names a file outside its directory.
    """
    hint = "Download it again."
    weight_map = read_json(index, dict, CheckpointError, hint).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(
            f"{index} has weight_map = {brief(weight_map)}, not an object. {hint}"
        )
    for name, file in weight_map.items():
        # 'a/b' and '..' are outside the directory, NUL is invalid in a file name.
        if not isinstance(file, str) or os.path.basename(file) != file or "\0" in file:
            raise CheckpointError(
                f"{index} places {brief(name)} in {brief(file)}, which is not the name of a file "
                f"in the directory. {hint}"
            )
        if not file.endswith(".safetensors") or not file.isprintable():
            raise CheckpointError(
                f"{index} places {brief(name)} in {brief(file)}, not a *.safetensors. {hint}"
            )
    return weight_map


class HFReader:
    """Reads tensors by their BF16 names from BF16 or MXFP4 files. It is thread-safe.

    A matrix is in MXFP4 if its blocks are stored. It is stored as [E, out, in] and returned as
    [E, in, out], the layout of BF16 files.

    Args:
        directory: has model.safetensors, or shards and model.safetensors.index.json.
    Raises:
        CheckpointError: it has neither, or the index is invalid.
    """

    def __init__(self, directory: Path):
        self.directory = Path(directory)
        self._open_files: dict[str, SafetensorsFile] = {}
        self._lock = threading.Lock()
        self._of_thread = threading.local()
        index = self.directory / INDEX_NAME
        if index.is_file():
            self._file_of = read_weight_map(index)
        elif (self.directory / SINGLE_NAME).is_file():
            self._file_of = dict.fromkeys(self._open(SINGLE_NAME).entries, SINGLE_NAME)
        else:
            raise CheckpointError(
                f"{self.directory} has neither {SINGLE_NAME} nor {INDEX_NAME}. Is the download "
                "complete?"
            )

    def check_files(self) -> None:
        """Raise CheckpointError if a file of the index is missing or truncated."""
        files = sorted(set(self._file_of.values()))
        missing = [name for name in files if not (self.directory / name).is_file()]
        if missing:
            raise CheckpointError(
                f"{self.directory} has {len(files) - len(missing)} of {len(files)} files of its "
                f"index; missing: {', '.join(missing)}. Is the download complete?"
            )
        for name in files:
            self._open(name)

    def names(self) -> set[str]:
        """Names of the tensors, MXFP4 pairs under their BF16 name."""
        blocks, scales = MXFP4_SUFFIXES
        names = {name.removesuffix(blocks) for name in self._file_of if not name.endswith(scales)}
        return names

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor as `read` returns it."""
        if self.is_mxfp4(name):
            experts, out, groups, _ = self.entry(name + MXFP4_SUFFIXES[0]).shape
            return experts, groups * BLOCK, out
        return self.entry(name).shape

    def files(self) -> dict[str, dict[str, Entry]]:
        """The stored tensors of each file."""
        return {name: self._open(name).entries for name in sorted(set(self._file_of.values()))}

    def dtypes(self) -> set[str]:
        """Dtypes of the stored tensors, as safetensors names them."""
        return {entry.dtype for entries in self.files().values() for entry in entries.values()}

    def stored_names(self) -> set[str]:
        """Names of the stored tensors, by the index."""
        return set(self._file_of)

    def file_of(self, stored: str) -> str | None:
        """Name of the file that has a stored tensor by the index, or None."""
        return self._file_of.get(stored)

    def stored_in(self, name: str) -> Path:
        """Path of the file of a tensor (of the blocks of an MXFP4 pair)."""
        return (
            self.directory / self._file_of[name if name in self._file_of else self._stored(name)[0]]
        )

    def is_mxfp4(self, name: str) -> bool:
        """Whether a tensor is stored as blocks and scales."""
        return name not in self._file_of and name + MXFP4_SUFFIXES[0] in self._file_of

    def read(self, name: str, index: tuple[int | slice, ...] = ()) -> torch.Tensor:
        """Read a tensor, or a part of it.

        Args:
            name: e.g. model.layers.0.mlp.experts.gate_up_proj.
            index: an int or a contiguous slice for each leading dimension; () for the full tensor.
        Returns:
            The part; do not modify it, because each thread caches its last one.
        Raises:
            CheckpointError: no such tensor, or its file is missing or damaged.
        """
        key = (name, tuple((i.start, i.stop) if isinstance(i, slice) else i for i in index))
        last = self._of_thread
        if getattr(last, "key", None) != key:
            read = self._read_mxfp4 if self.is_mxfp4(name) else self._read_plain
            last.key, last.part = None, None  # free the old part first
            last.key, last.part = key, read(name, index)
        return last.part

    def entry(self, name: str) -> Entry:
        """Dtype, shape and byte range of a stored tensor.

        Raises:
            CheckpointError: no such tensor, or its file is missing or damaged.
        """
        if name not in self._file_of:
            raise CheckpointError(self._missing_message(name))
        entries = self._open(self._file_of[name]).entries
        if name not in entries:
            raise CheckpointError(
                f"{self.directory / self._file_of[name]} does not hold '{name}', which its index "
                f"lists; it holds {len(entries)} other tensors. Download the file again."
            )
        return entries[name]

    def check_scales(self) -> None:
        """Read the scales of all MXFP4 tensors, 1/17 of their bytes; refuse NaN and overflow.

        Raises:
            CheckpointError: names file, tensor, place and value.
        """
        for name in filter(self.is_mxfp4, sorted(self.names())):
            stored = self._stored(name)[1]
            for expert in range(self.entry(stored).shape[0]):
                if self._read_plain(stored, (expert,)).max() >= NAN_SCALE - 2:
                    self.read(name, (expert,))

    def close(self) -> None:
        """Close the files; a later read reopens them."""
        for file in self._open_files.values():
            file.close()
        self._open_files = {}

    def _read_plain(self, name: str, index: tuple) -> torch.Tensor:
        self.entry(name)
        return self._open(self._file_of[name]).read(name, index)

    def _read_mxfp4(self, name: str, index: tuple) -> torch.Tensor:
        """Read index [experts, in, out] of a tensor that is stored as [experts, out, in / 32]."""
        expert, columns, rows = (*index, *(slice(None),) * (3 - len(index)))
        first, stop, _ = columns.indices(self.shape(name)[1])
        groups = slice(first // BLOCK, -(-stop // BLOCK))
        index = (expert, rows, groups)
        blocks, scales = (self._read_plain(n, index) for n in self._stored(name))
        values = dequantize(blocks, scales)
        if scales.numel() and scales.max() >= NAN_SCALE - 2:  # may overflow, or is NaN
            self._check_scales(name, scales, values, *index)
        skipped = groups.start * BLOCK
        return values.transpose(-1, -2)[..., first - skipped : stop - skipped, :]

    def _check_scales(self, name, scales, values, expert, rows, groups) -> None:
        bad = ~torch.isfinite(values.unflatten(-1, (-1, BLOCK))).all(-1) | (scales == NAN_SCALE)
        if not bad.any():
            return
        place = bad.nonzero()[0].tolist()
        scale = scales[tuple(place)].item()
        if isinstance(expert, int):
            place = [expert, *place]
        else:
            place[0] += expert.start or 0
        place[1] += rows.start or 0
        place[2] += groups.start
        stored = self._stored(name)[1]
        raise CheckpointError(
            f"{self.directory / self._file_of[stored]}: '{stored}' has {scale} at {place}"
            + (" (NaN)" if scale == NAN_SCALE else ", and its block overflows")
            + f"; expected {NAN_SCALE - 3} at most. The file is damaged; download it again."
        )

    @staticmethod
    def _stored(name: str) -> tuple[str, str]:
        return name + MXFP4_SUFFIXES[0], name + MXFP4_SUFFIXES[1]

    def _open(self, filename: str) -> SafetensorsFile:
        with self._lock:
            if filename not in self._open_files:
                try:
                    self._open_files[filename] = SafetensorsFile(self.directory / filename)
                except FileNotFoundError as error:
                    raise CheckpointError(
                        f"{self.directory} lacks {filename}, which its index lists. Is the "
                        "download complete?"
                    ) from error
            return self._open_files[filename]

    def _missing_message(self, name: str) -> str:
        """Say in how many layers the tensor exists."""
        parts = name.split(".")
        message = f"{self.directory} has no tensor '{name}'"
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
