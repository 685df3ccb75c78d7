# Copyright (c) 2026, the megatron-core gptoss authors.

"""Read parts of safetensors files, and write such files part by part.

The safetensors library maps complete files into memory, which counts as resident memory of the
process, and it writes a file only from tensors that are all in memory. Here each part is one read
or one write at the offset from the header.

Source: https://huggingface.co/docs/safetensors (8 bytes of header length, header as JSON, data).
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Sequence

import numpy
import torch

from megatron.gpt_oss.checkpoint.torch_dist.byte_ranges import (
    LARGEST_CALL,
    element_offset,
    is_contiguous,
    read_bytes,
)
from megatron.gpt_oss.errors import CheckpointError
from megatron.gpt_oss.json_file import LARGEST_FILE, brief, parse_json
from megatron.gpt_oss.outputs import naming

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
# Other dtypes of the format; None for those smaller than a byte.
_OTHER_SIZES = {
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "F8_E4M3FNUZ": 1,
    "F8_E5M2FNUZ": 1,
    "U16": 2,
    "U32": 4,
    "U64": 8,
    "C64": 8,
    "F4": None,
    "F6_E2M3": None,
    "F6_E3M2": None,
}

Index = tuple[int | slice, ...]


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: dtype as in the header, shape, bytes `start` to `stop` of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class SafetensorsFile:
    """A safetensors file opened for reading.

    Args:
        path: the file.
    Raises:
        CheckpointError: the file is truncated or damaged; says what was found and expected.
        FileNotFoundError: there is no such file.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self._fd = -1
        try:
            self._fd = os.open(self.path, os.O_RDONLY)
        except FileNotFoundError:
            raise
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.path} cannot be opened: {error}.") from error
        try:
            self.entries = self._read_header()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self):
        self.close()

    def read(self, name: str, index: Index = ()) -> torch.Tensor:
        """Read a tensor or a part of it.

        Args:
            name: a key of `entries`.
            index: an int or a contiguous slice for each leading dimension.
        Returns:
            A new tensor; dimensions indexed by an int are dropped.
        """
        entry = self.entries[name]
        box, kept = _box(entry.shape, index)
        shape = [stop - start for start, stop in box]
        if entry.dtype not in DTYPES:
            raise CheckpointError(
                f"{self.path}: '{name}' has dtype {entry.dtype}, which is not supported."
            )
        dtype = DTYPES[entry.dtype]
        if is_contiguous(box, entry.shape):
            out = torch.empty(shape, dtype=dtype)
            offset = entry.start + element_offset(box, entry.shape) * dtype.itemsize
            read_bytes(self._fd, self.path, offset, out)
        else:
            # Columns of a matrix are not contiguous: map the file during the copy.
            integer = numpy.dtype(f"i{dtype.itemsize}")
            array = numpy.memmap(self.path, integer, "r", entry.start, entry.shape or (1,))
            part = numpy.array(array[tuple(slice(*bounds) for bounds in box)])
            out = torch.from_numpy(part).view(dtype)
        return out.reshape([shape[i] for i in kept])

    def _read_header(self) -> dict[str, Entry]:
        try:
            size = os.fstat(self._fd).st_size
            length = int.from_bytes(os.pread(self._fd, 8, 0), "little") if size >= 8 else size
            if size < 8 or not 2 <= length <= min(size - 8, LARGEST_FILE):
                raise self._damaged(size, f"its header should have {length} bytes")
            text = os.pread(self._fd, length, 8)
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error.strerror}.") from error
        try:
            entries = _entries(parse_json(text, unique=True), 8 + length)
        except ValueError as error:
            raise self._damaged(size, f"its header cannot be read: {error}") from error
        expected = max((entry.stop for entry in entries.values()), default=8 + length)
        if size < expected:
            raise self._damaged(size, f"expected {expected} bytes from its header")
        return entries

    def _damaged(self, size: int, why: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path} ({size} bytes) is damaged or truncated ({why}). Download the file again."
        )


