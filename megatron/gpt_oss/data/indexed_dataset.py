# Copyright (c) 2026, the megatron-core gptoss authors.

"""Write and check Megatron's .idx files.

Layout (`megatron.core.datasets.indexed_dataset._IndexWriter`): magic, version 1, dtype of the
tokens, number of sequences, number of document indices; then length (int32) and byte offset (int64)
of each sequence, and the first sequence of each document (int64), followed by the number of
sequences.
"""

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy

from megatron.gpt_oss.errors import UsageError
from megatron.gpt_oss.outputs import naming

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
_REMEDY = "Copy both files again, or recreate them: gptoss tokenize ... --overwrite."
_CHUNK = 2**20  # entries
LOSS = "loss"  # PREFIX.loss holds the loss weights of the tokens in PREFIX
_checked: dict[tuple, "IndexHeader"] = {}
_CODES = {name: code for code, name in _DTYPES.items()}


def write_index(stream: BinaryIO, lengths: numpy.ndarray, dtype: str) -> None:
    """Write the .idx of a .bin with contiguous documents.

    Args:
        stream: the output.
        lengths: [documents] int32, in tokens.
        dtype: numpy dtype name of the tokens.
    """
    count = len(lengths)
    stream.write(_HEADER.pack(_MAGIC, 1, _CODES[dtype], count, count + 1))
    ends = numpy.cumsum(lengths, dtype=numpy.int64) * numpy.dtype(dtype).itemsize
    stream.write(numpy.ascontiguousarray(lengths, dtype=numpy.int32))
    stream.write(numpy.concatenate(([0], ends[:-1])).astype(numpy.int64) if count else b"")
    stream.write(numpy.arange(count + 1, dtype=numpy.int64))


@dataclass(frozen=True)
class IndexHeader:
    """Header of an .idx."""

    dtype: str
    sequences: int
    documents: int  # number of documents plus 1

    @property
    def lengths_at(self) -> int:
        """Byte offset of the lengths."""
        return _HEADER.size

    @property
    def pointers_at(self) -> int:
        """Byte offset of the byte offsets of sequences."""
        return _HEADER.size + 4 * self.sequences

    @property
    def size(self) -> int:
        """Size of the file in bytes."""
        return _HEADER.size + 12 * self.sequences + 8 * self.documents


def check_dataset(prefix: str | Path, floats: bool = False) -> IndexHeader:
    """Reject a dataset whose .idx is damaged or does not fit its .bin.

    Reads the complete .idx, 20 bytes per document, and caches the result until a file changes.

    Args:
        prefix: path without extension.
        floats: the dataset holds loss weights, not tokens.
    Raises:
        UsageError: names the file, what it has and what to do.
    """
    idx, data = f"{prefix}.idx", f"{prefix}.bin"
    for path in (idx, data):
        if not os.path.isfile(path):
            what = "is a directory" if os.path.isdir(path) else "does not exist"
            raise UsageError(f"{path} {what}. {_REMEDY}")
    states = [(os.path.realpath(path), os.stat(path)) for path in (idx, data)]
    key = tuple((path, stat.st_size, stat.st_mtime_ns, stat.st_ino) for path, stat in states)
    if key not in _checked:
        _checked[key] = _check_all(idx, data)
    header = _checked[key]
    if header.dtype.startswith("float") != floats:
        expected = "loss weights" if floats else "token ids"
        raise UsageError(f"{idx} holds {header.dtype} values, which are not {expected}. {_REMEDY}")
    return header


def has_loss_weights(prefix: str | Path) -> bool:
    """Whether a dataset has loss weights, as `gptoss tokenize --chat` writes them."""
    return os.path.isfile(f"{prefix}.{LOSS}.idx")


def check_loss_weights(prefix: str | Path) -> None:
    """Reject loss weights that do not fit the tokens of a dataset.

    Raises:
        UsageError: the loss weights are damaged, or of other conversations.
    """
    loss = f"{prefix}.{LOSS}"
    check_dataset(loss, floats=True)
    if not numpy.array_equal(read_lengths(prefix), read_lengths(loss, floats=True)):
        raise UsageError(
            f"{loss}.idx has other lengths than {prefix}.idx: the files do not belong together. "
            f"{_REMEDY}"
        )


