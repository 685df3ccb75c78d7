# Copyright (c) 2026, the megatron-core gptoss authors.

"""Megatron's .idx file: written from an array of lengths, and checked before a run begins.

Layout (`megatron.core.datasets.indexed_dataset._IndexWriter`): magic, version 1, type of the
tokens, number of sequences and of document ends; then length (int32) and byte offset (int64) of
each sequence, and the sequence at which each document begins (int64), one more at the end.
"""

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy

from megatron.gpt_oss.errors import UsageError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
# DType's codes in indexed_dataset.py.
_DTYPES = {
    1: "uint8",
    2: "int8",
    3: "int16",
    4: "int32",
    5: "int64",
    6: "float64",
    7: "float32",
    8: "uint16",
}
_CODES = {name: code for code, name in _DTYPES.items()}


def write_index(stream: BinaryIO, lengths: numpy.ndarray, dtype: str) -> None:
    """Write the .idx of documents that lie one after the other in the .bin.

    Args:
        stream: where to.
        lengths: [documents] int32, in tokens.
        dtype: numpy's name of the tokens' type.
    """
    count = len(lengths)
    stream.write(_HEADER.pack(_MAGIC, 1, _CODES[dtype], count, count + 1))
    ends = numpy.cumsum(lengths, dtype=numpy.int64) * numpy.dtype(dtype).itemsize
    stream.write(numpy.ascontiguousarray(lengths, dtype=numpy.int32))
    stream.write(numpy.concatenate(([0], ends[:-1])).astype(numpy.int64) if count else b"")
    stream.write(numpy.arange(count + 1, dtype=numpy.int64))


@dataclass(frozen=True)
class IndexHeader:
    """What stands at the beginning of an .idx."""

    dtype: str
    sequences: int
    documents: int  # one more than documents

    @property
    def lengths_at(self) -> int:
        """Byte offset of the lengths."""
        return _HEADER.size

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return _HEADER.size + 12 * self.sequences + 8 * self.documents


def check_dataset(prefix: str | Path) -> IndexHeader:
    """Refuse a dataset whose .idx is damaged or does not belong to its .bin.

    Reads a few bytes, whatever the size.

    Raises:
        UsageError: names the file, what it has and what to do.
    """
    idx, data = f"{prefix}.idx", f"{prefix}.bin"
    remedy = "Copy both files again, or make them anew: gptoss tokenize ... --overwrite."
    size = os.path.getsize(idx)
    with open(idx, "rb") as stream:
        start = stream.read(_HEADER.size)
        if start[: len(_MAGIC)] != _MAGIC:
            found = f"begins with {start[:9]!r}" if start else "is empty"
            raise UsageError(f"{idx} {found}: not an index of Megatron's. {remedy}")
        if len(start) < _HEADER.size:
            raise UsageError(f"{idx} ends after {size} bytes, within its header. {remedy}")
        _, version, code, sequences, documents = _HEADER.unpack(start)
        if version != 1 or code not in _DTYPES:
            raise UsageError(
                f"{idx} has version {version} and type {code}, which Megatron does not know (wanted "
                f"version 1, types 1 to 8). {remedy}"
            )
        header = IndexHeader(_DTYPES[code], sequences, documents)
        # Multimodal sets have one more byte a sequence.
        if size not in (header.size, header.size + sequences):
            raise UsageError(
                f"{idx} has {size:,} bytes; with {sequences:,} sequences it must have "
                f"{header.size:,}. {remedy}"
            )
        length, pointer = 0, 0
        if sequences:
            length = _number(stream, header.lengths_at + 4 * (sequences - 1), "<i")
            pointer = _number(stream, header.lengths_at + 12 * sequences - 8, "<q")
        last = _number(stream, header.size - 8, "<q") if documents else 0
    if length < 0 or pointer < 0 or last != sequences:
        raise UsageError(
            f"{idx} is damaged: its last sequence has {length} tokens at byte {pointer}, its "
            f"documents end at sequence {last} of {sequences}. {remedy}"
        )
    expected = pointer + length * numpy.dtype(header.dtype).itemsize
    found = os.path.getsize(data)
    if found != expected:
        raise UsageError(
            f"{data} has {found:,} bytes, {idx} is of one with {expected:,}. They do not belong "
            f"together, or one is cut short. {remedy}"
        )
    return header


def read_lengths(prefix: str | Path) -> numpy.ndarray:
    """[sequences] int32: the tokens of each sequence, mapped from a checked .idx."""
    header = check_dataset(prefix)
    if not header.sequences:
        return numpy.empty(0, dtype=numpy.int32)
    return numpy.memmap(
        f"{prefix}.idx", numpy.int32, "r", offset=header.lengths_at, shape=(header.sequences,)
    )


def _number(stream: BinaryIO, offset: int, form: str) -> int:
    stream.seek(offset)
    return struct.unpack(form, stream.read(struct.calcsize(form)))[0]