def _entries(header: Any, data_at: int) -> dict[str, Entry]:
    """The tensors of a header.

    Args:
        header: the JSON value.
        data_at: first byte of the data in the file.
    Raises:
        ValueError: names the tensor and the field that is wrong.
    """
    if not isinstance(header, dict):
        raise ValueError(f"it is not a JSON object but {brief(header)}")
    entries = {}
    for name, fields in header.items():
        if name != "__metadata__":
            entries[name] = _entry(brief(name), fields, data_at)
    placed = sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop))
    for (before, one), (name, other) in zip(placed, placed[1:]):
        if other.start < one.stop:
            raise ValueError(
                f"{brief(name)} begins at byte {other.start - data_at} of the data, before "
                f"{brief(before)} ends at {one.stop - data_at}"
            )
    return entries


def _entry(name: str, fields: Any, data_at: int) -> Entry:
    if not isinstance(fields, dict):
        raise ValueError(f"{name} is {brief(fields)}, not an object")
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or not (dtype in DTYPES or dtype in _OTHER_SIZES):
        raise ValueError(f"{name} has dtype = {brief(dtype)}")
    if not isinstance(shape, list) or not all(map(_is_count, shape)):
        raise ValueError(f"{name} has shape = {brief(shape)}, not a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise ValueError(f"{name} has data_offsets = {brief(offsets)}, not two byte offsets")
    start, stop = offsets
    if stop < start:
        raise ValueError(
            f"{name} has data_offsets = {brief(offsets)}, of which the second is smaller"
        )
    item = DTYPES[dtype].itemsize if dtype in DTYPES else _OTHER_SIZES[dtype]
    if item is not None and stop - start != math.prod(shape) * item:
        raise ValueError(
            f"{name} has {stop - start} bytes, expected {math.prod(shape) * item} for {dtype} "
            f"{brief(tuple(shape))}"
        )
    return Entry(dtype, tuple(shape), data_at + start, data_at + stop)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


class SafetensorsWriter:
    """Writes a file of known tensors, whose rows may come in any order.

    Args:
        path: the file; an existing one is replaced. Disk space is allocated for all of it.
        tensors: (name, dtype, shape) of each tensor in file order. Dtypes must be in descending
            size, so that each tensor starts at a multiple of its item size.
    """

    def __init__(self, path: Path, tensors: Sequence[tuple[str, torch.dtype, tuple[int, ...]]]):
        header, self.size = safetensors_header(tensors)
        self._entries = {}
        offset = len(header)
        for name, dtype, shape in tensors:
            self._entries[name] = (offset, dtype, math.prod(shape[1:]) * dtype.itemsize)
            offset += math.prod(shape) * dtype.itemsize
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        self.path = Path(path)
        try:
            with naming(path):
                os.posix_fallocate(self._fd, 0, self.size)
            self._write(header, 0)
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(self, *exc_info) -> None:
        os.close(self._fd)

    def write(self, name: str, rows: torch.Tensor, first_row: int = 0) -> None:
        """Write rows of a tensor, starting at row `first_row`."""
        offset, dtype, row_bytes = self._entries[name]
        assert rows.dtype == dtype and rows.is_contiguous(), (name, rows.dtype, rows.stride())
        self._write(rows.view(-1).view(torch.uint8).numpy(), offset + first_row * row_bytes)

    def _write(self, data, offset: int) -> None:
        memory = memoryview(data)
        while memory:
            with naming(self.path):
                count = os.pwrite(self._fd, memory[:LARGEST_CALL], offset)
            memory, offset = memory[count:], offset + count


def safetensors_header(
    tensors: Sequence[tuple[str, torch.dtype, tuple[int, ...]]],
) -> tuple[bytes, int]:
    """The header of a file with these tensors, and the size of the file in bytes."""
    fields: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dtype, shape in tensors:
        stop = offset + math.prod(shape) * dtype.itemsize
        fields[name] = {
            "dtype": _CODES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, stop],
        }
        offset = stop
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # aligns the data, as the library does
    return len(text).to_bytes(8, "little") + text, 8 + len(text) + offset


def _box(shape: tuple[int, ...], index: Index) -> tuple[list[tuple[int, int]], list[int]]:
    """Bounds in each dimension, and the dimensions that are not indexed by an int."""
    bounds, kept = [], []
    for i, size in enumerate(shape):
        at = index[i] if i < len(index) else slice(None)
        if isinstance(at, slice):
            start, stop, step = at.indices(size)
            assert step == 1, index
            bounds.append((start, max(start, stop)))
            kept.append(i)
        else:
            bounds.append((at, at + 1))
    return bounds, kept