def _check_all(idx: str, data: str) -> IndexHeader:
    """See `check_dataset`."""
    with naming(idx), open(idx, "rb") as stream:
        header = _check_header(idx, stream)
        length, pointer = 0, 0
        if header.sequences:
            length = _number(stream, header.lengths_at + 4 * (header.sequences - 1), "<i")
            pointer = _number(stream, header.pointers_at + 8 * (header.sequences - 1), "<q")
        last = _number(stream, header.size - 8, "<q") if header.documents else 0
        if length < 0 or pointer < 0 or last != header.sequences or not header.documents:
            raise UsageError(
                f"{idx} is damaged: its last sequence has {length} tokens at byte {pointer}, its "
                f"documents end at sequence {last} of {header.sequences}. {_REMEDY}"
            )
        itemsize = numpy.dtype(header.dtype).itemsize
        expected = pointer + length * itemsize
        found = os.path.getsize(data)
        if found != expected:
            raise UsageError(
                f"{data} has {found:,} bytes, {idx} expects {expected:,}. The files do not belong "
                f"together, or one is truncated. {_REMEDY}"
            )
        _check_sequences(idx, stream, header, itemsize)
        _check_documents(idx, stream, header)
    return header


def _check_header(idx: str, stream: BinaryIO) -> IndexHeader:
    size = os.fstat(stream.fileno()).st_size
    start = stream.read(_HEADER.size)
    if start[: len(_MAGIC)] != _MAGIC:
        found = f"begins with {start[:9]!r}" if start else "is empty"
        raise UsageError(f"{idx} {found}: not a Megatron index. {_REMEDY}")
    if len(start) < _HEADER.size:
        raise UsageError(f"{idx} ends after {size} bytes, within its header. {_REMEDY}")
    _, version, code, sequences, documents = _HEADER.unpack(start)
    if version != 1 or code not in _DTYPES:
        raise UsageError(
            f"{idx} has version {version} and type {code}, which Megatron does not support "
            f"(expected version 1, types 1 to 8). {_REMEDY}"
        )
    header = IndexHeader(_DTYPES[code], sequences, documents)
    # Multimodal datasets have one more byte per sequence.
    if size not in (header.size, header.size + sequences):
        raise UsageError(
            f"{idx} has {size:,} bytes; with {sequences:,} sequences it must have "
            f"{header.size:,}. {_REMEDY}"
        )
    return header


def _check_sequences(idx: str, stream: BinaryIO, header: IndexHeader, itemsize: int) -> None:
    """Check that each sequence starts at the end of the previous one."""
    position = 0
    for first in range(0, header.sequences, _CHUNK):
        count = min(_CHUNK, header.sequences - first)
        lengths = _array(stream, header.lengths_at + 4 * first, count, "<i4").astype(numpy.int64)
        pointers = _array(stream, header.pointers_at + 8 * first, count, "<i8")
        if (negative := lengths < 0).any():
            at = int(negative.argmax())
            raise UsageError(
                f"{idx} is damaged: sequence {first + at} has {lengths[at]} tokens. {_REMEDY}"
            )
        ends = position + numpy.cumsum(lengths) * itemsize
        begins = ends - lengths * itemsize
        if (wrong := pointers != begins).any():
            at = int(wrong.argmax())
            raise UsageError(
                f"{idx} is damaged: sequence {first + at} begins at byte {pointers[at]:,}, but the "
                f"previous ones end at byte {begins[at]:,}. {_REMEDY}"
            )
        position = int(ends[-1])


def _check_documents(idx: str, stream: BinaryIO, header: IndexHeader) -> None:
    """Check that documents cover all sequences in order; a document may be empty."""
    before = 0
    for first in range(0, header.documents, _CHUNK):
        count = min(_CHUNK, header.documents - first)
        begins = _array(stream, header.size - 8 * (header.documents - first), count, "<i8")
        steps = numpy.diff(begins, prepend=before)
        wrong = (steps < 0) | (begins < 0) | (begins > header.sequences)
        wrong[0] |= first == 0 and begins[0] != 0
        if wrong.any():
            at = int(wrong.argmax())
            raise UsageError(
                f"{idx} is damaged: document {first + at} begins at sequence {begins[at]}, the "
                f"previous one at {begins[at] - steps[at]}, of {header.sequences}. {_REMEDY}"
            )
        before = int(begins[-1])


def _array(stream: BinaryIO, offset: int, count: int, dtype: str) -> numpy.ndarray:
    stream.seek(offset)
    return numpy.frombuffer(stream.read(count * numpy.dtype(dtype).itemsize), dtype=dtype)


def read_lengths(prefix: str | Path, floats: bool = False) -> numpy.ndarray:
    """[sequences] int32, the length of each sequence in tokens, mapped from the .idx."""
    header = check_dataset(prefix, floats)
    if not header.sequences:
        return numpy.empty(0, dtype=numpy.int32)
    return numpy.memmap(
        f"{prefix}.idx", numpy.int32, "r", offset=header.lengths_at, shape=(header.sequences,)
    )


def _number(stream: BinaryIO, offset: int, form: str) -> int:
    stream.seek(offset)
    return struct.unpack(form, stream.read(struct.calcsize(form)))[0]
